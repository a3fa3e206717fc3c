"""Scales of columns, shared by all rows, around any code: W ~ Q diag(c).

ARB-LLM_RC (arXiv 2410.03129, section 3.4) gives binary weights a scale of the row times one of the column. With c fixed
it is the old problem in other units: the error of Q diag(c) for W under H is that of Q for W diag(c)^-1 under

    diag(c) H diag(c) = R' R'^T        R' = diag(c) R        U' = U diag(c)^-1

with R' and U' still triangular. So the sweep, refits and descent need not know of columns. c starts as the paper's: row
and column scales in turns, the best approximation of |W| of rank one in each group. It is then fitted anew between the
passes of descent, now to the layer's output. With Q fixed, the least tr((W - Q C) H (W - Q C)^T) solves

    ((Q^T Q) o H) c = diag(Q^T W H)          o: element by element
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

import torch
from torch import Tensor

from signbit.calibration.hessian import Factor
from signbit.methods.descent import descend_on
from signbit.methods.options import SweepOptions
from signbit.methods.sweep import GroupCode, groups_of, sweep
from signbit.timing import phase

Code = TypeVar("Code", bound=GroupCode)

# Rounds of row and column scales in turns: it converges like a power iteration on a matrix close to rank one.
_ROUNDS = 15
_RIDGE = 1e-6
# Columns are divided by their scales: one that all but vanishes in a fit stays as it was.
_LEAST = 2.0**-14


def sweep_scaled(
    weight: Tensor,
    factor: Factor,
    group_size: int,
    quantize_group: Callable[[Tensor, slice], Code],
    options: SweepOptions,
) -> tuple[list[Code], Tensor]:
    """:func:`sweep` with column scales: codes of Q, and c [m], float32, exact in the storage dtype."""
    weight = weight * ~factor.dead
    with phase("fit"):
        columns = _rounded(rank_one(weight, group_size), torch.ones_like(weight[0]), options)
    scaled = Factor(factor.root * columns.unsqueeze(1), factor.dead, factor.damping)
    codes = sweep(weight / columns, scaled, group_size, quantize_group, options.model_copy(update={"passes": 0}))
    if options.passes:
        with phase("descent"):
            hessian = factor.root @ factor.root.T
            groups = groups_of(weight.shape[1], group_size)
            for _ in range(options.passes):
                values = torch.cat([code.values() for code in codes], dim=1)
                columns = _rounded(fit_columns(weight, values, hessian), columns, options)
                descend_on(weight / columns, columns.unsqueeze(1) * hessian * columns, groups, codes, 1)
    return codes, columns


def rank_one(weight: Tensor, group_size: int) -> Tensor:
    """Column scales c [m] of the best r c^T for |W| [n, m] in each group; 0 at columns of zeros."""
    scales = []
    for magnitudes in weight.abs().split(group_size or weight.shape[1], dim=1):
        c = torch.ones_like(magnitudes[0])
        for _ in range(_ROUNDS):
            r = magnitudes @ c / c.square().sum().clamp(min=_tiny(c))
            c = r @ magnitudes / r.square().sum().clamp(min=_tiny(r))
        scales.append(c)
    return torch.cat(scales)


def fit_columns(weight: Tensor, values: Tensor, hessian: Tensor) -> Tensor:
    """c [m] for the least error of ``values`` diag(c) for ``weight``, both [n, m], under ``hessian`` [m, m]."""
    normal = (values.T @ values) * hessian
    diagonal = normal.diagonal()
    diagonal += _RIDGE * diagonal.mean() + _tiny(weight)
    return torch.linalg.solve(normal, ((weight @ hessian) * values).sum(0))


def _rounded(columns: Tensor, before: Tensor, options: SweepOptions) -> Tensor:
    """As they will be stored; those that vanish as they were ``before``."""
    return torch.where(columns.abs() > _LEAST * before.abs(), columns, before).to(options.storage).float()


def _tiny(like: Tensor) -> float:
    return torch.finfo(like.dtype).tiny
