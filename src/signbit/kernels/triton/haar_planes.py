"""Haar planes: coefficients are multiplied, never weights.

The transform H is its own inverse and symmetric, so it moves from the weights to what is around them:

    row axis       W = C H + H S (salient columns)    y = C (H x) + H (S x_salient)
    column axis    W = H C                            y = H (C x)

Activations are transformed as they are loaded, both of a pair and one sum or difference; outputs as they are stored,
when a program has whole pairs of rows in registers.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from signbit.kernels.triton.launch import Form, Product, words
from signbit.kernels.triton.salient import salient_columns
from signbit.kernels.triton.tiles import (
    added_up,
    bit_at,
    bit_tile,
    group_tile,
    input_tile,
    multiply,
    signed,
    store,
    sums,
)
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
def haar_rows(values, first, n, BLOCK_N: tl.constexpr, BLOCK_T: tl.constexpr):
    """H over the rows ``first ..`` of [BLOCK_N, BLOCK_T]; ``first`` and BLOCK_N are even."""
    pairs = tl.permute(tl.reshape(values, (BLOCK_N // 2, 2, BLOCK_T)), (0, 2, 1))
    a, b = tl.split(pairs)
    paired = (first + 2 * tl.arange(0, BLOCK_N // 2) + 1 < n)[:, None]
    low = tl.where(paired, (a + b) * ROOT_HALF, a)
    high = (a - b) * ROOT_HALF
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
def kernel(
    x, y, signs, second, scales, means, salient, salient_signs, salient_second, salient_scales, salient_means,
    salient_list, slots, tokens, n, m, width, groups, salient_width, salient_groups, count,
    GROUP: tl.constexpr, ROWS: tl.constexpr, MEANS: tl.constexpr, SALIENT: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_T: tl.constexpr, DOT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    BANDS: tl.constexpr = 2 if ROWS else 1
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
        sparse = bit_tile(second, rows, inside, start, width, BLOCK_N, BLOCK_K) != 0
        scale = book_tile(scales, rows, inside, start, m, groups, 0, BANDS, 2, GROUP, BLOCK_N, BLOCK_K)
        sparse_scale = book_tile(scales, rows, inside, start, m, groups, 1, BANDS, 2, GROUP, BLOCK_N, BLOCK_K)
        bits = bit_tile(signs, rows, inside, start, width, BLOCK_N, BLOCK_K)
        weights = signed(bits, tl.where(sparse, sparse_scale, scale))
        if MEANS == 1:
            weights += book_tile(means, rows, inside, start, m, groups, 0, BANDS, 1, GROUP, BLOCK_N, BLOCK_K)
        elif MEANS == 2:
            mean = book_tile(means, rows, inside, start, m, groups, 0, BANDS, 2, GROUP, BLOCK_N, BLOCK_K)
            sparse_mean = book_tile(means, rows, inside, start, m, groups, 1, BANDS, 2, GROUP, BLOCK_N, BLOCK_K)
            weights += tl.where(sparse, sparse_mean, mean)
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
            mask = inside[:, None] & here[None, :]
            stored = place if ROWS else columns
            bits = bit_at(salient_signs, rows[:, None], stored[None, :], salient_width, mask)
            zone = bit_at(salient_second, rows[:, None], stored[None, :], salient_width, mask)
            book = (rows[:, None].to(tl.int64) * salient_groups + slot[None, :]) * 2 + zone
            weights = signed(bits, tl.load(salient_scales + book, mask, other=0.0).to(tl.float32))
            if MEANS > 0:
                weights += tl.load(salient_means + book, mask, other=0.0).to(tl.float32)
            beside = multiply(beside, weights, inputs, DOT, PRECISION)
        if ROWS:
            result += haar_rows(added_up(beside, DOT), first, n, BLOCK_N, BLOCK_T)
        else:
            result += added_up(beside, DOT)
    if not ROWS:
        result = haar_rows(result, first, n, BLOCK_N, BLOCK_T)
    store(y, result, rows, inside, token, tokens, n)


def prepare(layout: HaarPlanes) -> Product:
    spec = layout.spec
    named = dict(layout.named_buffers())
    signs, second, scales = words(named["signs"]), words(named["second"]), layout.scales
    rows, some = spec.axis == "row", spec.salient_columns > 0
    beside = rows and some
    salient_signs = words(named["salient_signs"]) if beside else signs
    salient_second = words(named["salient_second"]) if beside else second
    columns, slots = signs, signs
    if some:
        columns, slots = salient_columns(named["salient"], spec.shape[1], spec.salient_columns, spec.group_size)
    tensors = (
        signs,
        second,
        scales,
        named.get("means", scales),
        words(named["salient"]) if some else signs,
        salient_signs,
        salient_second,
        *(named.get(name, scales) for name in ("salient_scales", "salient_means")),
        columns,
        slots,
    )
    widths = (signs.shape[1], scales.shape[1], salient_signs.shape[1], spec.salient_groups, spec.salient_columns)
    constants: dict[str, Any] = {
        "GROUP": spec.group_size,
        "ROWS": rows,
        "MEANS": spec.means,
        "SALIENT": some,
    }

    def run(x: Tensor, y: Tensor, form: Form) -> None:
        form.launch(kernel, (x, y, *tensors), (*spec.shape, *widths), constants)

    return Product("haar_planes", spec.shape, scales.dtype == torch.bfloat16, run)
