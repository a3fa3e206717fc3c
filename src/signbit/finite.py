"""Whether a tensor is free of NaN and infinities."""

from __future__ import annotations

import torch
from torch import Tensor


def all_finite(x: Tensor) -> bool:
    """One pass without temporaries: the extremes of a tensor with a NaN are NaN."""
    if x.numel() == 0 or not x.is_floating_point():
        return True
    low, high = torch.aminmax(x)
    return bool(torch.isfinite(low) & torch.isfinite(high))
