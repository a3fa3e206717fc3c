"""Haar planes: coefficients are multiplied, never weights.

The transform H is its own inverse and symmetric, so it moves from the weights to what is around them:

    row axis       W = C H + H S (salient columns)    y = C (H x) + H (S x_salient)
    column axis    W = H C                            y = H (C x)

Activations are transformed as they are loaded, both of a pair and one sum or difference; outputs as they are stored,
when a program has whole pairs of rows in registers. Unpacked are weights, after all: a program makes the upper and the
lower rows of its pairs side by side, and pairs of columns are neighbours in its registers.
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
)
from signbit.layouts.bits import words
from signbit.layouts.haar_planes import HaarPlanes

ROOT_HALF = tl.constexpr(0.5**0.5)


@triton.jit
def haar_inputs(x, token, tokens, columns, m, GROUP: tl.constexpr):
    """H x at some columns; pairs do not reach over the end of a group."""
    if GROUP == 0:
        inner = columns
        end = columns * 0 + m
    else:
        inner = columns % GROUP
        end = tl.minimum(columns - inner + GROUP, m)
    high = inner % 2
    left = columns - high
    paired = left + 1 < end
    first = input_tile(x, token, tokens, left, columns < m, m)
    second = input_tile(x, token, tokens, left + 1, paired, m)
    both = tl.where((high == 1)[None, :], first - second, first + second) * ROOT_HALF
    return tl.where(paired[None, :], both, first)


@triton.jit
def haar_pairs(a, b, paired):
    """H of pairs (a, b); a stays as it is where nothing is its pair."""
    return tl.where(paired, (a + b) * ROOT_HALF, a), (a - b) * ROOT_HALF


@triton.jit
def haar_columns(values, start, m, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr):
    """H over the columns ``start ..`` of [BLOCK_N, BLOCK_K]; groups and BLOCK_K are even."""
    a, b = tl.split(tl.reshape(values, (BLOCK_N, BLOCK_K // 2, 2)))
    low, high = haar_pairs(a, b, (start + 2 * tl.arange(0, BLOCK_K // 2) + 1 < m)[None, :])
    return tl.reshape(tl.join(low, high), (BLOCK_N, BLOCK_K))


@triton.jit
def haar_rows(values, first, n, BLOCK_N: tl.constexpr, BLOCK_T: tl.constexpr):
    """H over the rows ``first ..`` of [BLOCK_N, BLOCK_T]; ``first`` and BLOCK_N are even."""
    pairs = tl.permute(tl.reshape(values, (BLOCK_N // 2, 2, BLOCK_T)), (0, 2, 1))
    a, b = tl.split(pairs)
    low, high = haar_pairs(a, b, (first + 2 * tl.arange(0, BLOCK_N // 2) + 1 < n)[:, None])
    return tl.reshape(tl.permute(tl.join(low, high), (0, 2, 1)), (BLOCK_N, BLOCK_T))


@triton.jit
def book_tile(
    table, rows, inside, start, m, groups, part,
    BANDS: tl.constexpr, PARTS: tl.constexpr, GROUP: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """Coefficient ``part`` of each column's codebook: of the low band at even places in a group, else of the high."""
    stride = BANDS * PARTS
    low = group_tile(table + part, rows, inside, start, m, groups * stride, stride, GROUP, BLOCK_N, BLOCK_K)
    if BANDS == 1:
        return low
    else:
        high = group_tile(
            table + PARTS + part, rows, inside, start, m, groups * stride, stride, GROUP, BLOCK_N, BLOCK_K
        )
        columns = start + tl.arange(0, BLOCK_K)
        if GROUP > 0:
            columns = columns % GROUP
        return tl.where((columns % 2 == 1)[None, :], high, low)


