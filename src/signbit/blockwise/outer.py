"""What is outside the blocks: embeddings, head, norms, projections. Written as they will be stored, before all else."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn

from signbit.blockwise.job import Job
from signbit.layouts import describe
from signbit.methods.rtn import integer_rows
from signbit.modules import quantized_embedding
from signbit.source import set_parameter

_BITS = {"int8": 8, "int4": 4}


@dataclass
class Outer:
    """specs: the layouts of embeddings and head that are stored as integers; modules: the names of both."""

    specs: dict[str, dict[str, Any]] = field(default_factory=dict)
    modules: list[str] = field(default_factory=list)


def store_outer(job: Job) -> Outer:
    """Write everything outside the blocks as it will be stored, and load what the base model needs of it."""
    embeddings, head = job.model.get_input_embeddings(), job.model.get_output_embeddings()
    names, common, outer = job.module_names(), job.recipe.common, Outer()
    for module in job.model.modules():
        for name, buffer in module._buffers.items():
            if buffer is not None and buffer.device.type != "meta":
                module._buffers[name] = buffer.to(job.device)
    codecs = [(embeddings, common.embeddings, "outer-embeddings")]
    if head is not None and not job.is_tied():
        codecs.append((head, common.head, "outer-head"))
    for module, codec, file in codecs:
        name = names[id(module)]
        outer.modules.append(name)
        tensors = _encoded(job, outer, name, codec, module is embeddings) if codec != "keep" else {}
        for key, _ in module.named_parameters(recurse=False):
            if key != "weight" or codec == "keep":
                tensors[f"{name}.{key}"] = job.stored(f"{name}.{key}")
        _write(job, file, tensors)
        if module is embeddings and codec == "keep":
            set_parameter(module, "weight", tensors[f"{name}.weight"].to(job.device, job.compute))
    _store_rest(job, {names[id(module)] for module, _, _ in codecs})
    return outer


def unload_outer(job: Job) -> None:
    """Free embeddings and head, once they have made the first block's inputs."""
    for module in (job.model.get_input_embeddings(), job.model.get_output_embeddings()):
        if module is not None:
            module.to("meta")


def _encoded(job: Job, outer: Outer, name: str, codec: str, is_embedding: bool) -> dict[str, Tensor]:
    """A matrix of rows as integers; embeddings then stand in the model as what is stored."""
    packed = integer_rows(job.source.tensor(f"{name}.weight"), _BITS[codec], job.recipe.options.scale_dtype)
    outer.specs[name] = describe(packed)
    tensors = {f"{name}.packed.{key}": value for key, value in packed.state_dict().items()}
    if is_embedding:
        module: nn.Module = job.model.get_input_embeddings()
        job.model.set_input_embeddings(quantized_embedding(module, packed, job.compute).to(job.device))
    return tensors


def _store_rest(job: Job, stored: set[str]) -> None:
    """The remaining parameters outside the blocks: norms, position embeddings, projections."""
    tied = set(job.model.all_tied_weights_keys)
    tensors = {}
    for name, parameter in list(job.model.named_parameters()):
        inside = name.startswith(f"{job.prefix}.") or name.rpartition(".")[0] in stored or name in tied
        if not inside and parameter.device.type == "meta":
            tensors[name] = job.stored(name)
            set_parameter(job.model, name, tensors[name].to(job.device, job.compute))
    buffers = dict(job.model.named_buffers())
    for name in job.model.state_dict().keys() & buffers.keys():
        if not name.startswith(f"{job.prefix}.") and ".packed." not in name:
            tensors[name] = buffers[name]
    _write(job, "outer-rest", tensors)


def _write(job: Job, file: str, tensors: dict[str, Tensor]) -> None:
    if job.processes.is_first and not job.journal.has(file):
        job.journal.write(file, tensors)
