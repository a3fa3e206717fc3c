"""How transformers learns to load signbit checkpoints.

Importing this module (``import signbit`` does) registers a quantization config and a quantizer. The quantizer swaps
modules for packed ones while the model is still on the meta device, with tensors of exactly the names, shapes and
dtypes that the checkpoint has; transformers then loads them like any others. Works with transformers 5.0 to 5.23: only
hooks that mean the same in all of them are used, and the one whose signature changed takes either form.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.core_model_loading import WeightConverter
from transformers.quantizers import HfQuantizer, register_quantization_config, register_quantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from signbit import checkpoint, decoding
from signbit.architectures import dense_shape, replace_module, unfuse_experts
from signbit.cache import give_room
from signbit.errors import SignbitError
from signbit.layouts import Integers, parse_spec
from signbit.modules import QuantizedLinear, TiedHead, quantized_embedding
from signbit.safetensors_file import read_header


@register_quantization_config(checkpoint.METHOD_NAME)
class SignbitConfig(QuantizationConfigMixin):
    """quantization_config of a checkpoint: the recipe, and the layout of every packed matrix."""

    def __init__(self, **fields: Any) -> None:
        fields.pop("quant_method", None)
        self.quant_method = checkpoint.METHOD_NAME
        self.format_version = fields.pop("format_version", None)
        self.outer_modules = fields.pop("outer_modules", None)
        self.recipe_fields = {key: value for key, value in fields.items() if key != "layers"}
        self.layers = fields.get("layers", {})

    def to_dict(self) -> dict[str, Any]:
        # The order that the file was written in, so that saving it again changes nothing.
        return {
            "quant_method": self.quant_method,
            "format_version": self.format_version,
            **self.recipe_fields,
            "outer_modules": self.outer_modules,
            "layers": self.layers,
        }

    def to_diff_dict(self) -> dict[str, Any]:
        return self.to_dict()


@register_quantizer(checkpoint.METHOD_NAME)
class SignbitQuantizer(HfQuantizer):
    """Loads packed checkpoints. Quantizing is done by ``signbit.quantize``, not on the fly."""

    requires_calibration = True
    quantization_config: SignbitConfig

    def _process_model_before_weight_loading(
        self,
        model: PreTrainedModel,
        dtype: torch.dtype | None = None,
        checkpoint_files: list[str] | None = None,
        **kwargs: Any,
    ) -> PreTrainedModel:
        config = self.quantization_config
        checkpoint.check_version(config.to_dict(), "config.json")
        unfuse_experts(model)
        names = {id(module): name for name, module in model.named_modules()}
        embeddings, head = model.get_input_embeddings(), model.get_output_embeddings()
        compute = dtype or model.dtype
        for name, description in config.layers.items():
            try:
                module = model.get_submodule(name)
            except AttributeError as error:
                raise SignbitError(
                    f"config.json describes {name}, which {type(model).__name__} does not have"
                ) from error
            layout, spec = parse_spec(name, description)
            shape = tuple(module.weight.shape) if module is embeddings else dense_shape(module)
            if shape != spec.shape:
                raise SignbitError(f"{name} is {list(shape)}, but its layout in config.json is {list(spec.shape)}")
            if module is embeddings:
                packed = layout(spec, device="meta")
                if not isinstance(packed, Integers):
                    raise SignbitError(f"{name}: embeddings cannot be stored as {layout.kind}")
                rows = quantized_embedding(module, packed, compute)
                _replace(model, name, rows)
                if f"{names.get(id(head))}.weight" in model.all_tied_weights_keys:
                    # Nothing is tied by name any more: the head looks at the embeddings themselves.
                    _replace(model, names[id(head)], TiedHead(rows, getattr(head, "bias", None)))
                    model._tied_weights_keys = {}
                    model.all_tied_weights_keys = {}
            else:
                bias = getattr(module, "bias", None) is not None
                _replace(model, name, QuantizedLinear.empty(layout, spec, bias, compute, "meta"))
        if checkpoint_files:
            _check_files(model, checkpoint_files)
        return model

    def _process_model_after_weight_loading(self, model: PreTrainedModel, **kwargs: Any) -> PreTrainedModel:
        # Tensors are saved again under the module tree's names, not under those of a dense checkpoint.
        model._weight_conversions = []
        checkpoint.check_layouts(model)
        model.register_forward_pre_hook(give_room, with_kwargs=True)
        decoding.attach(model)
        return model

    def update_weight_conversions(self, weight_conversions: list[Any], model: Any = None) -> list[Any]:
        # Experts are stored one by one and stay so: what would merge them must not run.
        return [c for c in weight_conversions if not isinstance(c, WeightConverter)]

    def param_needs_quantization(self, model: PreTrainedModel, param_name: str, **kwargs: Any) -> bool:
        return False

    def is_serializable(self, *args: Any, **kwargs: Any) -> bool:
        return True

    @property
    def is_trainable(self) -> bool:
        return False


def _replace(model: PreTrainedModel, name: str, module: nn.Module) -> None:
    """Put ``module`` at ``name`` and keep transformers from initialising it.

    Some architectures initialise a linear from the module around it, by name; every tensor of a checkpoint is loaded,
    so those modules need no initialising either.
    """
    replace_module(model, name, module)
    for part in module.modules():
        part._is_hf_initialized = True  # type: ignore[assignment]
    parent = name.rpartition(".")[0]
    while parent and not isinstance(model.get_submodule(parent), PreTrainedModel):
        model.get_submodule(parent)._is_hf_initialized = True
        parent = parent.rpartition(".")[0]


def _check_files(model: PreTrainedModel, files: list[str]) -> None:
    """Refuse files that do not hold exactly what the model is about to load, naming file and tensor.

    transformers itself would make up what is missing and, depending on its version, what has another shape.
    """
    stored = {name: tensor for file in files for name, tensor in read_header(Path(file))[0].items()}
    wanted = model.state_dict()
    for name, tensor in stored.items():
        if ".packed." in name and name not in wanted:
            raise SignbitError(f"{tensor.file}: {name} belongs to no layer of config.json")
    for name, expected in wanted.items():
        if name in model.all_tied_weights_keys:
            continue
        found = stored.get(name)
        if found is None:
            raise SignbitError(f"{Path(files[0]).parent} lacks the tensor {name}")
        packed = ".packed." in name
        if found.shape != tuple(expected.shape) or (packed and found.dtype != expected.dtype):
            raise SignbitError(
                f"{found.file}: {name} is {found.dtype} {list(found.shape)}, expected "
                f"{expected.dtype if packed else 'float'} {list(expected.shape)}"
            )
