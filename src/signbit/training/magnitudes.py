"""Magnitudes of latent weights: what they are at the start, and the optimal scale, which is made of them.

The magnitude of a latent weight is how far it has to go to change its sign. OneBit's code (arXiv 2402.11295) gives all
the same, 0.01 (``latent: constant``). The alternative is the original's |w|, in units in which a row's mean is
``latent_scale`` (``weights``): weights that hardly mattered turn first, and rows of small weights turn no sooner than
others. A magnitude of zero would lose the sign: none is less than a thousandth of the mean.

``margins`` asks what turning would do to the weight's error. Turned, a sign s with coefficient a > 0 changes it by

    (w - q + 2 a s)^2 - (w - q)^2 = 4 a d        d = a + s (w - q),  the margin

and d is how far w lies beyond the middle between q and what q would be turned. Turning moves the weight by 2 a, so
what a gradient of the weight promises for it grows with a just as the cost does: whether it pays is a matter of d. So
|d|, again in units in which the mean is ``latent_scale``, is how far the latent weight starts from zero. It takes
planes that correct others for what they are, and a sign that error feedback chose against its own weight is not turned
sooner than its opposite would be.

Not d / a, although a sign's gradient has the factor a: optimizers that divide by the gradient's size do not see it. A
part of few weights may have next to no scale, and error feedback leaves weights many scales away: a few d / a in the
hundreds then make up a row's mean, all others are next to zero by comparison, and a few steps turn them all. Factors,
which have no such parts, start at d / a (sign_factors.py).

With ``scales: optimal`` the scale of a row and group is PB-LLM's closed form (arXiv 2310.00034, section 3.3)

    alpha* = mean |w|       the least of || w - alpha sgn(w) ||^2,  w counted from the mean if the layout has one

taken anew in every forward pass, and a constant in the backward pass. Latent weights then start at the magnitudes that
give the packed scales, whatever ``latent_scale`` is. The paper's equation is one of a row, in its code a boolean index
makes one number of the whole matrix of it. There is no option for that: a scale of the matrix is a scale of rows with
all rows alike, which takes as many bits where they are stored by rows and can only fit worse.
"""

from __future__ import annotations

import torch
from torch import Tensor

from signbit.layouts.base import spread
from signbit.training.options import TrainingOptions

# The least magnitude at the start, as a fraction of the mean.
_LEAST = 2.0**-10
_TINY = torch.finfo(torch.float32).tiny


def magnitudes(weight: Tensor, ordinary: Tensor, options: TrainingOptions) -> Tensor:
    """How far latent weights [n, m] are from zero at the start. ordinary: float32 [n, m], 1 for those that count."""
    if options.latent == "constant":
        return torch.full_like(weight, options.latent_scale)
    return relative_sizes(weight.abs(), ordinary, options)


def margins(weight: Tensor, quantized: Tensor, signs: Tensor, coefficients: Tensor) -> Tensor:
    """|d| of each sign."""
    return (coefficients + signs * (weight - quantized)).abs()


def relative_sizes(sizes: Tensor, ordinary: Tensor, options: TrainingOptions) -> Tensor:
    """Sizes [n, m] in units in which the mean of each row, of those that count, is ``latent_scale``, as others are."""
    sizes = sizes * ordinary
    means = sizes.sum(1, keepdim=True) / ordinary.sum(1, keepdim=True).clamp(min=1)
    relative = torch.where((means > 0) & (ordinary > 0), sizes / means, 1.0)
    return options.latent_scale * relative.clamp_(min=_LEAST)


def with_means(sizes: Tensor, scales: Tensor, group_size: int, counts: Tensor) -> Tensor:
    """Magnitudes [n, m], zero where they do not count, in proportion to ``sizes`` and with mean |``scales``| [n, G]
    over the ``counts`` [n, G] of each row and group; where that is zero, as little as there is."""
    before = group_sums(sizes, group_size) / counts
    ratio = scales.float().abs() / before.clamp(min=_TINY)
    return (sizes * spread(ratio, group_size, sizes.shape[1])).clamp_(min=_TINY) * (sizes > 0)


def group_sums(values: Tensor, group_size: int) -> Tensor:
    """Sums [..., G] over the groups of the last dimension [..., m]; the last group may be narrower."""
    m = values.shape[-1]
    size = group_size or m
    full = m // size * size
    sums = values[..., :full].unflatten(-1, (full // size, size)).sum(-1)
    if full == m:
        return sums
    return torch.cat([sums, values[..., full:].sum(-1, keepdim=True)], dim=-1)


def optimal_scales(latents: Tensor, group_size: int, counts: Tensor, dtype: torch.dtype) -> Tensor:
    """alpha* [n, G], float32, exact in ``dtype``: mean magnitudes of latents [n, m], which are zero where they do not
    count, over the ``counts`` of each group."""
    groups = latents.detach().split(group_size or latents.shape[1], dim=1)
    parts = [torch.linalg.vector_norm(group, 1, dim=1) for group in groups]
    return (torch.stack(parts, dim=1) / counts).to(dtype).float()


def counts_of(columns: int, group_size: int, device: torch.device) -> Tensor:
    """Columns in each group, float32 [G]."""
    return group_sums(torch.ones(columns, device=device), group_size)
