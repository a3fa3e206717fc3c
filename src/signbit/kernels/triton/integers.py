"""Integers: W_ij = (q_ij - z_ig) a_ig, codes in parts of 8, 4, 2 and 1 bits (layouts/fields.py)."""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from signbit.kernels.triton.launch import Form, Product, start_unpacking
from signbit.kernels.triton.tiles import (
    added_up,
    group_tile,
    input_tile,
    multiply,
    store,
    store_unpacked,
    sums,
    tile_to_unpack,
    word_tile,
)
from signbit.layouts.bits import words
from signbit.layouts.fields import unpack_fields
from signbit.layouts.integers import Integers, middle


@triton.jit
def part_tile(
    part, rows, inside, start, m, stride, WIDTH: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr
):  # fmt: skip
    """Fields of WIDTH bits, of columns ``start ..``, a multiple of 32: int32 [BLOCK_N, BLOCK_K]."""
    PER: tl.constexpr = 32 // WIDTH
    held = word_tile(part, rows, inside, start // PER, tl.cdiv(m, PER), stride, PER, BLOCK_N, BLOCK_K)
    return (held >> (tl.arange(0, BLOCK_K) % PER * WIDTH)[None, :]) & ((1 << WIDTH) - 1)


@triton.jit
def code_tile(
    codes, rows, inside, start, m, stride, BITS: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr
):  # fmt: skip
    """Codes of columns ``start ..``: of their parts, the widest has the lowest bits and comes first."""
    if BITS == 8:
        return part_tile(codes, rows, inside, start, m, stride, 8, BLOCK_N, BLOCK_K)
    else:
        found = tl.zeros((BLOCK_N, BLOCK_K), tl.int32)
        part = codes
        if BITS & 4:
            found += part_tile(part, rows, inside, start, m, stride, 4, BLOCK_N, BLOCK_K)
            part += tl.cdiv(m, 8)
        if BITS & 2:
            found += part_tile(part, rows, inside, start, m, stride, 2, BLOCK_N, BLOCK_K) << (BITS & 4)
            part += tl.cdiv(m, 16)
        if BITS & 1:
            found += part_tile(part, rows, inside, start, m, stride, 1, BLOCK_N, BLOCK_K) << (BITS & 6)
        return found


@triton.jit
def integers_tile(
    codes, scales, zeros, rows, inside, start, m, width, groups,
    BITS: tl.constexpr, GROUP: tl.constexpr, ZEROS: tl.constexpr, MIDDLE: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """Weights of columns ``start ..``, float32 [BLOCK_N, BLOCK_K]."""
    levels = code_tile(codes, rows, inside, start, m, width, BITS, BLOCK_N, BLOCK_K).to(tl.float32)
    if ZEROS:
        levels -= group_tile(zeros, rows, inside, start, m, groups, 1, GROUP, BLOCK_N, BLOCK_K)
    else:
        levels -= MIDDLE
    return levels * group_tile(scales, rows, inside, start, m, groups, 1, GROUP, BLOCK_N, BLOCK_K)


@triton.jit
def kernel(
    x, y, codes, scales, zeros, tokens, n, m, width, groups,
    BITS: tl.constexpr, GROUP: tl.constexpr, ZEROS: tl.constexpr, MIDDLE: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_T: tl.constexpr, DOT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    rows = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    token = tl.program_id(1) * BLOCK_T + tl.arange(0, BLOCK_T)
    inside = rows < n
    total = sums(BLOCK_T, BLOCK_N, BLOCK_K, DOT)
    for start in range(0, m, BLOCK_K):
        columns = start + tl.arange(0, BLOCK_K)
        inputs = input_tile(x, token, tokens, columns, columns < m, m)
        weights = integers_tile(
            codes, scales, zeros, rows, inside, start, m, width, groups, BITS, GROUP, ZEROS, MIDDLE, BLOCK_N, BLOCK_K
        )
        total = multiply(total, weights, inputs, DOT, PRECISION)
    store(y, added_up(total, DOT), rows, inside, token, tokens, n)


@triton.jit
def unpack(
    dense, codes, scales, zeros, first, stop, n, m, width, groups,
    BITS: tl.constexpr, GROUP: tl.constexpr, ZEROS: tl.constexpr, MIDDLE: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    rows, inside, start = tile_to_unpack(first, stop, BLOCK_N, BLOCK_K)
    weights = integers_tile(
        codes, scales, zeros, rows, inside, start, m, width, groups, BITS, GROUP, ZEROS, MIDDLE, BLOCK_N, BLOCK_K
    )
    store_unpacked(dense, weights, rows, first, stop, start, m, BLOCK_K)


def prepare(layout: Integers) -> Product:
    spec = layout.spec
    codes, groups = words(layout.codes), layout.scales.shape[1]
    # A byte each: zero points are few, and their packed form is not worth a kernel's time.
    zeros = unpack_fields(layout.get_buffer("zeros"), groups, spec.bits).contiguous() if spec.zeros else layout.codes
    tensors = (codes, layout.scales, zeros)
    sizes = (*spec.shape, codes.shape[1], groups)
    constants: dict[str, Any] = {
        "BITS": spec.bits,
        "GROUP": spec.group_size,
        "ZEROS": spec.zeros,
        "MIDDLE": middle(spec.bits),
    }

    def run(x: Tensor, y: Tensor, form: Form) -> None:
        form.launch(kernel, (x, y, *tensors), sizes, constants)

    def dense(into: Tensor, first: int) -> None:
        start_unpacking(unpack, into, first, tensors, sizes, constants)

    return Product("integers", spec.shape, layout.scales.dtype == torch.bfloat16, run, dense)
