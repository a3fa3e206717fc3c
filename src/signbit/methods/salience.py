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


def search_column_count(magnitudes: Tensor, limit: int) -> int:
    """How many leading columns to binarize twice, the rest once, for the least squared error (BiLLM, algorithm 2).

    ``magnitudes`` [n, k] are |w|, columns in descending salience. Counts c from 1 to ``limit`` (less if the group is
    narrower) are compared by what binarizing, without means, takes off the sum of squares. Per row, with S_c the sum of
    the leading c magnitudes and alpha = S_c / c:

        leading columns, first order     S_c^2 / c
        leading columns, residual        A_c^2 / c        A_c = sum | |w| - alpha | = 2 (sum max(|w|, alpha) - S_c)
        the rest                         (S_k - S_c)^2 / (k - c)
    """
    columns = magnitudes.T.contiguous()
    k = len(columns)
    limit = min(limit, k)
    if limit == 0:
        return 0
    counts = torch.arange(1, limit + 1, device=columns.device).unsqueeze(1)
    leading = columns.cumsum(0)
    total, leading = leading[-1], leading[:limit]
    alpha = leading / counts
    larger = torch.stack([torch.maximum(columns[:c], alpha[c - 1]).sum(0) for c in range(1, limit + 1)])
    residual = 2 * (larger - leading)
    gains = (leading.square() + residual.square()) / counts + (total - leading).square() / (k - counts).clamp(min=1)
    return 1 + int(gains.sum(1).argmax())


def search_column_count_on_salience(scores: Tensor, limit: int) -> int:
    """The same choice as BiLLM's released code makes it: for the least error of binarizing the salience itself.

    ``scores`` [n, k], columns in descending salience, are binarized around their means, twice on either side.
    """
    columns = scores.T.contiguous()
    gains = [
        _second_order_gain(columns[:count]) + _second_order_gain(columns[count:])
        for count in range(1, min(limit, len(columns)) + 1)
    ]
    return 1 + int(torch.stack(gains).argmax()) if gains else 0


def _second_order_gain(x: Tensor) -> Tensor:
    """What binarizing each column of x [k, n] and then its residual, around means, takes off the sum of squares.

    One binarization around a center mu with scale alpha = mean|x - mu| takes off k (mu^2 + alpha^2).
    """
    gain = x.new_zeros(())
    for _ in range(2 if len(x) else 0):
        center = x.mean(0)
        deviation = x - center
        scale = deviation.abs().mean(0)
        gain = gain + len(x) * (center.square() + scale.square()).sum()
        x = deviation - torch.copysign(scale, deviation)
    return gain
