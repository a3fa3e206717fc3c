"""Checkpoints: putting them together, checking them, loading them.

A checkpoint is an ordinary Hugging Face directory (docs/format.md has it byte by byte). config.json carries

    "quantization_config": {"quant_method": "signbit", "format_version": 1, ...recipe..., "layers": {name: layout}}

from which every packed tensor's name, dtype and shape follow; nothing is loaded that does not fit.
"""

from __future__ import annotations

import copy
import inspect as python_inspect
import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import split_state_dict_into_shards_factory
from transformers import AutoModelForCausalLM, PreTrainedModel

from signbit.errors import SignbitError
from signbit.journal import Journal, block_name
from signbit.layouts import Layout, describe, parse_spec
from signbit.recipe import Recipe
from signbit.report.quantization import FILE as REPORT_FILE
from signbit.report.quantization import QuantizationReport
from signbit.safetensors_file import INDEX, StoredTensor, copy_tensors, read_directory, read_tensor, write_text
from signbit.source import Source, first_line, load_tokenizer, read_config, resolve

METHOD_NAME = "signbit"
FORMAT_VERSION = 1
# Keys of quantization_config that are not the recipe's.
_OWN_KEYS = ("quant_method", "format_version", "outer_modules", "layers")
STUB_FILE = "modeling_signbit"
_STUB = """import signbit  # noqa: F401  (teaches transformers to load packed weights)
from transformers import {name}  # noqa: F401
"""


def check_target(out: Path, journal: Journal, *, resume: bool, overwrite: bool) -> None:
    """Refuse to write where that would lose something."""
    if not out.parent.is_dir():
        raise SignbitError(f"{out.parent} does not exist: create it first")
    if journal.is_foreign:
        raise SignbitError(f"{journal.directory} is needed for unfinished work, but holds something else: move it away")
    if not out.exists() and not resume and (journal.directory / "replaced").exists():
        # The run that was to replace it was stopped between two renames.
        (journal.directory / "replaced").rename(out)
    if out.exists() and not (overwrite or resume):
        raise SignbitError(f"{out} already exists: choose another directory, or replace it with --overwrite")
    if out.exists() and overwrite and not _is_ours(out):
        raise SignbitError(f"{out} is not a signbit checkpoint: it is not overwritten, choose another directory")
    if journal.has_work and not (overwrite or resume):
        raise SignbitError(
            f"{journal.directory} holds an interrupted run: go on with --resume, or start anew with --overwrite"
        )


def _is_ours(out: Path) -> bool:
    if not out.is_dir():
        return False
    if not any(out.iterdir()):
        return True
    if any(path.is_dir() for path in out.iterdir()):
        return False
    return (out / "config.json").is_file() and is_checkpoint(out)


def is_checkpoint(path: Path) -> bool:
    """Whether a directory with a config.json is a signbit checkpoint."""
    quantization = read_config(path).get("quantization_config")
    return isinstance(quantization, dict) and quantization.get("quant_method") == METHOD_NAME


def read_quantization(path: Path) -> dict[str, Any]:
    """The quantization_config of a checkpoint, its version checked."""
    if not is_checkpoint(path):
        raise SignbitError(f"{path} is not a signbit checkpoint")
    quantization: dict[str, Any] = read_config(path)["quantization_config"]
    check_version(quantization, path)
    return quantization


def check_version(quantization: dict[str, Any], where: str | Path) -> None:
    version = quantization.get("format_version")
    if version != FORMAT_VERSION:
        raise SignbitError(
            f"{where} has format version {version!r}, this signbit reads {FORMAT_VERSION}: install one that fits it"
        )
    for key, kind in (("method", str), ("outer_modules", list), ("layers", dict)):
        if not isinstance(quantization.get(key), kind):
            raise SignbitError(f"{where}: quantization_config lacks a valid {key!r}")


def read_recipe(path: Path) -> dict[str, Any]:
    """The recipe that made a checkpoint."""
    return {key: value for key, value in read_quantization(path).items() if key not in _OWN_KEYS}


# Writing


