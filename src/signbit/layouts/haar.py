"""The one-level Haar transform of pairs of neighbours: orthonormal, and its own inverse.

    low = (a + b) / sqrt 2      high = (a - b) / sqrt 2

Coefficients stand where their pair stood: low at the first place, high at the second. A last element without a partner
stays as it is (it counts as low), which keeps the transform orthonormal at odd lengths.
"""

from __future__ import annotations

import torch
from torch import Tensor

_ROOT_HALF = 0.5**0.5


def haar(x: Tensor, dim: int, group_size: int = 0) -> Tensor:
    """Transform ``x`` [n, m] along ``dim``; no pair reaches over the end of a group (0: one group of all)."""
    if group_size % 2:
        return torch.cat([haar(group, dim) for group in x.split(group_size, dim)], dim)
    pairs, rest = divmod(x.shape[dim], 2)
    a, b = x.narrow(dim, 0, 2 * pairs).unflatten(dim, (pairs, 2)).unbind(dim + 1)
    both = torch.stack([(a + b) * _ROOT_HALF, (a - b) * _ROOT_HALF], dim + 1).flatten(dim, dim + 1)
    return torch.cat([both, x.narrow(dim, 2 * pairs, rest)], dim) if rest else both
