"""Structured N:M: ranks are looked up in a table of the ways to keep N of M.

gemv goes through the kept weights, not through the columns: signs and regions are stored for these, in order, and each
fetches the activation at its column, which is the entry of a table of positions, four bits each. Pruned weights cost
nothing. gemm needs columns, since tl.dot does: a table of bit masks tells which are kept, and a population count which
kept weight a column holds, whose sign and region are then fetched from the cache.

Both make weights by the same function. At salient columns (``slots``) the region map holds signs of residuals.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from signbit.kernels.triton.launch import Form, Product, start_unpacking, words
from signbit.kernels.triton.salient import salient_columns, salient_slots
from signbit.kernels.triton.tiles import (
    added_up,
    bit_at,
    input_tile,
    multiply,
    signed,
    store,
    store_unpacked,
    sums,
    tile_to_unpack,
)
from signbit.layouts.ranks import choices, rank_bits
from signbit.layouts.structured import Structured


@triton.jit
def rank_at(ranks, rows, cell, width, mask, BITS: tl.constexpr):
    """Ranks of cells, int32; one may straddle two words."""
    if BITS == 0:
        return (rows + cell) * 0
    else:
        place = cell * BITS
        base = ranks + rows.to(tl.int64) * width + place // 32
        low = tl.load(base, mask, other=0).to(tl.uint32, bitcast=True).to(tl.uint64)
        straddles = mask & (place % 32 + BITS > 32)
        high = tl.load(base + 1, straddles, other=0).to(tl.uint32, bitcast=True).to(tl.uint64)
        both = (low | (high << 32)) >> (place % 32).to(tl.uint64)
        return (both & ((1 << BITS) - 1)).to(tl.int32)


@triton.jit
def trit_at(trits, rows, place, width, mask):
    """Trits anywhere, int32: digit ``place % 5`` of a byte read in base 3."""
    byte = tl.load(trits + rows.to(tl.int64) * width + place // 5, mask, other=0).to(tl.int32)
    digit = place % 5
    byte = tl.where(digit >= 4, byte // 81, byte)
    byte = tl.where(digit == 3, byte // 27, byte)
    byte = tl.where(digit == 2, byte // 9, byte)
    byte = tl.where(digit == 1, byte // 3, byte)
    return byte % 3


@triton.jit
def kept_values(
    signs, regions, scales, means, salient_scales, salient_means, rows, kept, group, slot, mask,
    width, region_width, groups, salient_groups,
    REGIONS: tl.constexpr, MEAN: tl.constexpr, SALIENT: tl.constexpr,
):  # fmt: skip
    """Values of kept weights, float32, zero where ``mask`` is false; ``rows`` is [BLOCK_N, 1]."""
    bits = bit_at(signs, rows, kept, width, mask)
    book = (rows.to(tl.int64) * groups + group) * REGIONS
    region = kept * 0
    if REGIONS == 2:
        region = bit_at(regions, rows, kept, region_width, mask)
    elif REGIONS == 3:
        region = trit_at(regions, rows, kept, region_width, mask)
    ordinary = mask
    if SALIENT:
        ordinary = mask & (slot < 0)
    values = signed(bits, tl.load(scales + book + region, ordinary, other=0.0).to(tl.float32))
    if MEAN:
        values += tl.load(means + book + region, ordinary, other=0.0).to(tl.float32)
    if SALIENT:
        salient = mask & (slot >= 0)
        beside = rows.to(tl.int64) * salient_groups + slot
        first = tl.load(salient_scales + 2 * beside, salient, other=0.0).to(tl.float32)
        correction = tl.load(salient_scales + 2 * beside + 1, salient, other=0.0).to(tl.float32)
        values += signed(bits, first) + signed(region, correction)
        if MEAN:
            values += tl.load(salient_means + beside, salient, other=0.0).to(tl.float32)
    return values


@triton.jit
def gemv(
    x, y, signs, regions, ranks, table, scales, means, salient_scales, salient_means, slots,
    tokens, n, m, kept_count, width, region_width, rank_width, groups, salient_groups,
    KEEP: tl.constexpr, OF: tl.constexpr, BITS: tl.constexpr, GROUP: tl.constexpr, REGIONS: tl.constexpr,
    MEAN: tl.constexpr, SALIENT: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_T: tl.constexpr, DOT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    rows = (tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N))[:, None]
    token = tl.program_id(1) * BLOCK_T + tl.arange(0, BLOCK_T)
    total = tl.zeros((BLOCK_T, BLOCK_N, BLOCK_K), tl.float32)
    for start in range(0, kept_count, BLOCK_K):
        kept = (start + tl.arange(0, BLOCK_K))[None, :]
        cell = kept // KEEP
        mask = (rows < n) & (kept < kept_count)
        ways = tl.load(table + rank_at(ranks, rows, cell, rank_width, mask, BITS), mask, other=0)
        column = cell * OF + ((ways >> (kept % KEEP * 4).to(tl.int64)) & 15).to(tl.int32)
        mask = mask & (column < m)
        slot = tl.load(slots + column, mask, other=-1) if SALIENT else column
        group = column * 0 if GROUP == 0 else cell * OF // GROUP
        weights = kept_values(
            signs, regions, scales, means, salient_scales, salient_means, rows, kept, group, slot, mask,
            width, region_width, groups, salient_groups, REGIONS, MEAN, SALIENT,
        )  # fmt: skip
        place = token[:, None, None].to(tl.int64) * m + column[None, :, :]
        inputs = tl.load(x + place, (token < tokens)[:, None, None] & mask[None, :, :], other=0.0).to(tl.float32)
        total += weights[None, :, :] * inputs
    result = tl.trans(tl.sum(total, 2))
    first = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    store(y, result, first, first < n, token, tokens, n)


@triton.jit
def columns_tile(
    signs, regions, ranks, table, scales, means, salient_scales, salient_means, slots, rows, start,
    n, m, width, region_width, rank_width, groups, salient_groups,
    KEEP: tl.constexpr, OF: tl.constexpr, BITS: tl.constexpr, GROUP: tl.constexpr, REGIONS: tl.constexpr,
    MEAN: tl.constexpr, SALIENT: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """Weights of columns ``start ..``, float32 [BLOCK_N, BLOCK_K]; ``rows`` is [BLOCK_N, 1]."""
    column = (start + tl.arange(0, BLOCK_K))[None, :]
    cell = column // OF
    mask = (rows < n) & (column < m)
    ways = tl.load(table + rank_at(ranks, rows, cell, rank_width, mask, BITS), mask, other=0)
    mask = mask & (((ways >> (column % OF)) & 1) != 0)
    # How many kept columns of the cell come before: bits counted in pairs, fours, eights and sixteens.
    before = ways & ((1 << (column % OF)) - 1)
    before = before - ((before >> 1) & 0x5555)
    before = (before & 0x3333) + ((before >> 2) & 0x3333)
    before = (before + (before >> 4)) & 0x0F0F
    kept = cell * KEEP + ((before + (before >> 8)) & 31)
    slot = tl.load(slots + column, mask, other=-1) if SALIENT else column
    group = column * 0 if GROUP == 0 else column // GROUP
    return kept_values(
        signs, regions, scales, means, salient_scales, salient_means, rows, kept, group, slot, mask,
        width, region_width, groups, salient_groups, REGIONS, MEAN, SALIENT,
    )  # fmt: skip


@triton.jit
def gemm(
    x, y, signs, regions, ranks, table, scales, means, salient_scales, salient_means, slots,
    tokens, n, m, kept_count, width, region_width, rank_width, groups, salient_groups,
    KEEP: tl.constexpr, OF: tl.constexpr, BITS: tl.constexpr, GROUP: tl.constexpr, REGIONS: tl.constexpr,
    MEAN: tl.constexpr, SALIENT: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_T: tl.constexpr, DOT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    first = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    token = tl.program_id(1) * BLOCK_T + tl.arange(0, BLOCK_T)
    total = sums(BLOCK_T, BLOCK_N, BLOCK_K, DOT)
    for start in range(0, m, BLOCK_K):
        columns = start + tl.arange(0, BLOCK_K)
        inputs = input_tile(x, token, tokens, columns, columns < m, m)
        weights = columns_tile(
            signs, regions, ranks, table, scales, means, salient_scales, salient_means, slots, first[:, None], start,
            n, m, width, region_width, rank_width, groups, salient_groups,
            KEEP, OF, BITS, GROUP, REGIONS, MEAN, SALIENT, BLOCK_K,
        )  # fmt: skip
        total = multiply(total, weights, inputs, DOT, PRECISION)
    store(y, added_up(total, DOT), first, first < n, token, tokens, n)


@triton.jit
def unpack(
    dense, signs, regions, ranks, table, scales, means, salient_scales, salient_means, slots,
    first, stop, n, m, kept_count, width, region_width, rank_width, groups, salient_groups,
    KEEP: tl.constexpr, OF: tl.constexpr, BITS: tl.constexpr, GROUP: tl.constexpr, REGIONS: tl.constexpr,
    MEAN: tl.constexpr, SALIENT: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    rows, _, start = tile_to_unpack(first, stop, BLOCK_N, BLOCK_K)
    weights = columns_tile(
        signs, regions, ranks, table, scales, means, salient_scales, salient_means, slots, rows[:, None], start,
        stop, m, width, region_width, rank_width, groups, salient_groups,
        KEEP, OF, BITS, GROUP, REGIONS, MEAN, SALIENT, BLOCK_K,
    )  # fmt: skip
    store_unpacked(dense, weights, rows, first, stop, start, m, BLOCK_K)


@cache
def _tables(keep: int, of: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Of each rank: the columns kept, as numbers of four bits (int64) and as a bit mask (int32)."""
    ways = choices(keep, of)
    columns = ways.nonzero()[:, 1].view(len(ways), keep)
    positions = (columns << (4 * torch.arange(keep))).sum(1)
    masks = (ways << torch.arange(of)).sum(1).int()
    return positions.to(device), masks.to(device)


