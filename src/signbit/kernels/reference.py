"""The torch reference: unpack a tile of rows, multiply, forget it.

A tile of rows keeps every output's whole sum in one matrix product, so the result does not depend on the tile's size
beyond the product's own rounding, and at most TILE_WEIGHTS weights are ever unpacked at once.
"""

from __future__ import annotations

import torch
from torch import Tensor

from signbit.layouts.base import Layout

# 4 MiB of float32: a tile stays in the L2 cache of current CPUs between being unpacked and being multiplied.
TILE_WEIGHTS = 1 << 20


def matmul(x: Tensor, layout: Layout) -> Tensor:
    """``x @ W.T`` for x ``[..., in]`` and a packed W ``[out, in]``; the result has x's dtype, sums are in float32."""
    total = None
    for chain in layout.chains():
        y = x if len(chain) == 1 else x.float()
        for factor in chain:
            y = _product(y, factor)
        total = y if total is None else total + y
    assert total is not None
    return total.to(x.dtype)


def matmul_transposed(g: Tensor, layout: Layout) -> Tensor:
    """``g @ W`` for g ``[..., out]``; the result has g's dtype, sums are in float32."""
    total = None
    for chain in layout.chains():
        x = g.float()
        for factor in reversed(chain):
            x = _transposed_product(x, factor)
        total = x if total is None else total + x
    assert total is not None
    return total.to(g.dtype)


def _product(x: Tensor, layout: Layout) -> Tensor:
    out, width = layout.shape
    rows = max(1, TILE_WEIGHTS // width)
    flat = x.reshape(-1, width)
    y = torch.empty(flat.shape[0], out, dtype=x.dtype, device=x.device)
    for start in range(0, out, rows):
        tile = slice(start, min(start + rows, out))
        y[:, tile] = torch.nn.functional.linear(flat.float(), layout.dequantize(tile))
    return y.view(*x.shape[:-1], out)


def _transposed_product(g: Tensor, layout: Layout) -> Tensor:
    out, width = layout.shape
    rows = max(1, TILE_WEIGHTS // width)
    flat = g.reshape(-1, out)
    x = torch.zeros(flat.shape[0], width, device=g.device)
    for start in range(0, out, rows):
        tile = slice(start, min(start + rows, out))
        x.addmm_(flat[:, tile], layout.dequantize(tile))
    return x.view(*g.shape[:-1], width)
