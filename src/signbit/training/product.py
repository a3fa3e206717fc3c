"""Products with a matrix that is made from latent weights, without keeping the matrix.

A :class:`Matrix` says how rows of W follow from its *operands* (latent weights, coefficients) and how a gradient of W
becomes gradients of the operands. In training by plain autograd each step from latent weights to W would keep a tensor
of W's size until the backward pass. Here nothing is kept but the operands themselves, which are there anyway: W is made
again in the backward pass. That costs a few operations a weight, beside three products that each cost as many as there
are tokens; in exchange, training takes no more memory than that of a dense linear.

    y = x W^T        dx = dy W        dW = dy^T x        d operand = (d W / d operand)^T dW

Rows are worked on in tiles, so that the many cheap steps stay in a CPU's cache.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.nn import functional as F

# 512 KiB of float32: the half dozen tensors of a tile fit the L2 cache of current CPUs.
_TILE_WEIGHTS = 1 << 17

Operands = tuple[Tensor | None, ...]


class Matrix(Protocol):
    """How a matrix [out, in] follows from operands, float32; those that it does not have are None."""

    @property
    def shape(self) -> tuple[int, int]: ...

    def values(self, rows: slice, *operands: Any) -> Tensor:
        """Rows of the matrix, float32: the very sums of the layout's ``dequantize``."""
        ...

    def differentiate(self, rows: slice, gradient: Tensor, into: list[Any], *operands: Any) -> None:
        """Put what the ``gradient`` [rows, in] of some rows means for the operands into their gradients, ``into``.

        These are zeros to begin with, and None where none is asked for. What belongs to a row is set, what is shared
        by rows is added to. ``gradient`` must be left as it is.
        """
        ...


def multiply(x: Tensor, matrix: Matrix, operands: Operands) -> Tensor:
    """``x W^T`` for x [..., in], in x's dtype; sums are those of a dense product."""
    y: Tensor = _Product.apply(x, matrix, *operands)
    return y


def whole(matrix: Matrix, operands: Operands) -> Tensor:
    """W [out, in], float32, differentiable."""
    weight: Tensor = _Whole.apply(matrix, *operands)
    return weight


class _Product(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, matrix: Matrix, *operands: Tensor | None) -> Tensor:
        ctx.matrix = matrix
        ctx.save_for_backward(x, *operands)
        return F.linear(x, _values(matrix, operands, x))

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        x, *operands = ctx.saved_tensors
        of_x = gradient @ _values(ctx.matrix, operands, x) if ctx.needs_input_grad[0] else None
        if not any(ctx.needs_input_grad[2:]):
            return of_x, None, *[None] * len(operands)
        of_weight = gradient.flatten(0, -2).T @ x.flatten(0, -2)
        return of_x, None, *_differentiate(ctx.matrix, operands, of_weight, ctx.needs_input_grad[2:])


class _Whole(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, matrix: Matrix, *operands: Tensor | None) -> Tensor:
        ctx.matrix = matrix
        ctx.save_for_backward(*operands)
        first = next(operand for operand in operands if operand is not None)
        return _values(matrix, operands, first.new_empty(0))

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        operands = ctx.saved_tensors
        return None, *_differentiate(ctx.matrix, operands, gradient, ctx.needs_input_grad[1:])


def _values(matrix: Matrix, operands: Any, like: Tensor) -> Tensor:
    """The matrix in the dtype of ``like``."""
    weight = torch.empty(matrix.shape, dtype=like.dtype, device=like.device)
    for rows in _tiles(matrix, like.device):
        weight[rows] = matrix.values(rows, *operands)
    return weight


def _differentiate(matrix: Matrix, operands: Any, of_weight: Tensor, needed: Any) -> list[Tensor | None]:
    into = [torch.zeros_like(x) if x is not None and need else None for x, need in zip(operands, needed, strict=True)]
    if any(needed):
        for rows in _tiles(matrix, of_weight.device):
            matrix.differentiate(rows, of_weight[rows].float(), into, *operands)
    return into


def _tiles(matrix: Matrix, device: torch.device) -> Iterator[slice]:
    n, m = matrix.shape
    # Pairs of rows, which a transform over rows mixes, stay together.
    size = max(2, _TILE_WEIGHTS // m // 2 * 2) if device.type == "cpu" else n
    return (slice(start, min(start + size, n)) for start in range(0, n, size))
