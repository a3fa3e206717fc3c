"""Going over a quantized matrix again: least squares and coordinate descent on the whole layer's output error.

The sweep decides on each group once, and groups at the end of a row bear the errors of all before them. Afterwards
every choice can be looked at again with all the others known. With D = W - Q the error is tr(D H D^T) and its gradient
is -2 G, G = D H; so, everything else as it is,

    the best value of w_ij is              q_ij + G_ij / H_jj
    the best coefficients c of a group     solve  A c = r,  A_fg = f H_bb g^T,  r_f = f . (G_b + Q_b H_bb)    row by row

for a group whose values are the sum of c_f f over features f. Each step can only lower the error (up to the rounding
of coefficients); a pass costs about as much as a sweep. Coordinate descent for layer-wise quantization is QuantEase's
(arXiv 2309.01885); alternating it with the fit of the scales is ARB-LLM's idea (arXiv 2410.03129, section 3.2).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from signbit.calibration.hessian import Factor
from signbit.methods.rounding import round_in_turn

if TYPE_CHECKING:
    from signbit.methods.sweep import GroupCode

# Ridge on the normal equations, relative to their diagonal: features that are zero, or alike, must do no harm.
_RIDGE = 1e-6


def least_squares(features: Tensor, product: Tensor, metric: Tensor) -> Tensor:
    """Coefficients c [F, n] for the least tr((t - c f) M (t - c f)^T), row by row.

    features: f [F, n, k]; product: t M [n, k]; metric: M [k, k], symmetric.
    """
    right = (features * product).sum(2).T
    normal = torch.einsum("fnk,gnk->nfg", features @ metric, features)
    diagonal = normal.diagonal(dim1=1, dim2=2)
    diagonal += _RIDGE * diagonal.mean(1, keepdim=True) + torch.finfo(normal.dtype).tiny
    # solve itself would wait for a GPU to say whether all matrices have an inverse, as with the ridge they have.
    return torch.linalg.solve_ex(normal, right.unsqueeze(2))[0].squeeze(2).T


def descend(weight: Tensor, factor: Factor, groups: list[slice], codes: Sequence[GroupCode], passes: int) -> None:
    """Improve ``codes`` of ``groups`` of columns of ``weight`` [n, m] in place, ``passes`` times."""
    descend_on(weight, factor.root @ factor.root.T, groups, codes, passes)


def descend_on(weight: Tensor, hessian: Tensor, groups: list[slice], codes: Sequence[GroupCode], passes: int) -> None:
    """The same with H itself."""
    gradient = (weight - torch.cat([code.values() for code in codes], dim=1)) @ hessian
    for _ in range(passes):
        for columns, code in zip(groups, codes, strict=True):
            metric = hessian[columns, columns]
            before = code.values()
            product = gradient[:, columns] + before @ metric
            code.set_coefficients(least_squares(code.features(), product, metric))
            _choose_again(product, metric, code)
            gradient -= (code.values() - before) @ hessian[columns]


def _choose_again(product: Tensor, metric: Tensor, code: GroupCode) -> None:
    """One round over the columns of one group; product: t H_bb [n, k] for the target t that the group has."""
    values, diagonal = code.values(), metric.diagonal()
    targets = values + (product - values @ metric) / diagonal
    round_in_turn(code, targets.T, (metric / -diagonal.unsqueeze(1)).tril(-1), values.T)
