"""Sign planes: W = mean + sum over planes of scale * sign, all of it times a scale of the column if there are any.

In gemv the scales of columns are multiplied into the activations, once a token and not once a weight; in gemm, whose
activations are rounded to 16 bits, into the weights, which are known to fit.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from signbit.kernels.triton.launch import Form, Product, start_unpacking
from signbit.kernels.triton.tiles import (
    added_up,
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
from signbit.layouts.sign_planes import SignPlanes


@triton.jit
def planes_tile(
    signs, scales, means, rows, inside, start, n, m, width, groups,
    PLANES: tl.constexpr, GROUP: tl.constexpr, MEAN: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """Weights but for the scales of columns, float32 [BLOCK_N, BLOCK_K]."""
    weights = tl.zeros((BLOCK_N, BLOCK_K), tl.float32)
    for plane in tl.static_range(PLANES):
        before = plane * tl.cast(n, tl.int64)  # an n of 1 is a constant to Triton, without methods
        bits = bit_tile(signs + before * width, rows, inside, start, width, BLOCK_N, BLOCK_K)
        scale = group_tile(scales + before * groups, rows, inside, start, m, groups, 1, GROUP, BLOCK_N, BLOCK_K)
        weights += signed(bits, scale)
    if MEAN:
        weights += group_tile(means, rows, inside, start, m, groups, 1, GROUP, BLOCK_N, BLOCK_K)
    return weights


@triton.jit
def kernel(
    x, y, signs, scales, means, column_scales, tokens, n, m, width, groups,
    PLANES: tl.constexpr, GROUP: tl.constexpr, MEAN: tl.constexpr, COLUMNS: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_T: tl.constexpr, DOT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    rows = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    token = tl.program_id(1) * BLOCK_T + tl.arange(0, BLOCK_T)
    inside = rows < n
    total = sums(BLOCK_T, BLOCK_N, BLOCK_K, DOT)
    for start in range(0, m, BLOCK_K):
        columns = start + tl.arange(0, BLOCK_K)
        mask = columns < m
        inputs = input_tile(x, token, tokens, columns, mask, m)
        weights = planes_tile(
            signs, scales, means, rows, inside, start, n, m, width, groups, PLANES, GROUP, MEAN, BLOCK_N, BLOCK_K
        )
        if COLUMNS:
            of_columns = tl.load(column_scales + columns, mask, other=0.0).to(tl.float32)[None, :]
            if DOT is None:
                inputs *= of_columns
            else:
                weights *= of_columns
        total = multiply(total, weights, inputs, DOT, PRECISION)
    store(y, added_up(total, DOT), rows, inside, token, tokens, n)


@triton.jit
def unpack(
    dense, signs, scales, means, column_scales, first, stop, n, m, width, groups,
    PLANES: tl.constexpr, GROUP: tl.constexpr, MEAN: tl.constexpr, COLUMNS: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    rows, inside, start = tile_to_unpack(first, stop, BLOCK_N, BLOCK_K)
    weights = planes_tile(
        signs, scales, means, rows, inside, start, n, m, width, groups, PLANES, GROUP, MEAN, BLOCK_N, BLOCK_K
    )
    if COLUMNS:
        columns = start + tl.arange(0, BLOCK_K)
        weights *= tl.load(column_scales + columns, columns < m, other=0.0).to(tl.float32)[None, :]
    store_unpacked(dense, weights, rows, first, stop, start, m, BLOCK_K)


def prepare(layout: SignPlanes) -> Product:
    spec = layout.spec
    signs = words(layout.signs)
    means = layout.get_buffer("means") if spec.mean else layout.scales
    columns = layout.get_buffer("column_scales") if spec.column_scales else layout.scales
    tensors = (signs, layout.scales, means, columns)
    sizes = (*spec.shape, signs.shape[-1], layout.scales.shape[-1])
    constants: dict[str, Any] = {
        "PLANES": spec.planes,
        "GROUP": spec.group_size,
        "MEAN": spec.mean,
        "COLUMNS": spec.column_scales,
    }

    def run(x: Tensor, y: Tensor, form: Form) -> None:
        form.launch(kernel, (x, y, *tensors), sizes, constants)

    def dense(into: Tensor, first: int) -> None:
        start_unpacking(unpack, into, first, tensors, sizes, constants)

    return Product("sign_planes", spec.shape, layout.scales.dtype == torch.bfloat16, run, dense)
