"""Snapshots: all that a training is, in one safetensors file, so that it goes on as if it had never stopped.

    <parameter>               float32, of everything trained, by its name in the model
    <parameter>.exp_avg       AdamW's moments and step, for parameters that have had a gradient
    <parameter>.exp_avg_sq
    <parameter>.step

and, as metadata, the record of losses. Steps, learning rates and the order of the text follow from the number of steps
done; nothing else is random. The file is replaced atomically: the last good snapshot is there until the next is whole.
Who reads one holds it open, so that all of what is read is of one snapshot even if the run replaces it meanwhile.
Parameters are whole in it, however many processes trained them, so any number can go on; of a sharded model one
parameter at a time is put together.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn

from signbit.errors import SignbitError
from signbit.processes import Processes
from signbit.safetensors_file import StoredTensor, file_order, read_header, read_tensor, write_tensors
from signbit.training.record import Record
from signbit.training.spread import cut_like, whole

FILE = "snapshot.safetensors"
_STATE = ("exp_avg", "exp_avg_sq", "step")


class Snapshot:
    """A snapshot on disk, read tensor by tensor."""

    def __init__(self, file: Path) -> None:
        self.file = file
        # Names, offsets and tensors must be of one file: another may be in its place at any time.
        self._stream = file.open("rb")
        try:
            self._stored, metadata = read_header(file, self._stream)
            self.record = Record.from_json(metadata.get("record", ""), file)
        except BaseException:
            self.close()
            raise

    @classmethod
    def of(cls, directory: Path) -> Snapshot | None:
        """The last one of a run; None if there is none yet."""
        try:
            return cls(directory / FILE)
        except FileNotFoundError:
            return None

    def close(self) -> None:
        """Let go of the file; one that was replaced takes room until then. The record stays."""
        self._stream.close()

    def restore(self, prefix: str, module: nn.Module) -> None:
        """Put into ``module``, which stands at ``prefix`` ("" for the model), what was trained of it."""
        for name, parameter in module.named_parameters():
            if parameter.requires_grad:
                with torch.no_grad():
                    parameter.copy_(self._tensor(f"{prefix}.{name}" if prefix else name, parameter.shape))

    def restore_optimizer(self, optimizer: torch.optim.Optimizer, parameters: dict[str, nn.Parameter]) -> None:
        for name, parameter in parameters.items():
            if f"{name}.step" in self._stored:
                state = {key: self._tensor(f"{name}.{key}", parameter.shape) for key in _STATE[:2]}
                optimizer.state[parameter] = {
                    "step": self._tensor(f"{name}.step", torch.Size()).to(parameter.device),
                    **{key: cut_like(tensor.to(parameter.device), parameter) for key, tensor in state.items()},
                }

    def _tensor(self, name: str, shape: torch.Size) -> Tensor:
        stored: StoredTensor | None = self._stored.get(name)
        if stored is None or stored.shape != tuple(shape):
            raise SignbitError(f"{self.file} does not fit the model ({name}): start again with --overwrite")
        return read_tensor(stored, self._stream)


def write_snapshot(
    directory: Path,
    parameters: dict[str, nn.Parameter],
    optimizer: torch.optim.Optimizer,
    record: Record,
    processes: Processes,
) -> None:
    """All processes call this; the first writes."""
    tensors: dict[str, Tensor] = {}
    for name, parameter in parameters.items():
        tensors[name] = parameter
        tensors |= {f"{name}.{key}": optimizer.state[parameter][key] for key in _STATE if optimizer.state[parameter]}
    described = {name: (tensor.dtype, tuple(tensor.shape)) for name, tensor in tensors.items()}
    supply: Callable[[str], Tensor] = lambda name: whole(tensors[name].detach())  # noqa: E731
    if processes.is_first:
        write_tensors(described, supply, {"format": "pt", "record": record.to_json()}, directory / FILE)
    else:
        for name in file_order(described):  # each has its part to give
            supply(name)