def prepare(layout: Structured) -> Product:
    spec = layout.spec
    named = dict(layout.named_buffers())
    signs, ranks, scales = words(layout.signs), words(layout.ranks), layout.scales
    regions = named["regions"] if spec.regions == 3 else words(named["regions"]) if spec.regions == 2 else signs
    slots, some = signs, spec.salient_columns > 0
    if some:
        marked = salient_columns(named["salient"], spec.shape[1], spec.salient_columns, spec.group_size)
        slots = salient_slots(*marked, spec.shape[1])[1]
    positions, masks = _tables(spec.keep, spec.of, layout.device)
    coefficients = (scales, *(named.get(name, scales) for name in ("means", "salient_scales", "salient_means")), slots)
    sizes = (
        *spec.shape,
        spec.kept,
        signs.shape[1],
        regions.shape[1],
        ranks.shape[1],
        scales.shape[1],
        spec.salient_groups,
    )
    constants: dict[str, Any] = {
        "KEEP": spec.keep,
        "OF": spec.of,
        "BITS": rank_bits(spec.keep, spec.of),
        "GROUP": spec.group_size,
        "REGIONS": spec.regions,
        "MEAN": spec.mean,
        "SALIENT": some,
    }

    def run(x: Tensor, y: Tensor, form: Form) -> None:
        kernel, table = (gemv, positions) if form.dot is None else (gemm, masks)
        tensors = (x, y, signs, regions, ranks, table, *coefficients)
        form.launch(kernel, tensors, sizes, constants)

    def dense(into: Tensor, first: int) -> None:
        start_unpacking(unpack, into, first, (signs, regions, ranks, masks, *coefficients), sizes, constants)

    return Product("structured", spec.shape, scales.dtype == torch.bfloat16, run, dense)
