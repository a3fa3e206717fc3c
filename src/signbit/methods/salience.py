"""Which weights matter: salience of single weights, and the search for how many columns to call salient.

Salience of w_ij, with U the triangular factor of the inverse Hessian:

    hessian      s_ij = w_ij^2 / U_jj^2       twice the loss of zeroing w_ij, later columns free to compensate (OBS)
    magnitude    s_ij = |w_ij|

BiLLM (arXiv 2402.04291, section 3.1) writes [H^-1]_jj^2; what its released code divides by is U_jj^2.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

Salience = Literal["hessian", "magnitude"]


def salience(weight: Tensor, diagonal: Tensor, metric: Salience) -> Tensor:
    """Salience [n, k] of ``weight`` [n, k], whose columns have the factor's ``diagonal`` U_jj [k]."""
    return weight.abs() if metric == "magnitude" else (weight / diagonal).square()


def search_column_count(magnitudes: Tensor, limit: int, mean: bool, residual_rest: bool) -> int:
    """How many leading columns to binarize twice, the others once, for the least squared error (BiLLM, algorithm 2).

    ``magnitudes`` [n, k], none negative, has its columns in descending salience. Each count from 1 to ``limit`` (less
    if the group is narrower) is tried: the leading columns are approximated per row by a binarization and one of its
    residual, the others by one binarization (by two if ``residual_rest``). Errors are not computed but gains, which
    need no reconstruction.
    """
    columns = magnitudes.T.contiguous()
    gains = [
        _gain(columns[:count], mean, residual=True) + _gain(columns[count:], mean, residual=residual_rest)
        for count in range(1, min(limit, len(columns)) + 1)
    ]
    return 1 + int(torch.stack(gains).argmax()) if gains else 0


def _gain(x: Tensor, mean: bool, residual: bool) -> Tensor:
    """By how much binarizing each column of x [k, n], x >= 0, lowers the sum of squares; a scalar.

    One binarization around a center mu with scale alpha = mean|x - mu| lowers it by k (mu^2 + alpha^2). Without a mean,
    signs do not matter to the error, so x may be the magnitudes of signed values.
    """
    k = len(x)
    if k == 0:
        return x.new_zeros(())
    if not mean:
        scale = x.mean(0)
        squares = scale.square()
        if residual:
            squares = squares + (x - scale).abs().mean(0).square()
        return k * squares.sum()
    squares = x.new_zeros(x.shape[1])
    for _ in range(2 if residual else 1):
        center = x.mean(0)
        deviation = x - center
        scale = deviation.abs().mean(0)
        squares = squares + center.square() + scale.square()
        x = deviation - torch.copysign(scale, deviation)
    return k * squares.sum()
