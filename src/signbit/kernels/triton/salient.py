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


def salient_slots(columns: Tensor, slots: Tensor, m: int) -> Tensor:
    """Of every column its place in the list of salient columns and in that of groups, -1 in both where it is not
    salient: int32 [2, m]."""
    places = torch.arange(len(columns), dtype=torch.int32, device=columns.device)
    nothing = torch.full((2, m), -1, dtype=torch.int32, device=columns.device)
    return nothing.index_copy_(1, columns.long(), torch.stack([places, slots]))
