"""Linears in training: real-valued latent weights behind a packed layout.

A latent linear is made from a packed matrix (what a method decided on: the start) and the original weight, computes
with exactly the matrix that its latents would be packed as, and is packed at the end in the layout that it came from.
Every layout has a latent form, so whatever a method decides on can be trained:

    packed layout --latent_of--> LatentLinear --train--> LatentLinear --pack--> packed layout
"""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from signbit.layouts import HaarPlanes, Integers, Layout, Partial, SignFactors, SignPlanes, SplitPlanes, Structured
from signbit.training.linear import LatentLinear
from signbit.training.options import TrainingOptions
from signbit.training.partial import LatentPartial
from signbit.training.planes import LatentPlanes
from signbit.training.sign_factors import LatentSignFactors
from signbit.training.sign_planes import LatentSignPlanes

__all__ = ["LatentLinear", "latent_of"]

_FORMS: dict[str, Callable[..., LatentLinear]] = {
    SignPlanes.kind: LatentSignPlanes,
    Partial.kind: LatentPartial,
    SignFactors.kind: LatentSignFactors,
    **dict.fromkeys((SplitPlanes.kind, HaarPlanes.kind, Structured.kind, Integers.kind), LatentPlanes),
}


def latent_of(packed: Layout, weight: Tensor, bias: Tensor | None, options: TrainingOptions) -> LatentLinear:
    """The latent linear that starts as ``packed``.

    weight: the original one, float32 [out, in]; bias: the module's own. SignbitError for options that the layout
    cannot have.
    """
    latent = _FORMS[packed.kind](packed, weight, bias, options)
    if not options.signs:
        for parameter in latent.latents():
            parameter.requires_grad_(False)
    return latent
