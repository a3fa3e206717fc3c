"""The Triton kernels, for CUDA: which layouts they know, and calling them.

    tiles.py      tiles of bits, coefficients and activations, shared by all
    <layout>.py   the kernels of a layout, and what they take of its tensors
    launch.py     grids and forms: gemv for up to 8 tokens, gemm for more; tiles of rows unpacked for torch for many
    tuning.py     which blocks: shipped (blocks.json), measured on this machine, or tried out
    rounding.py   no product: the columns of a matrix, while it is quantized
    sparse.py     matrices of at most 2 of 4 for sparse tensor cores; nothing goes there by itself

A layout is prepared once, as for the CPU kernels, and again when one of its tensors has moved. No product waits for the
device, and shapes of all that is allocated follow from shapes and specs, so products can be captured in CUDA graphs.

Nothing of this is imported before the first product on a GPU: Triton is an extra (``signbit[gpu]``).
"""

from __future__ import annotations

from collections.abc import Callable
from math import ceil
from typing import Any

import torch
from torch import Tensor
from triton.runtime.errors import OutOfResources

from signbit.kernels.prepared import prepared_chains
from signbit.kernels.triton import haar_planes, integers, partial, sign_planes, split_planes, structured
from signbit.kernels.triton.launch import GEMV_TOKENS, Form, Product
from signbit.kernels.triton.rounding import round_in_turn
from signbit.kernels.triton.tuning import Blocks, architecture, blocks_for
from signbit.layouts import HaarPlanes, Integers, Layout, Partial, SignPlanes, SplitPlanes, Structured
from signbit.layouts.positions import STRIP_ROWS

__all__ = ["DENSE_WEIGHTS", "UNPACK_TOKENS", "OutOfResources", "has_kernel", "matmul", "round_in_turn"]

# Tokens from which on W is unpacked and torch multiplies. With 2048 tokens and plain signs in bfloat16, gemm did 190
# TFLOP/s on an H200, and cuBLAS 790. Unpacking writes, and cuBLAS reads, two bytes a weight: at 4 TB/s that is a
# picosecond a weight, which is what the difference of the two is worth at 125 tokens. Estimated: to be measured.
UNPACK_TOKENS = 128

# Weights unpacked at a time, about: 256 MiB in 16 bits.
DENSE_WEIGHTS = 1 << 27

_DTYPES = (torch.float32, torch.float16, torch.bfloat16)

_PREPARE: dict[type[Layout], Callable[[Any], Product]] = {
    HaarPlanes: haar_planes.prepare,
    Integers: integers.prepare,
    Partial: partial.prepare,
    SignPlanes: sign_planes.prepare,
    SplitPlanes: split_planes.prepare,
    Structured: structured.prepare,
}


def has_kernel(layout: Layout) -> bool:
    """Whether products with this layout run in Triton."""
    return _chains(layout) is not None


def matmul(x: Tensor, layout: Layout, blocks: Blocks | None = None) -> Tensor | None:
    """``x @ W.T`` for x ``[..., in]``, in x's dtype, sums in float32; None if there is no kernel for it.

    blocks: in place of those that tuning.py names, for as many tokens as there are.
    """
    if x.dtype not in _DTYPES or (chains := _chains(layout)) is None:
        return None
    if x.shape[-1] != layout.spec.shape[1]:
        raise ValueError(f"inputs have {x.shape[-1]} features, the matrix has {layout.spec.shape[1]}")
    x = x.resolve_neg().contiguous()
    precise = x.dtype == torch.float32
    # What goes from V to U of sign factors keeps the range of float32: that of float16 may not do.
    between = torch.bfloat16 if x.dtype == torch.bfloat16 and x[..., 0].numel() > GEMV_TOKENS else torch.float32
    total = None
    for chain in chains:
        y = x
        for product in chain[:-1]:
            y = _multiply(y, product, between, precise, blocks)
        y = _multiply(y, chain[-1], x.dtype if len(chains) == 1 else torch.float32, precise, blocks)
        total = y if total is None else total + y
    assert total is not None
    return total.to(x.dtype)


def _multiply(x: Tensor, product: Product, dtype: torch.dtype, precise: bool, blocks: Blocks | None) -> Tensor:
    *batch, m = x.shape
    y = torch.empty(*batch, product.shape[0], dtype=dtype, device=x.device)
    tokens = x.numel() // m
    many = tokens >= UNPACK_TOKENS and blocks is None
    if (many and _is_torch_ahead(x, y, product, precise)) or (tokens > GEMV_TOKENS and not product.gemm):
        _multiply_dense(x, y, product)
    elif tokens:
        blocks = blocks or blocks_for(product.name, product.shape, tokens, architecture(x.device))
        product.run(x, y, Form.of(x, tokens, blocks, product.wide, precise))
    return y


def _is_torch_ahead(x: Tensor, y: Tensor, product: Product, precise: bool) -> bool:
    """Whether torch, given many tokens and W unpacked, computes what gemm does, and faster.

    It rounds products of 16-bit numbers to 16 bits, where sums of several, or the range of float16, may not do, and
    multiplies float32 without tensor cores, which gemm takes for all but activations that are worth more than TF32.
    """
    if product.dense is None:
        return False
    if x.dtype == torch.float16:
        return not product.wide and y.dtype == torch.float16
    return x.dtype == y.dtype == torch.bfloat16 or precise


def _multiply_dense(x: Tensor, y: Tensor, product: Product) -> None:
    """Rows are unpacked, all or in tiles of the same size, and torch multiplies."""
    assert product.dense is not None
    n, m = product.shape
    tiles = ceil(n * m / DENSE_WEIGHTS)
    rows = ceil(n / tiles / STRIP_ROWS) * STRIP_ROWS
    dtype = torch.float32 if product.wide and x.dtype == torch.float16 else x.dtype
    flat, result = x.view(-1, m).to(dtype), y.view(-1, n)
    weights = torch.empty(min(rows, n), m, dtype=dtype, device=x.device)
    for first in range(0, n, rows):
        tile, part = weights[: n - first], result[:, first : first + rows]
        product.dense(tile, first)
        if part.dtype == dtype:
            torch.mm(flat, tile.T, out=part)
        else:
            part.copy_(torch.mm(flat, tile.T))


def _chains(layout: Layout) -> list[list[Product]] | None:
    """Products, as Layout.chains has them; None if one has no kernel."""
    return prepared_chains(layout, "triton", _prepare)


def _prepare(layout: Layout) -> Product | None:
    prepare = _PREPARE.get(type(layout))
    return None if prepare is None else prepare(layout)
