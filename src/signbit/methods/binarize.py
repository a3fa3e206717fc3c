"""The group binarizer: the best +/- scale around a mean for each row of a group.

For fixed mean mu, ||w - mu - alpha b||^2 over b in {-1, +1}^k and alpha is least at

    b = sgn(w - mu)      alpha = mean |w - mu|          (XNOR-Net, arXiv 1603.05279, section 3.1)

mu is the row's mean, or zero. Coefficients are rounded to their storage dtype *before* signs and residuals are taken,
so that what a method goes on with is what the checkpoint will hold. sgn(0) = +1.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from signbit.layouts.bits import as_floats, as_signs


@dataclass
class Binarized:
    """negative: bool [n, k]; scale: [n] and mean: [n] or None in storage dtype."""

    negative: Tensor
    scale: Tensor
    mean: Tensor | None

    def values(self) -> Tensor:
        values = self.scale.float().unsqueeze(1) * as_signs(self.negative)
        return values if self.mean is None else values + self.mean.float().unsqueeze(1)


def binarize(weight: Tensor, member: Tensor | None, mean: bool, dtype: torch.dtype) -> Binarized:
    """Binarize each row of ``weight`` [n, k] over its members (bool [n, k]; None: all), least squares in the scale.

    Rows without members get scale 0. Signs are given for all entries; only members' mean anything.
    """
    # A mask of zeros and ones times the weights is many times faster than filling under a boolean mask.
    mask = torch.ones_like(weight) if member is None else as_floats(member)
    count = mask.sum(1).clamp_(min=1)

    def average(x: Tensor) -> Tensor:
        return (x * mask).sum(1) / count

    center = average(weight).to(dtype) if mean else None
    deviation = weight if center is None else weight - center.float().unsqueeze(1)
    return Binarized(negative=deviation < 0, scale=average(deviation.abs()).to(dtype), mean=center)
