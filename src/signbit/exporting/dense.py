"""A plain Hugging Face directory: dense weights that transformers loads without knowing signbit.

Written one decoder block at a time, so that memory holds one block however large the model is. Tensors get the names
and forms that transformers itself saves the architecture with (experts one by one where its checkpoints have them so),
by its own table of conversions, run backwards: once on the meta device for names and shapes, then block by block.
"""

from __future__ import annotations

import copy
import shutil
from pathlib import Path

import torch
from torch import Tensor
from transformers.core_model_loading import revert_weight_conversion

from signbit.architectures import find_blocks
from signbit.checkpoint import split_shards
from signbit.errors import SignbitError
from signbit.exporting.rounding import Rounding
from signbit.exporting.unpacked import Unpacked
from signbit.memory import return_free_memory
from signbit.progress import Progress
from signbit.safetensors_file import INDEX, write_tensors, write_text

DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}


def write_directory(model: Unpacked, directory: Path, dtype: torch.dtype, progress: Progress) -> Rounding:
    """Write ``model`` to the new directory ``directory``; returns what the dtype made of the packed matrices."""
    directory.mkdir()
    weights = _Weights(model, dtype)
    described = weights.described()
    shards, index = split_shards({name: _nbytes(*kind) for name, kind in described.items()})
    with progress.task("writing tensors", len(described)) as task:

        def supply(name: str) -> Tensor:
            task.advance()
            return weights.tensor(name)

        for file, names in shards.items():
            write_tensors({name: described[name] for name in names}, supply, {"format": "pt"}, directory / file)
    if index is not None:
        write_text(directory / INDEX, index)
    model.tokenizer.save_pretrained(directory)
    if model.skeleton.can_generate() and model.skeleton.generation_config is not None:
        model.skeleton.generation_config.save_pretrained(directory)
    config = copy.deepcopy(model.config)
    config.dtype = dtype
    config.architectures = [type(model.skeleton).__name__]
    for code in model.code:
        shutil.copy(code, directory)
    config.save_pretrained(directory)
    return weights.rounding


class _Weights:
    """The tensors to be written, by the names that they are written under."""

    def __init__(self, model: Unpacked, dtype: torch.dtype) -> None:
        self._model, self._dtype = model, dtype
        self._units = _units(model)
        self._unit_of: dict[str, str] = {}
        self._current: tuple[str, dict[str, Tensor]] = "", {}
        self._counted: set[str] = set()
        self._parameters = {name for name, _ in model.skeleton.named_parameters()}
        self.rounding = Rounding()

    def described(self) -> dict[str, tuple[torch.dtype, tuple[int, ...]]]:
        """Name -> dtype and shape of all tensors, in the order of the model."""
        described = {}
        for unit, names in self._units.items():
            empty = {name: torch.empty_like(self._model.empty[name], dtype=self._stored_dtype(name)) for name in names}
            for name, tensor in revert_weight_conversion(self._model.skeleton, empty).items():
                described[name] = tensor.dtype, tuple(tensor.shape)
                self._unit_of[name] = unit
        return described

    def tensor(self, name: str) -> Tensor:
        unit = self._unit_of[name]
        if unit != self._current[0]:
            self._current = "", {}
            return_free_memory()
            self._current = unit, self._make(unit)
        return self._current[1][name]

    def _make(self, unit: str) -> dict[str, Tensor]:
        made = {}
        for name in self._units[unit]:
            exact = self._model.tensor(name)
            made[name] = exact.to(self._stored_dtype(name))
            if not torch.isfinite(made[name]).all() and torch.isfinite(exact).all():
                raise SignbitError(f"{name} does not fit {made[name].dtype}: export with --dtype bfloat16 or float32")
            if unit not in self._counted and exact.ndim > 1:
                self.rounding.count(str(self._dtype).removeprefix("torch."), exact, made[name])
        self._counted.add(unit)  # a block that two shards share is made twice
        converted: dict[str, Tensor] = revert_weight_conversion(self._model.skeleton, made)
        return converted

    def _stored_dtype(self, name: str) -> torch.dtype:
        """Buffers keep their own: some count, some are small corrections that 16 bits would lose."""
        return self._dtype if name in self._parameters else self._model.empty[name].dtype


def _units(model: Unpacked) -> dict[str, list[str]]:
    """What is made at once: the tensors of a block, or one outside the blocks. Conversions join only tensors of one."""
    prefix, _ = find_blocks(model.skeleton)
    units: dict[str, list[str]] = {}
    for name in model.names():
        inside = name.startswith(f"{prefix}.")
        unit = ".".join(name.split(".")[: prefix.count(".") + 2]) if inside else name
        units.setdefault(unit, []).append(name)
    return units


def _nbytes(dtype: torch.dtype, shape: tuple[int, ...]) -> int:
    return torch.Size(shape).numel() * dtype.itemsize
