"""Blocks in and out of memory: the next one is read while the one before is worked on.

A block that is expected is read by a thread of its own, in the dtype that it has on disk. For a GPU it is read into
pinned memory and copied from there on a stream of its own, so that neither the disk nor the bus is waited for. There
are never more than two blocks' weights: those of the block that is loaded, and those of the one that is expected.
"""

from __future__ import annotations

from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from types import TracebackType
from typing import Self

import torch
from torch import Tensor

from signbit.architectures import replace_module
from signbit.blockwise.job import Job
from signbit.journal import FinishedBlock
from signbit.layouts import Layout, parse_spec
from signbit.modules import QuantizedLinear
from signbit.source import set_parameter


@dataclass
class _Weights:
    """A block's parameters by their full name; on a GPU they are there once ``arrived`` has happened."""

    tensors: dict[str, Tensor]
    arrived: torch.cuda.Event | None = None


class BlockLoader:
    """Loads blocks of the original model into the skeleton. A context, which ends with nothing being read."""

    def __init__(self, job: Job) -> None:
        self._job = job
        self._thread = ThreadPoolExecutor(1, "signbit-reader")
        self._expected: tuple[int, Future[_Weights]] | None = None
        self._stream = torch.cuda.Stream(job.device) if job.device.type == "cuda" else None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._expected = None
        self._thread.shutdown(wait=True, cancel_futures=True)

    def expect(self, index: int) -> None:
        """Begin to read block ``index``, if there is one: the next that :meth:`load` is asked for."""
        if index < len(self._job.blocks):
            self._expected = index, self._thread.submit(self._read, index)

    def load(self, index: int) -> None:
        """Put block ``index`` in place. Weights to be quantized come as they are; what stays is rounded to its storage
        dtype first. What went wrong while it was read is raised here."""
        expected, self._expected = self._expected, None
        if expected is None or expected[0] != index:
            if expected is not None:
                expected[1].cancel()
            expected = index, self._thread.submit(self._read, index)
        weights = expected[1].result()
        if weights.arrived is not None:
            torch.cuda.current_stream().wait_event(weights.arrived)
        block, prefix = self._job.block(index)
        for name in [name for name, _ in block.named_parameters()]:
            tensor = weights.tensors.pop(f"{prefix}.{name}")
            if tensor.is_cuda:
                # Made on another stream: its memory must not be given away before this one is done with it.
                tensor.record_stream(torch.cuda.current_stream())
            set_parameter(block, name, tensor.to(device=self._job.device, dtype=self._job.compute))

    @torch.no_grad()
    def _read(self, index: int) -> _Weights:
        block, prefix = self._job.block(index)
        quantized = self._job.linears(index)
        found = {}
        for name in [name for name, _ in block.named_parameters()]:
            owner, _, leaf = name.rpartition(".")
            full = f"{prefix}.{name}"
            tensor = self._job.source.tensor(full)
            if owner not in quantized or leaf != "weight":
                tensor = self._job.as_stored(full, tensor)
            # A copy, so that the mapping of the file is dropped.
            own = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=self._stream is not None)
            found[full] = own.copy_(tensor)
        return _Weights(found) if self._stream is None else self._sent(found, self._stream)

    def _sent(self, pinned: dict[str, Tensor], stream: torch.cuda.Stream) -> _Weights:
        """Under way to the GPU. torch keeps pinned memory until it has been copied from."""
        with torch.cuda.device(self._job.device), torch.cuda.stream(stream):
            there = {name: tensor.to(self._job.device, non_blocking=True) for name, tensor in pinned.items()}
            arrived = torch.cuda.Event()
            arrived.record(stream)
        return _Weights(there, arrived)


def restore_block(job: Job, index: int, finished: FinishedBlock) -> None:
    """Put a block in place as it was when it was finished."""
    block, prefix = job.block(index)
    for full, description in finished.layers.items():
        packed = stored_layout(full, description, finished.tensors, f"{full}.packed.").to(job.device)
        bias = finished.tensors.get(f"{full}.bias")
        if bias is not None:
            bias = bias.to(job.device, job.compute)
        replace_module(block, full.removeprefix(f"{prefix}."), QuantizedLinear(packed, bias))
    for name, parameter in list(block.named_parameters()):
        if parameter.device.type == "meta":
            set_parameter(block, name, finished.tensors[f"{prefix}.{name}"].to(job.device, job.compute))


def stored_layout(name: str, description: dict[str, object], tensors: dict[str, Tensor], prefix: str = "") -> Layout:
    """The layout of the linear ``name`` from its description and its tensors, which stand behind ``prefix``."""
    layout, spec = parse_spec(name, description)
    return layout(spec, {key: tensors[f"{prefix}{key}"] for key in spec.tensors()})
