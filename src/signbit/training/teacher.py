"""The teacher: the original model, and what the losses need of it, computed as it is needed or kept on disk.

With ``teacher_cache`` a window's states are kept when it is first seen: unit vectors of the hidden states in float16
(only their direction is used, and none of their entries is beyond 1) and the last hidden state in float32, from which
logits are computed again. Of a small text that is seen often, this saves the teacher's forward pass; it takes
(2 (blocks - 1) + 4) x width bytes a token, 36 kB in a model of 30 blocks of width 576.

What is kept can be trusted after any kind of stop: a record is believed only if its checksum, in a file of its own, is
there and right. The files are read and written, not mapped: a full disk is then an error, where a process that has
mapped a file dies of it (SIGBUS). And a run that goes on computes what the uninterrupted run did, to the bit: what is
looked up and what is computed go through the same rounding.
"""

from __future__ import annotations

import math
import shutil
import zlib
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from signbit.errors import SignbitError
from signbit.training.states import Head, States, StatesOf

# Bytes.
Record: TypeAlias = npt.NDArray[np.uint8] | Any


class Teacher:
    """``states(numbers, ids)`` of windows by their numbers."""

    def __init__(
        self, model: StatesOf, head: Head, autocast: AbstractContextManager[None], cache: Cache | None
    ) -> None:
        self.head = head
        self._model, self._autocast, self._cache = model, autocast, cache

    @torch.no_grad()
    def states(self, numbers: list[int], ids: Tensor) -> States:
        if self._cache is None:
            return self._compute(ids)
        found = [self._cache.read(number) for number in numbers]
        if any(one is None for one in found):
            computed = self._compute(ids)
            for place, number in enumerate(numbers):
                if found[place] is None:
                    found[place] = self._cache.write(number, computed, place)
        records = [one for one in found if one is not None]
        hidden = [torch.stack(of_block).to(ids.device) for of_block in zip(*(r.hidden for r in records), strict=True)]
        lasts = [record.last for record in records if record.last is not None]
        return States(hidden, torch.stack(lasts).to(ids.device) if lasts else None)

    def _compute(self, ids: Tensor) -> States:
        with self._autocast:
            return States(*self._model(ids))


class Cache:
    """States of windows on disk: those of all hidden ones that are asked for, and the last if that is."""

    def __init__(self, directory: Path, windows: int, probe: States, seqlen: int) -> None:
        """probe: states of any text, which says what is kept. Room on the disk is taken as windows are seen."""
        widths = {state.shape[-1] for state in probe.hidden}
        self._hidden = (len(probe.hidden), seqlen, max(widths, default=0))
        self._last = (seqlen, 0 if probe.last is None else probe.last.shape[-1])
        self._hidden_bytes = 2 * math.prod(self._hidden)
        size = self._hidden_bytes + 4 * math.prod(self._last)
        self._data = _Rows(directory / "teacher.bin", windows, size)
        self._sums = _Rows(directory / "teacher.sums", windows, 4)
        _check_room(directory / "teacher.bin", windows * size)

    def read(self, number: int) -> States | None:
        checksum = self._sums.read(number)
        if not checksum.any():
            return None
        record = self._data.read(number)
        return self._states(record) if np.array_equal(_checksum(record), checksum) else None

    def write(self, number: int, states: States, place: int) -> States:
        """Keep sequence ``place`` of computed ``states``; returns them as :meth:`read` will."""
        parts = [_units(hidden[place]).cpu().to(torch.float16) for hidden in states.hidden]
        if self._last[1]:
            assert states.last is not None
            parts.append(states.last[place].float().cpu())
        record = np.concatenate([part.contiguous().numpy().view(np.uint8).reshape(-1) for part in parts])
        self._sums.write(number, np.zeros(4, np.uint8))
        self._data.write(number, record)
        self._sums.write(number, _checksum(record))
        return self._states(record)

    def _states(self, record: Record) -> States:
        hidden = torch.from_numpy(record[: self._hidden_bytes].view(np.float16)).view(self._hidden)
        last = torch.from_numpy(record[self._hidden_bytes :].view(np.float32)).view(self._last)
        return States(list(hidden), last if self._last[1] else None)


def _check_room(file: Path, nbytes: int) -> None:
    """SignbitError if the disk has not the room that the file will take once it is full."""
    left = nbytes - file.stat().st_blocks * 512
    free = shutil.disk_usage(file.parent).free
    if left > free:
        raise SignbitError(
            f"teacher_cache takes {left / 1e9:.1f} GB more, {file.parent} has {free / 1e9:.1f} GB left: "
            "make room, or set teacher_cache=false"
        )


class _Rows:
    """A file of bytes [rows, width], zero where nothing has been written; several processes may have it open.

    Opened for each row: that is nothing beside what a row saves, and there is nothing to be closed in the end.
    """

    def __init__(self, file: Path, rows: int, width: int) -> None:
        self._file, self._width = file, width
        with file.open("ab") as stream:
            stream.truncate(rows * width)

    def read(self, row: int) -> Record:
        with self._file.open("rb", buffering=0) as stream:
            stream.seek(row * self._width)
            data = bytearray(self._width)
            view, done = memoryview(data), 0
            while done < self._width and (count := stream.readinto(view[done:])):
                done += count
        return np.frombuffer(data, np.uint8)

    def write(self, row: int, record: Record) -> None:
        """OSError if there is no room."""
        with self._file.open("r+b") as stream:
            stream.seek(row * self._width)
            stream.write(record.data)


def _checksum(record: Record) -> Record:
    """As four bytes, never all zero."""
    return np.frombuffer((zlib.crc32(record.data) or 1).to_bytes(4, "little"), np.uint8)


def _units(states: Tensor) -> Tensor:
    return torch.nn.functional.normalize(states.float(), dim=-1)
