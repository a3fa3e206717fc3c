"""What all parts of one quantization go by."""

from __future__ import annotations

import fnmatch
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from signbit.architectures import Linear, find_blocks, linears_of, unquantized_parameters
from signbit.errors import SignbitError
from signbit.finite import all_finite
from signbit.journal import Journal
from signbit.processes import Processes
from signbit.progress import Progress
from signbit.recipe import Recipe
from signbit.source import Source


@dataclass
class Job:
    """The model and the recipe, where results go, and who works on them.

    model: the skeleton that blocks are loaded into. storage: the dtype of what is kept; compute: of arithmetic.
    skipped: linears that the recipe leaves out; unquantized: parameters that stay; both with the reason.
    """

    source: Source
    recipe: Recipe
    journal: Journal
    processes: Processes
    progress: Progress

    def __post_init__(self) -> None:
        self.device: torch.device = self.processes.device
        self.model: PreTrainedModel = self.source.skeleton
        self.prefix, self.blocks = find_blocks(self.model)
        dtype = self.recipe.common.dtype
        self.storage: torch.dtype = self.source.dtype if dtype == "auto" else getattr(torch, dtype)
        # CPUs compute in float32, which is as fast on most of them as 16 bits, and exact for all that is stored.
        self.compute = torch.float32 if self.device.type == "cpu" else self.storage
        self._all = {f"{self.prefix}.{i}.{name}" for i, block in enumerate(self.blocks) for name in linears_of(block)}
        self.skipped: dict[str, str] = {
            name: f"left out by the recipe (skip: {pattern})"
            for name in self._all
            for pattern in self.recipe.common.skip
            if fnmatch.fnmatchcase(name, pattern)
        }
        self.unquantized = unquantized_parameters(self.model, self._all - self.skipped.keys(), self.skipped)

    def check(self) -> None:
        """Refuse what this recipe cannot make of this model."""
        common = self.recipe.common
        head = self.model.get_output_embeddings()
        if common.head != "keep" and (head is None or self.is_tied()):
            raise SignbitError("head: this model's head is tied to its embeddings: set embeddings instead")
        for pattern in common.skip:
            if not any(fnmatch.fnmatchcase(name, pattern) for name in self.skipped):
                raise SignbitError(f"skip: {pattern!r} matches no linear layer, such as {min(self._all)}")
        if len(self.skipped) == len(self._all):
            raise SignbitError("skip leaves no linear layer to quantize")
        if 0 < common.samples < self.processes.count:
            raise SignbitError(
                f"{self.processes.count} processes share {common.samples} calibration samples: start at most "
                f"{common.samples}, or give more samples"
            )

    def is_tied(self) -> bool:
        """Whether the head is the embeddings."""
        head = self.model.get_output_embeddings()
        return head is not None and f"{self.module_names()[id(head)]}.weight" in self.model.all_tied_weights_keys

    def module_names(self) -> dict[int, str]:
        return {id(module): name for name, module in self.model.named_modules()}

    def block(self, index: int) -> tuple[nn.Module, str]:
        """A block, and its full name."""
        return self.blocks[index], f"{self.prefix}.{index}"

    def linears(self, index: int) -> dict[str, Linear]:
        """The linears of a block that are to be quantized, by their name in it."""
        linears = linears_of(self.blocks[index])
        return {name: one for name, one in linears.items() if f"{self.prefix}.{index}.{name}" not in self.skipped}

    def names(self) -> list[str]:
        """The full names of all linears that are to be quantized, block by block."""
        return [f"{self.prefix}.{i}.{name}" for i in range(len(self.blocks)) for name in self.linears(i)]

    def stored(self, name: str) -> Tensor:
        """A parameter that is kept, in the dtype that it is stored in."""
        return self.as_stored(name, self.source.tensor(name))

    def as_stored(self, name: str, tensor: Tensor) -> Tensor:
        tensor = tensor.to(self.storage)
        if not all_finite(tensor):
            raise SignbitError(f"{name} does not fit {self.storage}: use dtype=bfloat16 or float32")
        return tensor
