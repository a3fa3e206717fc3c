"""Sign planes in training: OneBit, XNOR, residual planes, with means and scales of columns where the layout has them.

    U_ij = (a_0ig sgn(w_0ij) + a_1ig sgn(w_1ij) + ...) + mu_ig        g = the group of column j
    W_ij = U_ij c_j                                                   c = 1 without column scales

With G = dL/dW, and ste' the derivative that the sign is given (straight_through.py):

    dL/dc_j    = sum over i of G_ij U_ij
    dL/dmu_ig  = sum over j in g of G_ij c_j
    dL/da_pig  = sum over j in g of G_ij c_j sgn(w_pij)
    dL/dw_pij  = G_ij c_j a_pig ste'(w_pij)

OneBit's linear (arXiv 2402.11295, section 3.2), y = [(x * g) sgn(W)^T] * h, is one plane with a_i = h_i and c = g.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from signbit.errors import SignbitError
from signbit.layouts import SignPlanes
from signbit.layouts.base import spread
from signbit.layouts.bits import pack_bits, unpack_signs
from signbit.layouts.sign_planes import reconstruct
from signbit.training.linear import Coefficients, LatentLinear
from signbit.training.magnitudes import (
    counts_of,
    group_sums,
    magnitudes,
    margins,
    optimal_scales,
    relative_sizes,
    with_means,
)
from signbit.training.options import TrainingOptions
from signbit.training.product import Operands
from signbit.training.straight_through import Estimator, sgn, sgn_gradient


@dataclass(frozen=True)
class SignPlanesMatrix:
    """Operands: latents [P, n, m], scales [P, n, G], means [n, G] or None, columns [m] or None."""

    shape: tuple[int, int]
    group_size: int
    estimator: Estimator

    def values(
        self, rows: slice, latents: Tensor, scales: Tensor, means: Tensor | None, columns: Tensor | None
    ) -> Tensor:
        middle = None if means is None else self._spread(means[rows])
        values = reconstruct(sgn(latents[:, rows]), self._spread(scales[:, rows]), middle)
        return values if columns is None else values * columns

    def differentiate(
        self,
        rows: slice,
        gradient: Tensor,
        into: list[Any],
        latents: Tensor,
        scales: Tensor,
        means: Tensor | None,
        columns: Tensor | None,
    ) -> None:
        of_latents, of_scales, of_means, of_columns = into
        signs, factors = sgn(latents[:, rows]), self._spread(scales[:, rows])
        if of_columns is not None:
            middle = None if means is None else self._spread(means[rows])
            of_columns += (reconstruct(signs, factors, middle) * gradient).sum(0)
        if columns is not None:
            gradient = gradient * columns
        if of_means is not None:
            of_means[rows] = group_sums(gradient, self.group_size)
        for plane in range(len(latents)):
            if of_scales is not None:
                of_scales[plane, rows] = group_sums(signs[plane] * gradient, self.group_size)
            if of_latents is not None:
                of_sign = factors[plane] * gradient
                of_latents[plane, rows] = sgn_gradient(latents[plane, rows], of_sign, self.estimator)

    def _spread(self, coefficients: Tensor) -> Tensor:
        return spread(coefficients, self.group_size, self.shape[1])


class LatentSignPlanes(LatentLinear):
    start: SignPlanes

    def __init__(self, start: SignPlanes, weight: Tensor, bias: Tensor | None, options: TrainingOptions) -> None:
        super().__init__(start, bias, options)
        spec, trained = start.spec, options.scales != "fixed"
        self.optimal = options.scales == "optimal"
        if self.optimal and (spec.planes > 1 or spec.column_scales):
            raise SignbitError(
                "scales optimal are known for one sign plane without column scales only: use learned or fixed"
            )
        self.matrix = SignPlanesMatrix(start.shape, spec.group_size, options.straight_through)
        # Planes below each other: sharding over processes cuts the first dimension.
        self.latent = nn.Parameter(self._starting(weight, options).flatten(0, 1))
        self.scale = None if self.optimal else Coefficients(start.scales, trained)
        self.mean = Coefficients(start.get_buffer("means"), trained) if spec.mean else None
        self.columns = Coefficients(start.get_buffer("column_scales"), trained) if spec.column_scales else None

    def _starting(self, weight: Tensor, options: TrainingOptions) -> Tensor:
        spec = self.start.spec
        signs = unpack_signs(self.start.signs, spec.shape[1])
        sizes = self._sizes(weight, signs, options)
        if self.optimal:
            sizes[0] = with_means(sizes[0], self.start.scales[0], spec.group_size, self._counts())
            # A mean magnitude is never negative: the sign of such a scale goes to its weights.
            signs *= sgn(spread(self.start.scales, spec.group_size, spec.shape[1]))
        return signs * sizes

    def _sizes(self, weight: Tensor, signs: Tensor, options: TrainingOptions) -> Tensor:
        """Magnitudes [P, n, m]."""
        spec, every = self.start.spec, torch.ones_like(weight)
        if options.latent == "margins":
            coefficients = spread(self.start.scales, spec.group_size, spec.shape[1])
            if spec.column_scales:
                coefficients = coefficients * self.start.get_buffer("column_scales").float()
            found = margins(weight, self.start.dequantize(), signs, coefficients)
            return torch.stack([relative_sizes(plane, every, options) for plane in found])
        # What the original weight says is about the first plane; the others are corrections of it.
        sizes = torch.full_like(signs, options.latent_scale)
        sizes[0] = magnitudes(weight, every, options)
        return sizes

    def operands(self) -> Operands:
        mean = None if self.mean is None else self.mean()
        columns = None if self.columns is None else self.columns()
        return self._planes(), self._scales(), mean, columns

    def _largest_latent(self) -> float:
        # A mean of magnitudes is no larger than the largest.
        return torch.finfo(self.start.scales.dtype).max if self.optimal else super()._largest_latent()

    def packed_tensors(self) -> dict[str, Tensor]:
        coefficients = {"means": self.mean, "column_scales": self.columns}
        return {
            "signs": pack_bits(self._planes() < 0),
            "scales": self._scales().to(self.start.scales.dtype),
            **{name: one.packed() for name, one in coefficients.items() if one is not None},
        }

    def _planes(self) -> Tensor:
        """The latent weights [P, n, m]."""
        return self.latent.view(self.start.spec.planes, *self.start.shape)

    def _scales(self) -> Tensor:
        if self.scale is not None:
            scales: Tensor = self.scale()
            return scales
        spec = self.start.spec
        return optimal_scales(self.latent, spec.group_size, self._counts(), self.start.scales.dtype).unsqueeze(0)

    def _counts(self) -> Tensor:
        return counts_of(self.start.spec.shape[1], self.start.spec.group_size, self.start.device)
