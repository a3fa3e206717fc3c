"""What all kernels share: tiles of bits, of coefficients and of activations, and two ways to multiply with them.

A program makes BLOCK_N rows of W, BLOCK_K columns at a time, from packed words in registers, and multiplies each such
tile with the same columns of BLOCK_T tokens in one of two *forms*:

    gemv   a float32 product for each weight and token, added up in registers: [BLOCK_T, BLOCK_N, BLOCK_K] sums, which
           meet only behind the last column. For 1 to 8 tokens, where memory is what a product waits for
    gemm   tl.dot, with W on the left, where tensor cores take it from registers: [BLOCK_N, BLOCK_T] sums in float32.
           Weights are rounded to the dtype that is multiplied in (``DOT``)

Rows of bits are whole 32-bit words (layouts/bits.py). A word is loaded once and spread over its 32 columns; so is a
coefficient, if no group ends within a word. Otherwise coefficients are loaded column by column, from the cache.

For many tokens tiles are unpacked once, each by a program of its own, and torch multiplies.

Every load is masked. Offsets that grow with rows times columns are 64 bits wide.
"""

from __future__ import annotations

import os

import triton
import triton.language as tl

# Triton's interpreter keeps bfloat16 as integers, and its tl.dot multiplies these.
INTERPRETED = tl.constexpr(os.environ.get("TRITON_INTERPRET") == "1")


@triton.jit
def spread(values, PER: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr):
    """Each of [BLOCK_N, BLOCK_K / PER] at PER columns: [BLOCK_N, BLOCK_K]."""
    return tl.reshape(tl.broadcast_to(values[:, :, None], (BLOCK_N, BLOCK_K // PER, PER)), (BLOCK_N, BLOCK_K))


@triton.jit
def word_tile(
    words, rows, inside, first, count, stride, PER: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr
):
    """Words ``first ..`` of some rows, each at all its PER columns: int32 [BLOCK_N, BLOCK_K]."""
    place = first + tl.arange(0, BLOCK_K // PER)
    found = tl.load(
        words + rows[:, None].to(tl.int64) * stride + place[None, :],
        inside[:, None] & (place < count)[None, :],
        other=0,
    )
    return spread(found, PER, BLOCK_N, BLOCK_K)


@triton.jit
def bit_tile(words, rows, inside, start, width, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr):
    """Bits ``start ..`` of rows of ``width`` words, int32 [BLOCK_N, BLOCK_K]; ``start`` is a multiple of 32."""
    found = word_tile(words, rows, inside, start // 32, width, width, 32, BLOCK_N, BLOCK_K)
    return (found >> (tl.arange(0, BLOCK_K) % 32)[None, :]) & 1


@triton.jit
def bit_at(words, rows, place, width, mask):
    """Bits anywhere: ``rows``, ``place`` and ``mask`` broadcast to the shape of the result, int32."""
    found = tl.load(words + rows.to(tl.int64) * width + place // 32, mask, other=0)
    return (found >> (place % 32)) & 1


@triton.jit
def group_tile(
    table,
    rows,
    inside,
    start,
    m,
    row_stride,
    group_stride,
    GROUP: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """Coefficients of rows and groups as those of weights, float32 [BLOCK_N, BLOCK_K], or [BLOCK_N, 1] without groups.

    ``table`` points to the first of them.
    """
    base = table + rows.to(tl.int64) * row_stride
    if GROUP == 0:
        return tl.load(base, inside, other=0.0).to(tl.float32)[:, None]
    elif GROUP % 32 == 0:
        column = start + 32 * tl.arange(0, BLOCK_K // 32)
        mask = inside[:, None] & (column < m)[None, :]
        found = tl.load(base[:, None] + (column // GROUP * group_stride)[None, :], mask, other=0.0).to(tl.float32)
        return spread(found, 32, BLOCK_N, BLOCK_K)
    else:
        column = start + tl.arange(0, BLOCK_K)
        mask = inside[:, None] & (column < m)[None, :]
        return tl.load(base[:, None] + (column // GROUP * group_stride)[None, :], mask, other=0.0).to(tl.float32)


@triton.jit
def signed(bits, values):
    """-values where the bit is set, values elsewhere."""
    return tl.where(bits != 0, -values, values)


@triton.jit
def input_tile(x, token, tokens, columns, mask, m):
    """Activations float32 [BLOCK_T, BLOCK_K] at ``columns``, zero where ``mask`` is false."""
    place = token[:, None].to(tl.int64) * m + columns[None, :]
    return tl.load(x + place, (token < tokens)[:, None] & mask[None, :], other=0.0).to(tl.float32)


@triton.jit
def sums(BLOCK_T: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, DOT: tl.constexpr):
    """Zeros to add products to."""
    if DOT is None:
        return tl.zeros((BLOCK_T, BLOCK_N, BLOCK_K), tl.float32)
    else:
        return tl.zeros((BLOCK_N, BLOCK_T), tl.float32)


@triton.jit
def multiply(total, weights, inputs, DOT: tl.constexpr, PRECISION: tl.constexpr):
    """Add the products of weights [BLOCK_N, BLOCK_K] and inputs [BLOCK_T, BLOCK_K], both float32."""
    if DOT is None:
        return total + weights[None, :, :] * inputs[:, None, :]
    elif INTERPRETED:
        return tl.dot(weights.to(DOT).to(tl.float32), tl.trans(inputs.to(DOT).to(tl.float32)), total)
    else:
        return tl.dot(weights.to(DOT), tl.trans(inputs.to(DOT)), total, input_precision=PRECISION)


@triton.jit
def added_up(total, DOT: tl.constexpr):
    """The sums as float32 [BLOCK_N, BLOCK_T]."""
    if DOT is None:
        return tl.trans(tl.sum(total, 2))
    else:
        return total


@triton.jit
def store(y, result, rows, inside, token, tokens, n):
    """Write [BLOCK_N, BLOCK_T] to y [tokens, n], in its dtype."""
    place = token[None, :].to(tl.int64) * n + rows[:, None]
    tl.store(y + place, result.to(y.dtype.element_ty), inside[:, None] & (token < tokens)[None, :])


@triton.jit
def tile_to_unpack(first, stop, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr):
    """Of a program that unpacks rows first .. stop: its rows, which of them there are, and its first column."""
    rows = first + tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    return rows, rows < stop, tl.program_id(0) * BLOCK_K


@triton.jit
def store_unpacked(dense, weights, rows, first, stop, start, m, BLOCK_K: tl.constexpr):
    """Write weights [BLOCK_N, BLOCK_K], columns ``start ..``, to dense [stop - first, m], in its dtype."""
    columns = start + tl.arange(0, BLOCK_K)
    place = (rows - first)[:, None].to(tl.int64) * m + columns[None, :]
    tl.store(dense + place, weights.to(dense.dtype.element_ty), (rows < stop)[:, None] & (columns < m)[None, :])