def assemble(
    source: Source,
    recipe: Recipe,
    journal: Journal,
    report: QuantizationReport,
    outer_specs: dict[str, dict[str, Any]],
    outer_modules: list[str],
    storage: torch.dtype,
    blocks: int,
) -> None:
    """Build the checkpoint from a finished journal in its staging directory."""
    staging = journal.staging
    if staging.exists():
        shutil.rmtree(staging)
    staging.mkdir()
    names = ["outer-embeddings", "outer-head", "outer-rest"]
    stored = [tensor for name in names if journal.has(name) for tensor in journal.stored(name)]
    layers = dict(outer_specs)
    for index in range(blocks):
        layers |= journal.read_block(index, tensors=False).layers
        stored += journal.stored(block_name(index))
    _write_weights(staging, stored)
    source.tokenizer.save_pretrained(staging)
    if source.skeleton.can_generate() and source.skeleton.generation_config is not None:
        source.skeleton.generation_config.save_pretrained(staging)
    write_text(staging / REPORT_FILE, report.to_json())
    config = copy.deepcopy(source.config)
    config.dtype = storage
    config.quantization_config = {
        "quant_method": METHOD_NAME,
        "format_version": FORMAT_VERSION,
        **recipe.to_dict(),
        "outer_modules": outer_modules,
        "layers": layers,
    }
    if getattr(config, "auto_map", None) is None:
        architecture = type(source.skeleton).__name__
        config.auto_map = {"AutoModelForCausalLM": f"{STUB_FILE}.{architecture}"}
        write_text(staging / f"{STUB_FILE}.py", _STUB.format(name=architecture))
    for file in source.code:
        shutil.copy(file, staging)
    config.save_pretrained(staging)


def assemble_retrained(
    start: Path, packed: dict[str, Layout], recipe: Recipe, journal: Journal, report: QuantizationReport
) -> None:
    """Build, in the staging directory, the checkpoint ``start`` with other packed matrices, by module name."""
    staging = journal.staging
    if staging.exists():
        shutil.rmtree(staging)
    staging.mkdir()
    stored = read_directory(start)
    for path in start.iterdir():
        if path.is_file() and path.name not in {INDEX, *(tensor.file.name for tensor in stored.values())}:
            shutil.copy(path, staging)
    tensors = {f"{name}.packed.{key}": value for name, one in packed.items() for key, value in one.state_dict().items()}
    journal.write("packed", tensors)
    stored |= {tensor.name: tensor for tensor in journal.stored("packed")}
    _write_weights(staging, list(stored.values()))
    config = read_config(start)
    quantization = config["quantization_config"]
    config["quantization_config"] = {
        "quant_method": METHOD_NAME,
        "format_version": FORMAT_VERSION,
        **recipe.to_dict(),
        "outer_modules": quantization["outer_modules"],
        "layers": quantization["layers"] | {name: describe(one) for name, one in packed.items()},
    }
    write_text(staging / "config.json", json.dumps(config, indent=2, sort_keys=True) + "\n")
    write_text(staging / REPORT_FILE, report.to_json())


def _write_weights(directory: Path, stored: list[StoredTensor]) -> None:
    """One file, or shards as transformers would cut them."""
    by_name = {tensor.name: tensor for tensor in stored}
    files, index = split_shards({name: tensor.nbytes for name, tensor in by_name.items()})
    for file, names in files.items():
        copy_tensors((by_name[name] for name in names), directory / file)
    if index is not None:
        write_text(directory / INDEX, index)


def split_shards(nbytes: dict[str, int]) -> tuple[dict[str, list[str]], str | None]:
    """File -> names of tensors, cut as transformers would cut them, and the index of shards if there are several."""
    limit = python_inspect.signature(PreTrainedModel.save_pretrained).parameters["max_shard_size"].default
    split = split_state_dict_into_shards_factory(
        nbytes,
        get_storage_size=lambda size: size,
        get_storage_id=lambda size: None,
        filename_pattern="model{suffix}.safetensors",
        max_shard_size=limit,
    )
    index = {"metadata": split.metadata, "weight_map": split.tensor_to_filename} if split.is_sharded else None
    return split.filename_to_tensors, None if index is None else json.dumps(index, indent=2, sort_keys=True) + "\n"


def publish(journal: Journal, out: Path) -> None:
    """Make the staged checkpoint the one at ``out``, and forget the journal.

    An old checkpoint is moved aside, not deleted, before the new one takes its place: whenever the run is stopped, one
    of the two is at ``out`` or a resumed run puts it there.
    """
    if out.exists():
        replaced = journal.directory / "replaced"
        if replaced.exists():  # by a run that was stopped when it had only this left to do
            shutil.rmtree(replaced)
        out.rename(replaced)
    journal.staging.rename(out)
    journal.discard()


