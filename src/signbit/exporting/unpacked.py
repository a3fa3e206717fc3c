"""Any MODEL as what it was before it was packed: the module tree of plain transformers, and a dense weight for each
parameter, one at a time.

Names are those of the tree that transformers builds from config.json without signbit. Checkpoints of signbit keep
experts one by one, where that tree has them fused; they are stacked again. A layout's ``bias`` (a bias correction) is
added to the linear's own, and where it has none, config.json's switches for biases are turned on: the others are zeros.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from accelerate import init_empty_weights
from torch import Tensor
from transformers import AutoModelForCausalLM, GenerationConfig, PreTrainedConfig, PreTrainedModel
from transformers.pytorch_utils import Conv1D

from signbit import checkpoint
from signbit.architectures import Slice, unfuse_experts
from signbit.errors import SignbitError
from signbit.layouts import Layout, parse_spec
from signbit.safetensors_file import StoredTensor, read_tensor
from signbit.source import Source, first_line, load_config, load_tokenizer, open_source, resolve

# Switches of configurations that give linears a bias.
_BIAS_SWITCHES = ("attention_bias", "mlp_bias", "use_bias")


@dataclass
class Unpacked:
    """A model to be read densely.

    skeleton: as transformers builds it, on the meta device; its tensors by name are ``empty``. code: Python files of a
    model that brings its own. read: a stored tensor by the name it has where the experts are one by one; None if there
    is none. layers: descriptions of packed matrices, by module name. slices: which expert's weight is which part of a
    fused parameter, by the name it has one by one.
    """

    name: str
    skeleton: PreTrainedModel
    tokenizer: Any
    code: list[Path]
    read: Callable[[str], Tensor | None]
    close: Callable[[], None]
    layers: dict[str, dict[str, Any]] = field(default_factory=dict)
    slices: dict[str, Slice] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.empty: dict[str, Tensor] = self.skeleton.state_dict()

    @property
    def config(self) -> PreTrainedConfig:
        return self.skeleton.config

    def names(self) -> list[str]:
        """Parameters and stored buffers, each once: tied ones under the name that is stored."""
        return [name for name in self.empty if name not in self.skeleton.all_tied_weights_keys]

    def layout(self, module: str) -> Layout | None:
        """The packed matrix at ``module``; None where it was not packed."""
        if module not in self.layers:
            return None
        kind, spec = parse_spec(module, self.layers[module])
        tensors = {key: self._stored(f"{module}.packed.{key}") for key in spec.tensors()}
        layout = kind(spec, tensors)
        layout.check(module)
        return layout

    def stored_dtype(self, name: str) -> torch.dtype:
        """Of the parameter ``name``, which is not packed."""
        of_experts = [key for key, part in self.slices.items() if part.name == name]
        return self._stored(of_experts[0] if of_experts else name).dtype

    def tensor(self, name: str) -> Tensor:
        """The parameter ``name``, or an expert's, by the name it has one by one: float32 where it was packed, as it is
        stored where not."""
        if name in self.slices:
            return self._plain(name)
        parts = sorted((key for key, part in self.slices.items() if part.name == name), key=self._expert)
        if parts:
            return torch.stack([self._of_expert(key) for key in parts])
        found = self._plain(name)
        module = self.skeleton.get_submodule(name.rpartition(".")[0])
        if name.endswith(".weight") and isinstance(module, Conv1D) and name.removesuffix(".weight") in self.layers:
            found = found.T
        shape = self.empty[name].shape
        if found.shape != shape:
            raise SignbitError(f"{name} of {self.name} is {list(found.shape)}, but config.json makes it {list(shape)}")
        return found

    def _plain(self, name: str) -> Tensor:
        """A parameter where experts are one by one, [out, in] if it is a packed matrix."""
        module, _, leaf = name.rpartition(".")
        if leaf == "weight" and module in self.layers:
            layout = self.layout(module)
            assert layout is not None
            return layout.dequantize()
        correction = self.layers.get(module, {}).get("bias") if leaf == "bias" else None
        if correction:
            own = self.read(name)
            stored = self._stored(f"{module}.packed.bias").float()
            return stored if own is None else stored + own.float()
        found = self.read(name)
        if found is None and leaf == "bias":  # of a linear that has one only because others need theirs
            return torch.zeros(self.empty[name].shape)
        return self._stored(name) if found is None else found

    def _of_expert(self, name: str) -> Tensor:
        found = self._plain(name)
        return found.T if self.slices[name].transposed and found.ndim == 2 else found

    def _expert(self, name: str) -> int:
        return self.slices[name].index

    def _stored(self, name: str) -> Tensor:
        found = self.read(name)
        if found is None:
            raise SignbitError(f"{self.name} lacks the tensor {name}")
        return found


def open_unpacked(model: str, *, trust_remote_code: bool = False, beside: Path | None = None) -> Unpacked:
    """Open MODEL for exporting. The caller closes it. beside: see :func:`signbit.source.open_source`."""
    path = resolve(model)
    if path.is_dir() and checkpoint.is_checkpoint(path):
        return _open_checkpoint(model, path, trust_remote_code)
    return _open_original(open_source(model, trust_remote_code=trust_remote_code, beside=beside), trust_remote_code)


def _open_checkpoint(name: str, path: Path, trust_remote_code: bool) -> Unpacked:
    quantization = checkpoint.read_quantization(path)
    stored = checkpoint.check_tensors(path, quantization)
    layers = quantization["layers"]
    _refuse_norms(name, layers)
    config = load_config(name, path, trust_remote_code)
    if getattr(config, "quantization_config", None) is not None:
        del config.quantization_config
    if any(checkpoint.STUB_FILE in str(target) for target in (getattr(config, "auto_map", None) or {}).values()):
        del config.auto_map
    corrected = {f"{module}.bias" for module, layer in layers.items() if layer.get("bias")}
    skeleton = _with_biases(name, config, corrected, trust_remote_code)
    if (path / "generation_config.json").is_file():
        try:
            skeleton.generation_config = GenerationConfig.from_pretrained(path)
        except (OSError, ValueError, TypeError) as error:
            raise SignbitError(f"{path / 'generation_config.json'} cannot be read: {first_line(error)}") from error
    unfused = copy.deepcopy(skeleton)
    slices = unfuse_experts(unfused)
    known = unfused.state_dict()
    for module in layers:
        if f"{module}.weight" not in known:
            raise SignbitError(f"{module} of {name} is packed, but config.json makes a model without it")
    return Unpacked(
        name=name,
        skeleton=skeleton,
        tokenizer=load_tokenizer(name, path, trust_remote_code=trust_remote_code),
        code=sorted(path.glob("*.py")) if trust_remote_code and getattr(config, "auto_map", None) else [],
        read=lambda key: _read(stored, key),
        close=lambda: None,
        layers=layers,
        slices=slices,
    )


def _open_original(source: Source, trust_remote_code: bool) -> Unpacked:
    skeleton = _skeleton(source.name, source.config, trust_remote_code)
    skeleton.generation_config = source.skeleton.generation_config
    weights, buffers = source.weights, dict(source.skeleton.named_buffers())

    def read(name: str) -> Tensor | None:
        return source.tensor(name) if name in weights else buffers.get(name)

    return Unpacked(
        name=source.name,
        skeleton=skeleton,
        tokenizer=source.tokenizer,
        code=source.code,
        read=read,
        close=source.close,
    )


def _read(stored: dict[str, StoredTensor], name: str) -> Tensor | None:
    return read_tensor(stored[name]) if name in stored else None


def _skeleton(name: str, config: PreTrainedConfig, trust_remote_code: bool) -> PreTrainedModel:
    try:
        with init_empty_weights(include_buffers=True):
            return AutoModelForCausalLM.from_config(config, trust_remote_code=trust_remote_code)
    except Exception as error:
        # Whatever a config.json that makes no sense may lead model code to.
        raise SignbitError(f"{name} cannot be opened as a causal LM: {first_line(error)}") from error


def _with_biases(name: str, config: PreTrainedConfig, wanted: set[str], trust_remote_code: bool) -> PreTrainedModel:
    """The skeleton whose linears have at least the biases ``wanted``, by the names of unfused experts."""
    skeleton = _skeleton(name, config, trust_remote_code)
    for switch in (None, *_BIAS_SWITCHES):
        if switch is not None:
            if getattr(config, switch, None) is not False or not _lacking(skeleton, wanted):
                continue
            setattr(config, switch, True)
            skeleton = _skeleton(name, config, trust_remote_code)
    lacking = _lacking(skeleton, wanted)
    if lacking:
        raise SignbitError(
            f"{lacking[0].removesuffix('.bias')} of {name} was given a bias by bias_correction, and a plain "
            f"{type(skeleton).__name__} has no place for it: quantize with bias_correction=false to export the model"
        )
    return skeleton


def _lacking(skeleton: PreTrainedModel, wanted: Iterable[str]) -> list[str]:
    unfused = copy.deepcopy(skeleton)
    unfuse_experts(unfused)
    return sorted(set(wanted) - {name for name, _ in unfused.named_parameters()})


def _refuse_norms(name: str, layers: dict[str, dict[str, Any]]) -> None:
    """No plain linear normalises what it puts out."""
    for module, layer in layers.items():
        if layer.get("norm"):
            raise SignbitError(
                f"{module} of {name} normalises its outputs (norm=true, as OneBit does), which no plain linear layer "
                "does: it runs with signbit only; quantize with norm=false to export the model"
            )
