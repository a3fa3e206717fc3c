"""Split planes: two bits a weight, and a few salient columns whose weights carry a residual.

The salient columns come second. Their activations are zero in the loop over all columns, whose weights then need not
know of them, and a loop of their own, over the list of them, does the rest: a few percent of the columns, whose bits
are fetched one by one. Unpacking makes those of a tile beside it, and
puts them in their places.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from signbit.kernels.triton.launch import Form, Product, start_unpacking
from signbit.kernels.triton.salient import SOME, at_salient, salient_before, salient_columns
from signbit.kernels.triton.tiles import (
    added_up,
    bit_at,
    bit_tile,
    group_tile,
    input_tile,
    multiply,
    signed,
    store,
    store_unpacked,
    sums,
    tile_to_unpack,
)
from signbit.layouts.bits import words
from signbit.layouts.split_planes import SplitPlanes


@triton.jit
def ordinary_tile(
    signs, second, scales, means, column_scales, rows, inside, start, m, width, groups,
    GROUP: tl.constexpr, MEAN: tl.constexpr, COLUMNS: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """Weights as if no column were salient, float32 [BLOCK_N, BLOCK_K]."""
    sparse = bit_tile(second, rows, inside, start, width, BLOCK_N, BLOCK_K) != 0
    scale = group_tile(scales, rows, inside, start, m, 2 * groups, 2, GROUP, BLOCK_N, BLOCK_K)
    sparse_scale = group_tile(scales + 1, rows, inside, start, m, 2 * groups, 2, GROUP, BLOCK_N, BLOCK_K)
    if COLUMNS:
        columns = start + tl.arange(0, BLOCK_K)
        scale *= tl.load(column_scales + columns, columns < m, other=0.0).to(tl.float32)[None, :]
        sparse_scale *= tl.load(column_scales + m + columns, columns < m, other=0.0).to(tl.float32)[None, :]
    bits = bit_tile(signs, rows, inside, start, width, BLOCK_N, BLOCK_K)
    weights = signed(bits, tl.where(sparse, sparse_scale, scale))
    if MEAN:
        mean = group_tile(means, rows, inside, start, m, 2 * groups, 2, GROUP, BLOCK_N, BLOCK_K)
        sparse_mean = group_tile(means + 1, rows, inside, start, m, 2 * groups, 2, GROUP, BLOCK_N, BLOCK_K)
        weights += tl.where(sparse, sparse_mean, mean)
    return weights


@triton.jit
def salient_tile(
    signs, second, residual, scales, means, column_scales, rows, place, columns, slot, mask,
    width, residual_width, salient_groups, count, BITMAP: tl.constexpr, MEAN: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """Weights of salient columns, float32; ``rows`` and the rest, which is of columns, broadcast to ``mask``."""
    bits = bit_at(signs, rows, columns, width, mask)
    other = bit_at(second, rows, columns, width, mask)
    if BITMAP:
        zone = other
        other = bit_at(residual, rows, place, residual_width, mask)
        book = (rows.to(tl.int64) * salient_groups + slot) * 2 + zone
        of_column = zone * 2 * count + place
    else:
        book = rows.to(tl.int64) * salient_groups + slot
        of_column = place
    first = tl.load(scales + 2 * book, mask, other=0.0).to(tl.float32)
    correction = tl.load(scales + 2 * book + 1, mask, other=0.0).to(tl.float32)
    if COLUMNS:
        first *= tl.load(column_scales + of_column, mask, other=0.0).to(tl.float32)
        correction *= tl.load(column_scales + of_column + count, mask, other=0.0).to(tl.float32)
    weights = signed(bits, first) + signed(other, correction)
    if MEAN:
        weights += tl.load(means + book, mask, other=0.0).to(tl.float32)
    return weights


@triton.jit
def kernel(
    x, y, signs, second, residual, salient, scales, means, column_scales,
    salient_scales, salient_means, salient_column_scales, salient_list, slots,
    tokens, n, m, width, groups, residual_width, salient_groups, count,
    GROUP: tl.constexpr, BITMAP: tl.constexpr, MEAN: tl.constexpr, COLUMNS: tl.constexpr, SALIENT: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_T: tl.constexpr, DOT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    rows = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    token = tl.program_id(1) * BLOCK_T + tl.arange(0, BLOCK_T)
    inside = rows < n
    total = sums(BLOCK_T, BLOCK_N, BLOCK_K, DOT)
    for start in range(0, m, BLOCK_K):
        columns = start + tl.arange(0, BLOCK_K)
        mask = columns < m
        if SALIENT:
            mask = mask & (bit_at(salient, columns * 0, columns, width, mask) == 0)
        inputs = input_tile(x, token, tokens, columns, mask, m)
        weights = ordinary_tile(
            signs, second, scales, means, column_scales, rows, inside, start, m, width, groups,
            GROUP, MEAN, COLUMNS, BLOCK_N, BLOCK_K,
        )  # fmt: skip
        total = multiply(total, weights, inputs, DOT, PRECISION)
    if SALIENT:
        for start in range(0, count, BLOCK_K):
            place = start + tl.arange(0, BLOCK_K)
            here = place < count
            columns = tl.load(salient_list + place, here, other=0)
            slot = tl.load(slots + place, here, other=0)
            inputs = input_tile(x, token, tokens, columns, here, m)
            weights = salient_tile(
                signs, second, residual, salient_scales, salient_means, salient_column_scales,
                rows[:, None], place[None, :], columns[None, :], slot[None, :], inside[:, None] & here[None, :],
                width, residual_width, salient_groups, count, BITMAP, MEAN, COLUMNS,
            )  # fmt: skip
            total = multiply(total, weights, inputs, DOT, PRECISION)
    store(y, added_up(total, DOT), rows, inside, token, tokens, n)


@triton.jit
def unpack(
    dense, signs, second, residual, scales, means, column_scales,
    salient_scales, salient_means, salient_column_scales, salient_list, slots, before,
    first, stop, n, m, width, groups, residual_width, salient_groups, count,
    GROUP: tl.constexpr, BITMAP: tl.constexpr, MEAN: tl.constexpr, COLUMNS: tl.constexpr, SALIENT: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    rows, inside, start = tile_to_unpack(first, stop, BLOCK_N, BLOCK_K)
    weights = ordinary_tile(
        signs, second, scales, means, column_scales, rows, inside, start, m, width, groups,
        GROUP, MEAN, COLUMNS, BLOCK_N, BLOCK_K,
    )  # fmt: skip
    if SALIENT:
        last = tl.load(before + tl.minimum(start + BLOCK_K, m))
        for begin in range(tl.load(before + start), last, SOME):
            place = begin + tl.arange(0, SOME)
            here = place < last
            columns = tl.load(salient_list + place, here, other=0)
            slot = tl.load(slots + place, here, other=0)
            values = salient_tile(
                signs, second, residual, salient_scales, salient_means, salient_column_scales,
                rows[None, :], place[:, None], columns[:, None], slot[:, None], inside[None, :] & here[:, None],
                width, residual_width, salient_groups, count, BITMAP, MEAN, COLUMNS,
            )  # fmt: skip
            weights = at_salient(values, weights, before, begin, start, m, BLOCK_N, BLOCK_K)
    store_unpacked(dense, weights, rows, first, stop, start, m, BLOCK_K)


def prepare(layout: SplitPlanes) -> Product:
    spec = layout.spec
    signs = words(layout.signs)
    residual = words(layout.get_buffer("residual")) if spec.bitmap else signs

    def optional(name: str) -> Tensor:
        return dict(layout.named_buffers()).get(name, layout.scales)

    columns, slots = salient_columns(layout.salient, spec.shape[1], spec.salient_columns, spec.group_size)
    planes = (signs, words(layout.second), residual)
    coefficients = (
        layout.scales,
        *(optional(name) for name in ("means", "column_scales")),
        layout.salient_scales,
        *(optional(name) for name in ("salient_means", "salient_column_scales")),
    )
    to_multiply = (*planes, words(layout.salient), *coefficients, columns, slots)
    to_unpack = (*planes, *coefficients, columns, slots, salient_before(layout.salient, spec.shape[1]))
    groups = layout.scales.shape[1]
    sizes = (*spec.shape, signs.shape[1], groups, residual.shape[1], spec.salient_groups, spec.salient_columns)
    constants: dict[str, Any] = {
        "GROUP": spec.group_size,
        "BITMAP": spec.bitmap,
        "MEAN": spec.mean,
        "COLUMNS": spec.column_scales,
        "SALIENT": spec.salient_columns > 0,
    }

    def run(x: Tensor, y: Tensor, form: Form) -> None:
        form.launch(kernel, (x, y, *to_multiply), sizes, constants)

    def dense(into: Tensor, first: int) -> None:
        start_unpacking(unpack, into, first, to_unpack, sizes, constants)

    return Product("split_planes", spec.shape, layout.scales.dtype == torch.bfloat16, run, dense)