@triton.jit
def coefficients_tile(
    signs, second, scales, means, rows, inside, start, m, width, groups,
    GROUP: tl.constexpr, ROWS: tl.constexpr, MEANS: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """Coefficients C as if no column were salient, float32 [BLOCK_N, BLOCK_K]."""
    BANDS: tl.constexpr = 2 if ROWS else 1
    sparse = bit_tile(second, rows, inside, start, width, BLOCK_N, BLOCK_K) != 0
    scale = book_tile(scales, rows, inside, start, m, groups, 0, BANDS, 2, GROUP, BLOCK_N, BLOCK_K)
    sparse_scale = book_tile(scales, rows, inside, start, m, groups, 1, BANDS, 2, GROUP, BLOCK_N, BLOCK_K)
    bits = bit_tile(signs, rows, inside, start, width, BLOCK_N, BLOCK_K)
    values = signed(bits, tl.where(sparse, sparse_scale, scale))
    if MEANS == 1:
        values += book_tile(means, rows, inside, start, m, groups, 0, BANDS, 1, GROUP, BLOCK_N, BLOCK_K)
    elif MEANS == 2:
        mean = book_tile(means, rows, inside, start, m, groups, 0, BANDS, 2, GROUP, BLOCK_N, BLOCK_K)
        sparse_mean = book_tile(means, rows, inside, start, m, groups, 1, BANDS, 2, GROUP, BLOCK_N, BLOCK_K)
        values += tl.where(sparse, sparse_mean, mean)
    return values


@triton.jit
def salient_tile(signs, second, scales, means, rows, stored, slot, mask, width, groups, MEANS: tl.constexpr):
    """Coefficients of salient columns, float32, zero where ``mask`` is false; ``rows`` and columns broadcast to it."""
    bits = bit_at(signs, rows, stored, width, mask)
    zone = bit_at(second, rows, stored, width, mask)
    book = (rows.to(tl.int64) * groups + slot) * 2 + zone
    values = signed(bits, tl.load(scales + book, mask, other=0.0).to(tl.float32))
    if MEANS > 0:
        values += tl.load(means + book, mask, other=0.0).to(tl.float32)
    return values


@triton.jit
def kernel(
    x, y, signs, second, scales, means, salient, salient_signs, salient_second, salient_scales, salient_means,
    salient_list, slots, tokens, n, m, width, groups, salient_width, salient_groups, count,
    GROUP: tl.constexpr, ROWS: tl.constexpr, MEANS: tl.constexpr, SALIENT: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_T: tl.constexpr, DOT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    first = tl.program_id(0) * BLOCK_N
    rows = first + tl.arange(0, BLOCK_N)
    token = tl.program_id(1) * BLOCK_T + tl.arange(0, BLOCK_T)
    inside = rows < n
    total = sums(BLOCK_T, BLOCK_N, BLOCK_K, DOT)
    for start in range(0, m, BLOCK_K):
        columns = start + tl.arange(0, BLOCK_K)
        if ROWS:
            inputs = haar_inputs(x, token, tokens, columns, m, GROUP)
        else:
            mask = columns < m
            if SALIENT:
                mask = mask & (bit_at(salient, columns * 0, columns, width, mask) == 0)
            inputs = input_tile(x, token, tokens, columns, mask, m)
        weights = coefficients_tile(
            signs, second, scales, means, rows, inside, start, m, width, groups, GROUP, ROWS, MEANS, BLOCK_N, BLOCK_K
        )
        total = multiply(total, weights, inputs, DOT, PRECISION)
    result = added_up(total, DOT)
    if SALIENT:
        beside = sums(BLOCK_T, BLOCK_N, BLOCK_K, DOT)
        for start in range(0, count, BLOCK_K):
            place = start + tl.arange(0, BLOCK_K)
            here = place < count
            columns = tl.load(salient_list + place, here, other=0)
            slot = tl.load(slots + place, here, other=0)
            inputs = input_tile(x, token, tokens, columns, here, m)
            stored = place if ROWS else columns
            weights = salient_tile(
                salient_signs, salient_second, salient_scales, salient_means, rows[:, None], stored[None, :],
                slot[None, :], inside[:, None] & here[None, :], salient_width, salient_groups, MEANS,
            )  # fmt: skip
            beside = multiply(beside, weights, inputs, DOT, PRECISION)
        if ROWS:
            result += haar_rows(added_up(beside, DOT), first, n, BLOCK_N, BLOCK_T)
        else:
            result += added_up(beside, DOT)
    if not ROWS:
        result = haar_rows(result, first, n, BLOCK_N, BLOCK_T)
    store(y, result, rows, inside, token, tokens, n)


@triton.jit
def unpack(
    dense, signs, second, scales, means, salient_signs, salient_second, salient_scales, salient_means,
    salient_list, slots, before, first, stop, n, m, width, groups, salient_width, salient_groups, count,
    GROUP: tl.constexpr, ROWS: tl.constexpr, MEANS: tl.constexpr, SALIENT: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    PAIRS: tl.constexpr = BLOCK_N // 2
    start = tl.program_id(0) * BLOCK_K
    upper = first + tl.program_id(1) * BLOCK_N + 2 * tl.arange(0, PAIRS)
    lower = upper + 1
    paired = (lower < stop)[:, None]
    a = coefficients_tile(
        signs, second, scales, means, upper, upper < stop, start, m, width, groups, GROUP, ROWS, MEANS, PAIRS, BLOCK_K
    )
    b = coefficients_tile(
        signs, second, scales, means, lower, lower < stop, start, m, width, groups, GROUP, ROWS, MEANS, PAIRS, BLOCK_K
    )
    if ROWS:
        a = haar_columns(a, start, m, PAIRS, BLOCK_K)
        b = haar_columns(b, start, m, PAIRS, BLOCK_K)
    if SALIENT:
        last = tl.load(before + tl.minimum(start + BLOCK_K, m))
        for begin in range(tl.load(before + start), last, SOME):
            place = begin + tl.arange(0, SOME)
            here = (place < last)[:, None]
            stored = place if ROWS else tl.load(salient_list + place, place < last, other=0)
            slot = tl.load(slots + place, place < last, other=0)
            beside_a = salient_tile(
                salient_signs, salient_second, salient_scales, salient_means, upper[None, :], stored[:, None],
                slot[:, None], (upper < stop)[None, :] & here, salient_width, salient_groups, MEANS,
            )  # fmt: skip
            beside_b = salient_tile(
                salient_signs, salient_second, salient_scales, salient_means, lower[None, :], stored[:, None],
                slot[:, None], (lower < stop)[None, :] & here, salient_width, salient_groups, MEANS,
            )  # fmt: skip
            if ROWS:
                nothing = tl.zeros((PAIRS, BLOCK_K), tl.float32)
                beside_a, beside_b = haar_pairs(beside_a, beside_b, (lower < stop)[None, :])
                a += at_salient(beside_a, nothing, before, begin, start, m, PAIRS, BLOCK_K)
                b += at_salient(beside_b, nothing, before, begin, start, m, PAIRS, BLOCK_K)
            else:
                a = at_salient(beside_a, a, before, begin, start, m, PAIRS, BLOCK_K)
                b = at_salient(beside_b, b, before, begin, start, m, PAIRS, BLOCK_K)
    if not ROWS:
        a, b = haar_pairs(a, b, paired)
    store_unpacked(dense, a, upper, first, stop, start, m, BLOCK_K)
    store_unpacked(dense, b, lower, first, stop, start, m, BLOCK_K)


def prepare(layout: HaarPlanes) -> Product:
    spec = layout.spec
    named = dict(layout.named_buffers())
    signs, second, scales = words(named["signs"]), words(named["second"]), layout.scales
    rows, some = spec.axis == "row", spec.salient_columns > 0
    beside = rows and some
    salient_signs = words(named["salient_signs"]) if beside else signs
    salient_second = words(named["salient_second"]) if beside else second
    salient, columns, slots, before = signs, signs, signs, signs
    if some:
        salient = words(named["salient"])
        columns, slots = salient_columns(named["salient"], spec.shape[1], spec.salient_columns, spec.group_size)
        before = salient_before(named["salient"], spec.shape[1])
    coded = (signs, second, scales, named.get("means", scales))
    salient_coded = (
        salient_signs,
        salient_second,
        *(named.get(name, scales) for name in ("salient_scales", "salient_means")),
    )
    widths = (signs.shape[1], scales.shape[1], salient_signs.shape[1])
    sizes = (*spec.shape, *widths, spec.salient_groups, spec.salient_columns)
    constants: dict[str, Any] = {
        "GROUP": spec.group_size,
        "ROWS": rows,
        "MEANS": spec.means,
        "SALIENT": some,
    }

    def run(x: Tensor, y: Tensor, form: Form) -> None:
        form.launch(kernel, (x, y, *coded, salient, *salient_coded, columns, slots), sizes, constants)

    def dense(into: Tensor, first: int) -> None:
        start_unpacking(unpack, into, first, (*coded, *salient_coded, columns, slots, before), sizes, constants)

    # Pairs of columns are at even places of a row, and in one program, unless groups are odd.
    even = not (rows and spec.group_size % 2)
    return Product("haar_planes", spec.shape, scales.dtype == torch.bfloat16, run, dense if even else None)
