"""Running a model one block at a time, and looking at what goes into its linears.

The first pass runs the whole model with every block reduced to passing its hidden states on: that costs an embedding
lookup a batch and yields the first block's input together with all other arguments (masks, positions, rotary tables,
per-layer inputs) that each block is called with, whatever the architecture. From then on a block is called with those
arguments and the hidden states that the (quantized) blocks before it produced.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from signbit.architectures import dense_shape
from signbit.calibration.hessian import HessianAccumulator
from signbit.errors import SignbitError
from signbit.finite import all_finite
from signbit.precision import fast_float32
from signbit.processes import Processes
from signbit.timing import phase


@dataclass
class Call:
    """What a block is called with besides its hidden states."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]


class BlockInputs:
    """Hidden states of all calibration batches, and each block's other arguments.

    hidden: one [batch, sequence, width] tensor a batch, replaced by the next block's input as blocks are run.
    """

    def __init__(self, blocks: list[nn.Module]) -> None:
        self._blocks = blocks
        self._calls: list[list[Call]] = [[] for _ in blocks]
        self.hidden: list[Tensor] = []
        self._tuples = False

    @torch.no_grad()
    def record(self, model: PreTrainedModel, batches: list[Tensor], device: torch.device) -> None:
        """Fill from batches of ids. The model's embeddings and first block must be loaded, the others need not be."""
        # A few tokens through the first block show whether this architecture's blocks return tuples.
        with self._instead_of_blocks(self._probe, only_first=True):
            self._run(model, batches[0][:1, :2].to(device))
        with self._instead_of_blocks(self._note):
            for batch in batches:
                self._run(model, batch.to(device))

    def _run(self, model: PreTrainedModel, ids: Tensor) -> None:
        with suppress(_Stop):
            model.base_model(input_ids=ids, use_cache=False)

    @contextmanager
    def _instead_of_blocks(self, make: Callable[[int, Any], Any], only_first: bool = False) -> Iterator[None]:
        replaced = self._blocks[:1] if only_first else self._blocks
        for i, block in enumerate(replaced):
            block.forward = make(i, block.forward)
        try:
            yield
        finally:
            for block in replaced:
                del block.forward  # the instance's; the class's shows again

    def _probe(self, index: int, forward: Any) -> Any:
        def probe(*args: Any, **kwargs: Any) -> Any:
            self._tuples = isinstance(forward(*args, **kwargs), tuple)
            raise _Stop

        return probe

    def _note(self, index: int, forward: Any) -> Any:
        def note(*args: Any, **kwargs: Any) -> Any:
            if args:
                hidden, args = args[0], args[1:]
            else:
                hidden = kwargs.pop("hidden_states")
            call = Call(args, kwargs)
            calls = self._calls[index]
            # Without padding most batches are called alike: keep one copy.
            calls.append(calls[0] if calls and _same(calls[0].args, args) and _same(calls[0].kwargs, kwargs) else call)
            if index == 0:
                self.hidden.append(hidden)
            return (hidden,) if self._tuples else hidden

        return note

    @torch.no_grad()
    def run(self, index: int, *, keep: bool) -> None:
        """Call block ``index`` on every batch. ``keep``: its outputs become the hidden states."""
        for i, hidden in enumerate(self.hidden):
            with phase("forward"), fast_float32():
                output = self.call(index, i, hidden)
            if keep:
                self.hidden[i] = output

    def call(self, index: int, batch: int, hidden: Tensor) -> Tensor:
        """Block ``index`` on these hidden states, called as it is on those of a batch."""
        call = self._calls[index][batch]
        output = self._blocks[index](hidden, *call.args, **call.kwargs)
        return output[0] if isinstance(output, tuple) else output

    def check_finite(self, where: str) -> None:
        if not all(all_finite(hidden) for hidden in self.hidden):
            raise SignbitError(f"the output of {where} contains NaN or infinite values on the calibration text")


class _Stop(Exception):  # noqa: N818  (not an error)
    """Ends a forward pass once the first block has been seen."""


def _same(a: Any, b: Any) -> bool:
    if isinstance(a, Tensor):
        return isinstance(b, Tensor) and (a is b or (a.shape == b.shape and a.dtype == b.dtype and torch.equal(a, b)))
    if isinstance(a, tuple | list):
        return type(a) is type(b) and len(a) == len(b) and all(_same(x, y) for x, y in zip(a, b, strict=True))
    if isinstance(a, dict):
        return isinstance(b, dict) and a.keys() == b.keys() and all(_same(a[key], b[key]) for key in a)
    return bool(a is b or a == b)


class HessianCapture:
    """Accumulates the Hessian of every distinct linear input while a block runs.

    Linears that are given the very same tensor (q, k and v; gate and up) share one Hessian, kept under the first one's
    name; ``leader`` says whose. A linear that no token reached (an expert, perhaps) has neither.
    """

    def __init__(self, linears: dict[str, nn.Module]) -> None:
        self._linears = linears
        self.leader: dict[str, str] = {}
        self.hessians: dict[str, HessianAccumulator] = {}
        self._seen: list[tuple[Tensor, str]] = []

    @contextmanager
    def watching(self, block: nn.Module) -> Iterator[None]:
        handles = [module.register_forward_pre_hook(self._hook(name)) for name, module in self._linears.items()]
        # A new pass through the block: tensors of the pass before are no longer of interest.
        handles.append(block.register_forward_pre_hook(lambda *_: self._seen.clear()))
        try:
            yield
        finally:
            self._seen.clear()
            for handle in handles:
                handle.remove()

    def by_input(self) -> list[list[str]]:
        """Linears that share an input together, the one whose name its Hessian has first; those that saw none alone."""
        groups: dict[str, list[str]] = {}
        for name in self._linears:
            leader = self.leader.get(name, name)
            group = groups.setdefault(leader, [leader])
            if name != leader:
                group.append(name)
        return list(groups.values())

    def agree(self, processes: Processes) -> None:
        """Know of all linears that any process has seen an input of: the same leaders everywhere, with sums of zero
        where this process has seen none."""
        if processes.count == 1:
            return
        for told in processes.tell(self.leader):
            self.leader |= told
        for name, linear in self._linears.items():
            if self.leader.get(name) == name and name not in self.hessians:
                self.hessians[name] = HessianAccumulator(dense_shape(linear)[1], processes.device)
        self.hessians = {name: self.hessians[name] for name in self._linears if name in self.hessians}

    def _hook(self, name: str) -> Callable[[nn.Module, tuple[Any, ...]], None]:
        def hook(module: nn.Module, args: tuple[Any, ...]) -> None:
            x = args[0]
            if not x.numel():
                return
            if name not in self.leader:
                self.leader[name] = next((other for seen, other in self._seen if seen is x), name)
            if self.leader[name] != name:
                return
            self._seen.append((x, name))
            with phase("Hessians"):
                if name not in self.hessians:
                    self.hessians[name] = HessianAccumulator(x.shape[-1], x.device)
                self.hessians[name].add(x)

        return hook
