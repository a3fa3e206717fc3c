"""Salient columns: which they are, and which of the stored groups of coefficients each uses.

A layout keeps them as one bit a column, and their coefficients only for groups that have any. Kernels take lists, which
are made here when a layout is prepared, by operations whose shapes follow from the spec: nothing waits for the device.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from signbit.layouts.bits import unpack_bits

# Salient columns that unpacking takes at a time: a tile of 256 has 13, if they are 5 percent. They are fetched one by
# one, and are the first dimension of what is, along which Triton gives neighbours to neighbouring lanes.
SOME = tl.constexpr(32)


def salient_columns(salient: Tensor, m: int, count: int, group_size: int) -> tuple[Tensor, Tensor]:
    """The ``count`` salient columns in order, and each one's place among the groups that have some: int32 [count]."""
    columns = torch.argsort((~unpack_bits(salient, m)).to(torch.uint8), stable=True)[:count]
    group = columns // (group_size or m)
    steps = (group[1:] != group[:-1]).int()
    return columns.int(), torch.nn.functional.pad(steps, (1, 0)).cumsum(0, dtype=torch.int32)[:count]


def salient_slots(salient: Tensor, m: int, count: int, group_size: int) -> Tensor:
    """The same place for every column, -1 where it is not salient; and for every column that of its group, -1 where
    nothing in the group is salient: int32 [2, m]."""
    columns, places = salient_columns(salient, m, count, group_size)
    group = torch.arange(m, device=salient.device) // (group_size or m)
    of_groups = torch.full_like(group, -1, dtype=torch.int32).index_copy_(0, group[columns.long()], places)[group]
    return torch.stack([torch.full_like(of_groups, -1).index_copy_(0, columns.long(), places), of_groups])


def salient_before(salient: Tensor, m: int) -> Tensor:
    """How many salient columns come before each, and before the end: int32 [m + 1]."""
    return torch.nn.functional.pad(unpack_bits(salient, m).cumsum(0, dtype=torch.int32), (1, 0))


@triton.jit
def at_salient(values, others, before, begin, start, m, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr):
    """``values`` [SOME, BLOCK_N] of salient columns ``begin ..`` of the list, at those columns of a tile that they are
    of; ``others`` [BLOCK_N, BLOCK_K] elsewhere."""
    columns = start + tl.arange(0, BLOCK_K)
    place = tl.load(before + columns, columns < m, other=0)
    salient = tl.load(before + columns + 1, columns < m, other=0) > place
    here = salient & (place >= begin) & (place < begin + SOME)
    index = tl.broadcast_to(tl.where(here, place - begin, 0)[None, :], (BLOCK_N, BLOCK_K))
    return tl.where(here[None, :], tl.gather(tl.trans(values), index, 1), others)
