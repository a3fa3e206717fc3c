"""Which weights to keep: importance, and the N most important of every M.

Importance of w_ij, whose input has the norm |X_j|:

    si           z( |w_ij| / sum_j |w_ij| + |w_ij| / sum_i |w_ij| ) |X_j|        STBLLM (arXiv 2408.01803, section 3.2)
    ria          ( |w_ij| / sum_j |w_ij| + |w_ij| / sum_i |w_ij| ) |X_j|^1/2     RIA (arXiv 2402.04902); STBLLM's code
    hessian      w_ij^2 / U_jj^2                                                 SparseGPT (arXiv 2301.00774)
    magnitude    |w_ij|

z standardises over the layer: mean 0, variance 1. So about half of SI's scores are negative, and a *larger* input
makes a weight below the layer's mean *less* important. That is the formula; it is kept.

|X_j|^2 is N/2 times the diagonal of the Hessian, without its damping, which leaves the order as it is. Sums, mean and
variance are those of the layer's original weights, also where the scores are of weights that a sweep has changed.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import torch
from torch import Tensor

from signbit.calibration.hessian import Factor
from signbit.layouts.structured import kept_in_part
from signbit.methods.salience import salience

Importance = Literal["si", "ria", "hessian", "magnitude"]
# Scores [n, k] of weights [n, k] that stand in these columns.
Scores = Callable[[Tensor, slice], Tensor]


def importance(weight: Tensor, factor: Factor, metric: Importance) -> Scores:
    """The scores for the layer whose original weights are ``weight`` [n, m]."""
    if metric == "hessian" or metric == "magnitude":
        diagonal = factor.diagonal
        return lambda block, columns: salience(block, diagonal[columns], metric)
    power = input_power(factor)
    if metric == "ria":
        return ria(weight, power)
    relative = _relative(weight)
    scores = relative(weight, slice(None))
    mean, deviation = scores.mean(), scores.std(correction=0).clamp(min=torch.finfo(scores.dtype).tiny)
    norms = power.sqrt()
    return lambda block, columns: (relative(block, columns) - mean) / deviation * norms[columns]


def ria(weight: Tensor, power: Tensor) -> Scores:
    """RIA's scores for the layer with weights [n, m], whose inputs have the mean squares ``power`` [m]."""
    relative, root = _relative(weight), power.sqrt().sqrt()
    return lambda block, columns: relative(block, columns) * root[columns]


def _relative(weight: Tensor) -> Scores:
    magnitudes = weight.abs()
    tiny = torch.finfo(weight.dtype).tiny
    rows, columns = (magnitudes.sum(axis, keepdim=True).clamp(min=tiny) for axis in (1, 0))
    return lambda block, at: block.abs() / rows + block.abs() / columns[:, at]


def input_power(factor: Factor) -> Tensor:
    """The diagonal [m] of the Hessian as it was before damping; dead inputs have 0.

    With a bias correction the Hessian is that of what varies, so this is an input's variance, not its power.
    """
    diagonal = factor.root.square().sum(1)
    # What factorize did: dead inputs have 1, then damping times the mean of the diagonal is added to all.
    alive = diagonal.sum() - factor.dead.sum()
    mean = alive / (len(diagonal) * (1 + factor.damping))
    return (diagonal - factor.damping * mean).clamp(min=0) * ~factor.dead


def keep_best(scores: Tensor, keep: int, of: int) -> Tensor:
    """The ``keep`` highest of every ``of`` columns of ``scores`` [n, k], left before right where equal: bool [n, k].

    A last cell of r columns keeps ceil(r keep / of).
    """
    n, k = scores.shape
    whole = k // of * of
    cells = _highest(scores[:, :whole].reshape(n, -1, of), keep).flatten(1)
    rest = scores[:, whole:]
    return torch.cat([cells, _highest(rest, kept_in_part(k - whole, keep, of))], dim=1)


def _highest(scores: Tensor, keep: int) -> Tensor:
    # Each score's place among those of its cell, by comparing: sorting rows this short is far slower.
    place = torch.zeros_like(scores)
    for column in range(scores.shape[-1]):
        rival = scores[..., column : column + 1]
        place[..., :column] += rival > scores[..., :column]
        place[..., column + 1 :] += rival >= scores[..., column + 1 :]
    return place < keep
