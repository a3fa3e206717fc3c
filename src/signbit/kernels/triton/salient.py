"""Salient columns: which they are, and which of the stored groups of coefficients each uses.

A layout keeps them as one bit a column, and their coefficients only for groups that have any. Kernels take lists, which
are made here when a layout is prepared, by operations whose shapes follow from the spec: nothing waits for the device.
"""

from __future__ import annotations

import torch
from torch import Tensor

from signbit.layouts.bits import unpack_bits


def salient_columns(salient: Tensor, m: int, count: int, group_size: int) -> tuple[Tensor, Tensor]:
    """The ``count`` salient columns in order, and each one's place among the groups that have some: int32 [count]."""
    columns = torch.argsort((~unpack_bits(salient, m)).to(torch.uint8), stable=True)[:count]
    group = columns // (group_size or m)
    steps = (group[1:] != group[:-1]).int()
    return columns.int(), torch.nn.functional.pad(steps, (1, 0)).cumsum(0, dtype=torch.int32)[:count]


def salient_slots(salient: Tensor, m: int, count: int, group_size: int) -> Tensor:
    """The same for every column, -1 where it is not salient: int32 [m]."""
    columns, places = salient_columns(salient, m, count, group_size)
    return torch.full((m,), -1, dtype=torch.int32, device=salient.device).index_copy_(0, columns.long(), places)
