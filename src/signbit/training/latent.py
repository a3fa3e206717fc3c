"""Linears in training: real-valued latent weights behind a packed layout.

A latent linear is made from a packed matrix (what a method decided on: the start) and the original weight, computes with
exactly the matrix that its latents would be packed as, and is packed at the end in the layout that it came from. So
whatever layout has a latent form can be trained, whichever method decided on it:

    packed layout --latent_of--> LatentLinear --train--> LatentLinear --pack--> packed layout
"""

from __future__ import annotations

from torch import Tensor, nn

from signbit.layouts import Layout


class LatentLinear(nn.Module):
    """``y = x W^T + b`` with W = ``weight()``, the matrix that :meth:`pack` stores, to the bit.

    Parameters that require gradients are trained, all float32; everything else is a buffer. ``latents()`` and
    ``scales()`` partition the trained ones, for their learning rates.
    """

    bias: nn.Parameter | None

    def latents(self) -> list[nn.Parameter]:
        raise NotImplementedError

    def scales(self) -> list[nn.Parameter]:
        raise NotImplementedError

    def weight(self) -> Tensor:
        """[out, in] float32, differentiable."""
        raise NotImplementedError

    def pack(self) -> Layout:
        raise NotImplementedError

    def forward(self, x: Tensor) -> Tensor:
        raise NotImplementedError
