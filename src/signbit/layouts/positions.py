"""Where a few marked weights of a matrix are: a bitmap, or the gaps between them, whichever is smaller.

The rows are cut into *strips* of 16. The weights of a strip, row after row, make one sequence, and its marked ones
are stored as the number of unmarked weights before each. A gap is a number of ``gap_bits`` bits; the largest,
2^gap_bits - 1, is an escape: so many unmarked weights and no mark, the rest of the gap follows. What is after the last
marked weight of a strip is not stored.

Gaps are bit planes, so that any of them can be read by itself, and ``ends`` says where each strip's are: a strip is
decoded without looking at any other, by one prefix sum over its gaps. Sixteen rows share one entry of ``ends``, which
in narrow matrices would otherwise be a tenth of the whole.

This takes within a few percent of the entropy (docs/methods/pb-llm.md has a table) where the marks are scattered. A
bitmap, one bit a weight in rows like those of signs, is smaller when more than about a third is marked, and is always
faster; it is ``gap_bits`` 0.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from signbit.layouts.bits import pack_bits, pack_integers, packed_width, unpack_bits, unpack_integers

STRIP_ROWS = 16
MAX_GAP_BITS = 16


def strip_count(rows: int) -> int:
    return -(-rows // STRIP_ROWS)


@dataclass(frozen=True)
class Positions:
    """Marked weights as they are stored.

    gap_bits: 0 for a bitmap; gaps: how many gaps are stored, escapes included; stream: uint8, the bitmap
    [n, packed_width(m)] or the gaps [gap_bits, packed_width(gaps)]; ends: int32 [strips, 1 or 2], how many marked
    weights, and how many gaps unless it is a bitmap, there are up to the end of each strip.

    places, which is not stored: the marked weights as i m + j, int64, ascending.
    """

    gap_bits: int
    gaps: int
    stream: Tensor
    ends: Tensor
    places: Tensor


def encode(marked: Tensor) -> Positions:
    """The smallest storage of bool ``[n, m]``."""
    n, m = marked.shape
    width = STRIP_ROWS * m
    places = marked.flatten().nonzero().squeeze(1)
    strip = places // max(width, 1)
    before = torch.nn.functional.pad(places[:-1], (1, 0), value=-1)[: len(places)]
    gap = places - before.maximum(strip * width - 1) - 1
    per_strip = torch.bincount(strip, minlength=strip_count(n))
    counts = torch.bincount(gap)
    lengths = torch.arange(len(counts), device=marked.device)
    sizes = {
        bits: bits * packed_width(len(gap) + int((counts * (lengths // _escape(bits))).sum()))
        for bits in range(2, MAX_GAP_BITS + 1)
    }
    gap_bits = min(sizes, key=lambda bits: sizes[bits])
    if n * packed_width(m) <= sizes[gap_bits] + 4 * strip_count(n):
        return Positions(0, 0, pack_bits(marked), per_strip.cumsum(0).int().unsqueeze(1), places)
    escapes = gap // _escape(gap_bits)
    last = (escapes + 1).cumsum(0) - 1
    count = len(gap) + int(escapes.sum())
    symbols = torch.full((count,), _escape(gap_bits), dtype=torch.int32, device=marked.device)
    symbols[last] = (gap - escapes * _escape(gap_bits)).int()
    gaps_per_strip = per_strip + torch.zeros_like(per_strip).index_add_(0, strip, escapes)
    ends = torch.stack([per_strip, gaps_per_strip], dim=1).cumsum(0).int()
    return Positions(gap_bits, count, pack_integers(symbols, gap_bits), ends, places)


def decode_bitmap(stream: Tensor, columns: int) -> tuple[Tensor, Tensor]:
    """Marked weights of whole strips of a bitmap, in order: their strip, and row * columns + column in it."""
    place = unpack_bits(stream, columns).flatten().nonzero().squeeze(1)
    strip = place // (STRIP_ROWS * columns)
    return strip, place - strip * (STRIP_ROWS * columns)


def decode_gaps(planes: Tensor, start: int, stop: int, per_strip: Tensor) -> tuple[Tensor, Tensor]:
    """The same from the gaps ``start .. stop``, of which each strip has so many as ``per_strip`` [strips] says."""
    symbols = unpack_integers(planes, start, stop).long()
    marks = symbols != _escape(len(planes))
    passed = (symbols + marks).cumsum(0)
    # What was passed before a strip is none of its business.
    first = per_strip.cumsum(0) - per_strip
    before = torch.nn.functional.pad(passed, (1, 0)).index_select(0, first)
    strips = torch.arange(len(per_strip), device=planes.device)
    found = marks.nonzero().squeeze(1)
    strip = strips.repeat_interleave(per_strip, output_size=stop - start).index_select(0, found)
    return strip, passed.index_select(0, found) - before.index_select(0, strip) - 1


def _escape(gap_bits: int) -> int:
    return 2**gap_bits - 1
