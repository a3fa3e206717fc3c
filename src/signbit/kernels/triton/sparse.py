"""Structured matrices on sparse tensor cores, which take at most 2 of every 4 columns.

A 2:4 or 1:4 matrix is one such matrix. A matrix of 4:8 is not: up to 4 of 4 neighbours may be kept. But every matrix is
the sum of two, the first with the first two non-zeros of each four columns and the second with the others: two sparse
products, together at best as fast as a dense one. Values have 16 bits, so one such matrix takes 9 bits a weight and two
take 18, in place of 2. So this can pay for prefill of 2:4 at most, never for decoding.

torch compresses and multiplies (cuSPARSELt or CUTLASS). :data:`FASTER` says from how many tokens on that was measured
to be ahead, by architecture; nothing was measured yet, and dispatch never comes here.
"""

from __future__ import annotations

import torch
from torch import Tensor

from signbit.errors import SignbitError
from signbit.layouts import Structured

FASTER: dict[str, int] = {}


def fits(layout: Structured) -> bool:
    """Whether every four columns keep at most two, wherever the layout keeps them."""
    keep, of = layout.spec.keep, layout.spec.of
    return keep <= 2 and of % 4 == 0


def halves(W: Tensor) -> tuple[Tensor, Tensor]:
    """W [n, 4 k] as the sum of two matrices of at most 2 of 4."""
    cells = W.view(W.shape[0], -1, 4)
    first = (cells != 0).cumsum(2) <= 2
    nothing = torch.zeros_like(cells)
    return torch.where(first, cells, nothing).view_as(W), torch.where(first, nothing, cells).view_as(W)


def compress(W: Tensor) -> tuple[Tensor, Tensor]:
    """Values [n, 2 k] and their places in their four columns, uint8 [n, 2 k]: what sparse tensor cores read."""
    cells = W.view(W.shape[0], -1, 4)
    if bool(((cells != 0).sum(2) > 2).any()):
        raise SignbitError("more than 2 of 4 columns are kept: split the matrix in two (halves)")
    # Non-zeros first, in order; zeros fill up.
    places = torch.argsort((cells == 0).to(torch.uint8), dim=2, stable=True)[..., :2].sort(2).values
    return cells.gather(2, places).flatten(1), places.flatten(1).to(torch.uint8)


def expand(values: Tensor, places: Tensor) -> Tensor:
    """The inverse of :func:`compress`."""
    cells = values.new_zeros(values.shape[0], values.shape[1] // 2, 4)
    return cells.scatter_(2, places.long().view(*cells.shape[:2], 2), values.view(*cells.shape[:2], 2)).flatten(1)


class SparseMatrix:
    """A layout unpacked for sparse tensor cores: one compressed matrix, or two for more than 2 of 4."""

    def __init__(self, layout: Structured, dtype: torch.dtype) -> None:
        n, m = layout.shape
        if not layout.device.type == "cuda" or n % 32 or m % 64:
            raise SignbitError(
                f"sparse tensor cores take matrices of 32 x 64 on a GPU, not {n} x {m} on {layout.device}"
            )
        W = layout.dequantize().to(dtype)
        parts = (W,) if fits(layout) else halves(W)
        self.parts = [torch.sparse.to_sparse_semi_structured(part.contiguous()) for part in parts]

    def matmul(self, x: Tensor) -> Tensor:
        """``x @ W.T`` for x [tokens, in]."""
        total = None
        for part in self.parts:
            y = torch.nn.functional.linear(x, part)
            total = y if total is None else total + y
        assert total is not None
        return total
