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

from signbit.methods.sorting import sort_rows

Salience = Literal["hessian", "magnitude"]


def salience(weight: Tensor, diagonal: Tensor, metric: Salience) -> Tensor:
    """Salience [n, k] of ``weight`` [n, k], whose columns have the factor's ``diagonal`` U_jj [k]."""
    return weight.abs() if metric == "magnitude" else (weight / diagonal).square()


def search_column_count(magnitudes: Tensor, limit: int, *, residual_rest: bool, member: Tensor | None = None) -> int:
    """How many leading columns to binarize twice for the least squared error (BiLLM, algorithm 2).

    ``magnitudes`` [n, k], none negative, has its columns in descending salience. Counts c from 1 to ``limit`` (less if
    the group is narrower) are compared by what binarizing takes off the sum of squares, as in the paper without means:
    per row, for K columns whose magnitudes add up to S,

        once     S^2 / K
        twice    (S^2 + A^2) / K        A = sum |x - S/K| = 2 (sum max(x, S/K) - S)

    The leading columns are binarized twice, the rest once, or twice too if ``residual_rest``. Only members (bool
    [n, k]; None: all) count; magnitudes of others must be zero.
    """
    columns = magnitudes.T.contiguous()
    k = len(columns)
    limit = min(limit, k)
    if limit == 0:
        return 0
    widths = torch.arange(1, limit + 1, device=columns.device).unsqueeze(1)
    present = widths if member is None else member.T.cumsum(0)[:limit]
    total = k if member is None else member.sum(1)
    counts, rest_counts = present.clamp(min=1), (total - present).clamp(min=1)
    leading = columns[:limit].cumsum(0)
    rest = columns.sum(0) - leading
    # First the leading columns' centers, then, if the rest is binarized twice too, the rest's.
    centers = [leading / counts, rest / rest_counts][: 1 + residual_rest]
    maxima = list(_leading_maxima(columns, torch.stack(centers, dim=1)).unbind(1))
    if member is not None:
        # The zeros that are no members have added the center each.
        maxima = [maximum - (widths - present) * center for maximum, center in zip(maxima, centers, strict=True)]
    residual = 2 * (maxima[0] - leading)
    gains = (leading.square() + residual.square()) / counts + rest.square() / rest_counts
    if residual_rest:
        # The rest's maxima are those of the whole row, a prefix sum in sorted order, less the leading columns'.
        rest_maxima = _row_maxima(magnitudes, centers[1].T.contiguous()).T - (k - total) * centers[1] - maxima[1]
        gains += (2 * (rest_maxima - rest)).square() / rest_counts
    return 1 + int(gains.sum(1).argmax())


def _leading_maxima(columns: Tensor, centers: Tensor) -> Tensor:
    """sum over the first c columns of max(x, center), for every c; columns [k, n], centers and result [limit, t, n]."""
    columns = columns.unsqueeze(1)
    return torch.stack([torch.maximum(columns[:c], center).sum(0) for c, center in enumerate(centers, start=1)])


def _row_maxima(rows: Tensor, centers: Tensor) -> Tensor:
    """sum over each whole row of max(x, center), for centers [n, limit]."""
    ordered = sort_rows(rows)
    sums = torch.nn.functional.pad(ordered.cumsum(1), (1, 0))
    below = torch.searchsorted(ordered, centers)
    return sums[:, -1:] - sums.gather(1, below) + below * centers
