"""Partial binarization: sign planes, and then what the salient weights differ by.

Where those are is known only by decoding, gap after gap, from the start of each strip of 16 rows
(layouts/positions.py): a program takes a strip, makes prefix sums of as many gaps
at a time as fit its registers, and carries them on.

    gemv   y = (all weights as if ordinary) x, by the kernel of sign planes in float32; then each strip adds
           (salient - ordinary) x of its salient weights, the 16 rows told apart by a mask
    gemm   a tile cannot be made without decoding all of its strip first, and every block of tokens would do so again.
           So W is unpacked once, a tile of rows at a time, in the dtype of the activations, and torch multiplies:
           ordinary weights first, then salient ones over them. For hundreds of tokens that is a small part of the time.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from signbit.kernels.triton import sign_planes
from signbit.kernels.triton.launch import Form, Product, start, start_unpacking
from signbit.kernels.triton.tiles import bit_at, signed
from signbit.kernels.triton.tuning import Blocks
from signbit.layouts.bits import words
from signbit.layouts.partial import Partial
from signbit.layouts.positions import STRIP_ROWS, strip_count

ROWS = tl.constexpr(STRIP_ROWS)
# Of unpacking: symbols at a time. Strips are few and each waits for its own symbols, so as many as registers take.
_SYMBOLS = Blocks(rows=STRIP_ROWS, columns=1024, tokens=16, warps=4, stages=2)


@triton.jit
def symbols(
    positions, position, stop, strip, m, n, passed, width, GAP_BITS: tl.constexpr
):  # fmt: skip
    """Of some symbols of a strip, int32 [BLOCK]: which mark a weight, its place in the strip, and what was passed."""
    inside = position < stop
    if GAP_BITS == 0:
        row = strip * ROWS + position // m
        marks = bit_at(positions, row, position % m, width, inside & (row < n))
        return marks, position, passed
    else:
        gap = position * 0
        for bit in tl.static_range(GAP_BITS):
            gap += bit_at(positions, position * 0 + bit, position, width, inside) << bit
        marks = (inside & (gap != (1 << GAP_BITS) - 1)).to(tl.int32)
        steps = tl.where(inside, gap + marks, 0)
        places = passed + tl.cumsum(steps, 0)
        return marks, places - 1, passed + tl.sum(steps, 0)


@triton.jit
def salient_values(
    signs, codes, scales, means, code_scales, code_offsets, row, column, code, mask, width, code_width,
    groups, code_groups, GROUP: tl.constexpr, CODE_GROUP: tl.constexpr, MEAN: tl.constexpr, CODE_BITS: tl.constexpr,
    DIFFERENCE: tl.constexpr,
):  # fmt: skip
    """Values of salient weights, or what they differ by from ordinary ones there: float32 [BLOCK]."""
    bits = bit_at(signs, row, column, width, mask)
    q = column * 0
    for bit in tl.static_range(CODE_BITS - 1):
        q += bit_at(codes, column * 0 + bit, code, code_width, mask) << bit
    book = row.to(tl.int64) * code_groups
    if CODE_GROUP > 0:
        book += column // CODE_GROUP
    values = signed(bits, tl.load(code_scales + book, mask, other=0.0).to(tl.float32) * (q.to(tl.float32) + 0.5))
    if MEAN:
        values += tl.load(code_offsets + book, mask, other=0.0).to(tl.float32)
    if DIFFERENCE:
        book = row.to(tl.int64) * groups
        if GROUP > 0:
            book += column // GROUP
        values -= signed(bits, tl.load(scales + book, mask, other=0.0).to(tl.float32))
        if MEAN:
            values -= tl.load(means + book, mask, other=0.0).to(tl.float32)
    return values


@triton.jit
def strip_bounds(ends, strip, m, GAP_BITS: tl.constexpr):
    """A strip's first code, its first symbol, and where its symbols end."""
    STEP: tl.constexpr = 1 if GAP_BITS == 0 else 2
    code = tl.load(ends + (strip - 1) * STEP, strip > 0, other=0)
    if GAP_BITS == 0:
        return code, strip * 0, m * ROWS
    else:
        return code, tl.load(ends + strip * 2 - 1, strip > 0, other=0), tl.load(ends + strip * 2 + 1)


