"""Which N of every M columns are kept, as combinatorial ranks.

There are C = binomial(M, N) ways to keep N of M. Read as an integer of M bits, bit j set where column j is kept, they
have an order; the place of a choice in it, from 0, is its rank, and takes ceil(log2 C) bits: 7 for 4 of 8, 5 for 2 of
8, 2 for 1 of 4. A bitmap takes M bits, which is always more: C <= 2^(M-1). What is left to win is the last fraction of
a bit: 4 of 8 has an entropy of at most 6.13.

A row's ranks follow each other, each with its lowest bit first, as one row of bits.
"""

from __future__ import annotations

import math
from functools import cache

import torch
from torch import Tensor

from signbit.layouts.bits import pack_bits, unpack_floats

MAX_OF = 16  # 12,870 ways to keep 8 of 16: still a small table


def rank_count(keep: int, of: int) -> int:
    """How many ways there are to keep ``keep`` of ``of``."""
    return math.comb(of, keep)


def rank_bits(keep: int, of: int) -> int:
    """Bits of one rank; 0 if there is only one way."""
    return (rank_count(keep, of) - 1).bit_length()


@cache
def choices(keep: int, of: int) -> Tensor:
    """All ways to keep ``keep`` of ``of``, in the order of their ranks: bool [C, of]."""
    kept = (torch.arange(1 << of).unsqueeze(1) >> torch.arange(of)) & 1
    return kept[kept.sum(1) == keep].bool()


def rank(kept: Tensor, keep: int) -> Tensor:
    """Ranks [...] of bool [..., of] with ``keep`` kept each."""
    powers = 1 << torch.arange(kept.shape[-1], device=kept.device)
    known = (choices(keep, kept.shape[-1]).to(kept.device) * powers).sum(1)
    return torch.searchsorted(known, (kept * powers).sum(-1))


def pack_ranks(ranks: Tensor, bits: int) -> Tensor:
    """Pack int64 ``[n, q]``, each below 2^bits, into uint8 ``[n, packed_width(q * bits)]``."""
    return pack_bits(((ranks.unsqueeze(-1) >> torch.arange(bits, device=ranks.device)) & 1).bool().flatten(1))


def unpack_ranks(packed: Tensor, count: int, bits: int) -> Tensor:
    """The ``count`` ranks of each row, int64 ``[n, count]``."""
    digits = unpack_floats(packed, count * bits, 0.0, 1.0).reshape(len(packed), count, bits)
    return (digits @ (2.0 ** torch.arange(bits, device=packed.device))).long()
