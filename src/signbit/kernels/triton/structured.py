"""Structured N:M: ranks are looked up in a table of the ways to keep N of M.

gemv goes through the kept weights, not through the columns: signs and regions are stored for these, in order, and each
fetches the activation at its column, which is the entry of a table of positions, four bits each. Pruned weights cost
nothing. gemm and unpacking need columns: a table of bit masks tells which are kept, and a population count which of the
kept weights of its cell a column holds. What a cell has is fetched once for all its columns, where these are 2, 4, 8 or
16 and cells are whole in a tile.

At salient columns (``slots``) the region map holds signs of residuals.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from signbit.kernels.triton.launch import Form, Product, start_unpacking
from signbit.kernels.triton.salient import salient_slots
from signbit.kernels.triton.tiles import (
    added_up,
    bit_at,
    group_tile,
    input_tile,
    multiply,
    signed,
    spread,
    store,
    store_unpacked,
    sums,
    tile_to_unpack,
)
from signbit.kernels.triton.tuning import Blocks
from signbit.layouts.bits import words
from signbit.layouts.ranks import choices, rank_bits
from signbit.layouts.structured import Structured

# Of unpacking: long tiles. Cells are fetched one by one, and Triton gives neighbours along the first dimension of a
# tile to neighbouring lanes: of 16 rows each would come from another line of memory.
_UNPACK = Blocks(rows=4, columns=1024, tokens=16, warps=4, stages=2)


@triton.jit
def field_at(fields, rows, cell, width, mask, BITS: tl.constexpr):
    """What cells have in rows of fields of BITS bits, up to 16, int32; one may straddle two words."""
    if BITS == 0:
        return (rows + cell) * 0
    else:
        place = cell * BITS
        base = fields + rows.to(tl.int64) * width + place // 32
        low = tl.load(base, mask, other=0).to(tl.uint32, bitcast=True).to(tl.uint64)
        straddles = mask & (place % 32 + BITS > 32) & (place // 32 + 1 < width)
        high = tl.load(base + 1, straddles, other=0).to(tl.uint32, bitcast=True).to(tl.uint64)
        both = (low | (high << 32)) >> (place % 32).to(tl.uint64)
        return (both & ((1 << BITS) - 1)).to(tl.int32)


@triton.jit
def trit_at(trits, rows, place, width, mask):
    """Trits anywhere, int32: digit ``place % 5`` of a byte read in base 3."""
    inside = mask & (place // 5 < width)
    byte = tl.load(trits + rows.to(tl.int64) * width + place // 5, inside, other=0).to(tl.int32)
    digit = place % 5
    # 2^16 / 3^digit, rounded up, divides any byte exactly; division would take several times as long.
    inverse = tl.where(digit == 1, 21846, 65536)
    inverse = tl.where(digit == 2, 7282, inverse)
    inverse = tl.where(digit == 3, 2428, inverse)
    inverse = tl.where(digit == 4, 810, inverse)
    byte = (byte * inverse) >> 16
    return byte - 3 * ((byte * 21846) >> 16)


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
        ways = tl.load(table + field_at(ranks, rows, cell, rank_width, mask, BITS), mask, other=0)
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
def region_tile(
    table, region, rows, inside, start, m, groups,
    GROUP: tl.constexpr, REGIONS: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """Coefficients of groups, of the region of each weight."""
    found = group_tile(table, rows, inside, start, m, groups * REGIONS, REGIONS, GROUP, BLOCK_N, BLOCK_K)
    for other in tl.static_range(1, REGIONS):
        others = group_tile(table + other, rows, inside, start, m, groups * REGIONS, REGIONS, GROUP, BLOCK_N, BLOCK_K)
        found = tl.where(region == other, others, found)
    return found


@triton.jit
def columns_tile(
    signs, regions, ranks, table, scales, means, salient_scales, salient_means, slots, rows, inside, start,
    m, width, region_width, rank_width, groups, salient_groups,
    KEEP: tl.constexpr, OF: tl.constexpr, BITS: tl.constexpr, GROUP: tl.constexpr, REGIONS: tl.constexpr,
    MEAN: tl.constexpr, SALIENT: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """Weights of columns ``start ..``, float32 [BLOCK_N, BLOCK_K]."""
    PER: tl.constexpr = OF if OF & (OF - 1) == 0 else 1
    row = rows[:, None]
    cell = ((start + PER * tl.arange(0, BLOCK_K // PER)) // OF)[None, :]
    mask = inside[:, None] & (cell * OF < m)
    ways = tl.load(table + field_at(ranks, row, cell, rank_width, mask, BITS), mask, other=0)
    ways = spread(ways, PER, BLOCK_N, BLOCK_K)
    bits = spread(field_at(signs, row, cell, width, mask, KEEP), PER, BLOCK_N, BLOCK_K)
    column = (start + tl.arange(0, BLOCK_K))[None, :]
    place = column % OF
    kept = inside[:, None] & (column < m) & (((ways >> place) & 1) != 0)
    # How many kept columns of the cell come before: bits counted in pairs, fours, eights and sixteens.
    before = ways & ((1 << place) - 1)
    before = before - ((before >> 1) & 0x5555)
    before = (before & 0x3333) + ((before >> 2) & 0x3333)
    before = (before + (before >> 4)) & 0x0F0F
    before = (before + (before >> 8)) & 31
    bits = (bits >> before) & 1
    region = bits * 0
    if REGIONS == 2:
        region = spread(field_at(regions, row, cell, region_width, mask, KEEP), PER, BLOCK_N, BLOCK_K)
        region = (region >> before) & 1
    elif REGIONS == 3:
        codes = cell * 0
        for index in tl.static_range(KEEP):
            codes += trit_at(regions, row, cell * KEEP + index, region_width, mask) << (2 * index)
        region = (spread(codes, PER, BLOCK_N, BLOCK_K) >> (2 * before)) & 3
    values = signed(bits, region_tile(scales, region, rows, inside, start, m, groups, GROUP, REGIONS, BLOCK_N, BLOCK_K))
    if MEAN:
        values += region_tile(means, region, rows, inside, start, m, groups, GROUP, REGIONS, BLOCK_N, BLOCK_K)
    if SALIENT:
        SHARED: tl.constexpr = 32 if GROUP % 32 == 0 else 1
        shared = start + SHARED * tl.arange(0, BLOCK_K // SHARED)
        slot = tl.load(slots + m + shared, shared < m, other=-1)[None, :]
        mask = inside[:, None] & (slot >= 0)
        book = row.to(tl.int64) * salient_groups + slot
        first = tl.load(salient_scales + 2 * book, mask, other=0.0).to(tl.float32)
        correction = tl.load(salient_scales + 2 * book + 1, mask, other=0.0).to(tl.float32)
        beside = signed(bits, spread(first, SHARED, BLOCK_N, BLOCK_K))
        beside += signed(region, spread(correction, SHARED, BLOCK_N, BLOCK_K))
        if MEAN:
            mean = tl.load(salient_means + book, mask, other=0.0).to(tl.float32)
            beside += spread(mean, SHARED, BLOCK_N, BLOCK_K)
        values = tl.where(tl.load(slots + column, column < m, other=-1) >= 0, beside, values)
    return tl.where(kept, values, 0.0)


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
            signs, regions, ranks, table, scales, means, salient_scales, salient_means, slots, first, first < n, start,
            m, width, region_width, rank_width, groups, salient_groups,
            KEEP, OF, BITS, GROUP, REGIONS, MEAN, SALIENT, BLOCK_N, BLOCK_K,
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
    rows, inside, start = tile_to_unpack(first, stop, BLOCK_N, BLOCK_K)
    weights = columns_tile(
        signs, regions, ranks, table, scales, means, salient_scales, salient_means, slots, rows, inside, start,
        m, width, region_width, rank_width, groups, salient_groups,
        KEEP, OF, BITS, GROUP, REGIONS, MEAN, SALIENT, BLOCK_N, BLOCK_K,
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
        slots = salient_slots(named["salient"], spec.shape[1], spec.salient_columns, spec.group_size)
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
        start_unpacking(unpack, into, first, (signs, regions, ranks, masks, *coefficients), sizes, constants, _UNPACK)

    return Product("structured", spec.shape, scales.dtype == torch.bfloat16, run, dense)