@triton.jit
def add_salient(
    x, y, base, signs, positions, ends, codes, scales, means, code_scales, code_offsets,
    tokens, n, m, width, position_width, code_width, groups, code_groups,
    GROUP: tl.constexpr, CODE_GROUP: tl.constexpr, MEAN: tl.constexpr, GAP_BITS: tl.constexpr, CODE_BITS: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_T: tl.constexpr, DOT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """y = base + (salient - ordinary) x of one strip; BLOCK_N is its 16 rows."""
    strip = tl.program_id(0)
    token = tl.program_id(1) * BLOCK_T + tl.arange(0, BLOCK_T)
    code, first, stop = strip_bounds(ends, strip, m, GAP_BITS)
    passed = strip * 0
    total = tl.zeros((BLOCK_T, BLOCK_N, BLOCK_K), tl.float32)
    for begin in range(first, stop, BLOCK_K):
        position = begin + tl.arange(0, BLOCK_K)
        marks, place, passed = symbols(positions, position, stop, strip, m, n, passed, position_width, GAP_BITS)
        mask = marks != 0
        row = place // m
        column = place - row * m
        values = salient_values(
            signs, codes, scales, means, code_scales, code_offsets, strip * ROWS + row, column,
            code + tl.cumsum(marks, 0) - 1, mask, width, code_width, groups, code_groups,
            GROUP, CODE_GROUP, MEAN, CODE_BITS, True,
        )  # fmt: skip
        code += tl.sum(marks, 0)
        offset = token[:, None].to(tl.int64) * m + column[None, :]
        inputs = tl.load(x + offset, (token < tokens)[:, None] & mask[None, :], other=0.0).to(tl.float32)
        own = tl.where(row[None, :] == tl.arange(0, BLOCK_N)[:, None], values[None, :], 0.0)
        total += own[None, :, :] * inputs[:, None, :]
    rows = strip * ROWS + tl.arange(0, BLOCK_N)
    mask = (token < tokens)[:, None] & (rows < n)[None, :]
    target = token[:, None].to(tl.int64) * n + rows[None, :]
    result = tl.load(base + target, mask, other=0.0) + tl.sum(total, 2)
    tl.store(y + target, result.to(y.dtype.element_ty), mask)


@triton.jit
def unpack_salient(
    dense, signs, positions, ends, codes, code_scales, code_offsets, first_row,
    n, m, width, position_width, code_width, code_groups,
    CODE_GROUP: tl.constexpr, MEAN: tl.constexpr, GAP_BITS: tl.constexpr, CODE_BITS: tl.constexpr,
    BLOCK_K: tl.constexpr,
):  # fmt: skip
    """The salient weights of one strip, written over what is there."""
    strip = first_row // ROWS + tl.program_id(0)
    code, first, stop = strip_bounds(ends, strip, m, GAP_BITS)
    passed = strip * 0
    for begin in range(first, stop, BLOCK_K):
        position = begin + tl.arange(0, BLOCK_K)
        marks, place, passed = symbols(positions, position, stop, strip, m, n, passed, position_width, GAP_BITS)
        mask = marks != 0
        row = strip * ROWS + place // m
        column = place % m
        values = salient_values(
            signs, codes, code_scales, code_offsets, code_scales, code_offsets, row, column,
            code + tl.cumsum(marks, 0) - 1, mask, width, code_width, 0, code_groups,
            0, CODE_GROUP, MEAN, CODE_BITS, False,
        )  # fmt: skip
        code += tl.sum(marks, 0)
        target = (row - first_row).to(tl.int64) * m + column
        tl.store(dense + target, values.to(dense.dtype.element_ty), mask)


def prepare(layout: Partial) -> Product:
    spec = layout.spec
    n, m = spec.shape
    named = dict(layout.named_buffers())
    signs, positions, codes = (words(named[name]) for name in ("signs", "positions", "codes"))
    scales, code_scales, ends = layout.scales, layout.code_scales, layout.ends
    means, code_offsets = named.get("means", scales), named.get("code_offsets", code_scales)
    groups, code_groups = scales.shape[1], code_scales.shape[1]
    widths = (signs.shape[1], positions.shape[1], codes.shape[1])
    ordinary = (signs, scales, means, scales)
    of_signs: dict[str, Any] = {"GROUP": spec.group_size, "MEAN": spec.mean}
    plain = of_signs | {"PLANES": 1, "COLUMNS": False}
    of_codes = {
        "CODE_GROUP": spec.code_group_size,
        "MEAN": spec.mean,
        "GAP_BITS": spec.gap_bits,
        "CODE_BITS": spec.code_bits,
    }

    def run(x: Tensor, y: Tensor, form: Form) -> None:
        base = torch.empty(y.shape, dtype=torch.float32, device=y.device)
        form.launch(sign_planes.kernel, (x, base, *ordinary), (n, m, widths[0], groups), plain)
        if spec.salient:
            tensors = (x, y, base, signs, positions, ends, codes, scales, means, code_scales, code_offsets)
            sizes = (n, m, *widths, groups, code_groups)
            form.with_rows(STRIP_ROWS).launch(add_salient, tensors, sizes, of_signs | of_codes)
        else:
            y.copy_(base)

    def dense(into: Tensor, first: int) -> None:
        start_unpacking(sign_planes.unpack, into, first, ordinary, (n, m, widths[0], groups), plain)
        if spec.salient:
            tensors = (into, signs, positions, ends, codes, code_scales, code_offsets)
            sizes = (first, n, m, *widths, code_groups)
            constants = of_codes | {"BLOCK_K": _SYMBOLS.columns}
            start(unpack_salient, (strip_count(into.shape[0]),), (*tensors, *sizes), constants, _SYMBOLS)

    return Product("partial", spec.shape, scales.dtype == torch.bfloat16, run, dense, gemm=False)
