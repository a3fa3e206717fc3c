"""Straight-through estimators: what is rounded in the forward pass has a made-up derivative in the backward pass.

The sign of a latent weight w is given one of

    identity    1                       PB-LLM's code (arXiv 2310.00034): a weight can always come back
    tanh        1.001 - tanh(w)^2       OneBit's code (arXiv 2402.11295): fades where |w| > 1, never quite vanishes
    clip        1 if |w| <= 1 else 0    PB-LLM's equation 2, as BinaryConnect: what is far gone stays

and sgn(0) = +1, not torch.sign's 0, as everywhere else. At magnitudes of 0.01 the three are the same to one part in
ten thousand; they differ where latent weights are large.

These are formulas rather than autograd functions: a sign is taken and derived inside of the product that it is part of
(product.py), so that nothing of the matrix's size is kept for it. What is small goes through :func:`through`.
"""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor

Estimator = Literal["identity", "tanh", "clip"]


def sgn(latent: Tensor) -> Tensor:
    """+-1 in the latent's dtype."""
    # Adding 0.0 makes -0.0 positive. Several times faster on CPUs than comparing and choosing.
    return torch.copysign(torch.ones((), dtype=latent.dtype, device=latent.device), latent + 0.0)


def sgn_gradient(latent: Tensor, gradient: Tensor, estimator: Estimator) -> Tensor:
    """The gradient of ``latent`` from that of its sign."""
    if estimator == "identity":
        return gradient
    if estimator == "clip":
        return gradient * (latent.abs() <= 1)
    return torch.tanh(latent).square_().neg_().add_(1.001).mul_(gradient)


class _Through(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, latent: Tensor, value: Tensor) -> Tensor:
        return value

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return gradient, None


def through(latent: Tensor, value: Tensor) -> Tensor:
    """``value`` in the forward pass, ``latent`` in the backward pass; nothing is kept for it."""
    passed: Tensor = _Through.apply(latent, value.detach())
    return passed


def rounded(latent: Tensor, dtype: torch.dtype) -> Tensor:
    """``latent`` as ``dtype`` holds it, in float32; the gradient is that of no rounding."""
    return through(latent, latent.detach().to(dtype).float())