# Reading


def expected_tensors(layers: dict[str, Any], path: Path) -> dict[str, tuple[torch.dtype, tuple[int, ...]]]:
    """Name -> dtype and shape of every packed tensor that a checkpoint must have."""
    expected = {}
    for name, description in layers.items():
        if not isinstance(description, dict):
            raise SignbitError(f"{path}: the layout description of {name} is damaged")
        for key, tensor in parse_spec(name, description)[1].tensors().items():
            expected[f"{name}.packed.{key}"] = (tensor.dtype, tensor.shape)
    return expected


def check_tensors(path: Path, quantization: dict[str, Any]) -> dict[str, StoredTensor]:
    """All tensors of a checkpoint; SignbitError naming file and tensor for any packed one missing or misshapen."""
    stored = read_directory(path)
    expected = expected_tensors(quantization["layers"], path)
    for name, (dtype, shape) in expected.items():
        if name not in stored:
            raise SignbitError(f"{path} lacks the tensor {name}")
        found = stored[name]
        if found.dtype != dtype or found.shape != shape:
            raise SignbitError(
                f"{found.file}: {name} is {found.dtype} {list(found.shape)}, expected {dtype} {list(shape)}"
            )
    for name, tensor in stored.items():
        if ".packed." in name and name not in expected:
            raise SignbitError(f"{tensor.file}: {name} belongs to no layer of config.json")
    return stored


def read_layouts(path: Path) -> Iterator[tuple[str, Layout]]:
    """(module name, packed matrix) of each quantized linear of a checkpoint, one in memory at a time."""
    quantization = read_quantization(path)
    stored = check_tensors(path, quantization)
    for name, description in quantization["layers"].items():
        if name not in quantization["outer_modules"]:
            layout, spec = parse_spec(name, description)
            yield name, layout(spec, {key: read_tensor(stored[f"{name}.packed.{key}"]) for key in spec.tensors()})


def check_layouts(model: PreTrainedModel) -> None:
    """Refuse packed tensors whose content contradicts their layout."""
    for name, module in model.named_modules():
        if isinstance(module, Layout) and module.device.type != "meta":
            module.check(name)


def load(
    path: str | Path,
    *,
    device_map: Any = None,
    dtype: torch.dtype | str | None = None,
    trust_remote_code: bool = False,
) -> tuple[PreTrainedModel, Any]:
    """Load a checkpoint: (model, tokenizer). No dense weight is ever built.

    dtype: what activations are computed in; by default float32 on CPUs and the stored dtype on GPUs. What is not
    quantized is brought to it: to write a checkpoint back as it was, load it with ``dtype="auto"``. Every tensor's
    name, dtype and shape is checked first, and that every one was used afterwards.
    """
    directory = resolve(str(path))
    quantization = read_quantization(directory)
    stored = check_tensors(directory, quantization)
    if dtype is None:
        on_gpu = device_map is not None and device_map != "cpu" and torch.cuda.is_available()
        dtype = "auto" if on_gpu else torch.float32
    try:
        model, info = AutoModelForCausalLM.from_pretrained(
            directory,
            dtype=dtype,
            device_map=device_map,
            output_loading_info=True,
            trust_remote_code=trust_remote_code,
        )
    except SignbitError:
        raise
    except Exception as error:
        # Whatever a config.json that makes no sense may lead model code to.
        raise SignbitError(f"{path} cannot be loaded: {first_line(error)}") from error
    unused = sorted(info["unexpected_keys"])
    missing = sorted(info["missing_keys"])
    if missing or unused:
        name, what = (missing[0], "is missing from") if missing else (unused[0], "belongs to no module of")
        raise SignbitError(f"{name} {what} {path}: the checkpoint does not fit its config.json")
    used = {name for name, _ in model.named_buffers()} | {name for name, _ in model.named_parameters()}
    left = [name for name in stored if ".packed." in name and name not in used]
    if left:
        raise SignbitError(f"{path}: the packed tensor {left[0]} was not used by {type(model).__name__}")
    return model.eval(), load_tokenizer(str(path), directory, trust_remote_code=trust_remote_code)
