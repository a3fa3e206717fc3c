"""Partial binarization in training: PB-LLM's second half (arXiv 2310.00034, section 3.3 and 3.4).

Which weights are salient was decided at the start and stays. The others are latent weights w,

    ordinary   W_ij = a_ig sgn(w_ij) + mu_ig                          g = the group of column j
    salient    W_ij = code_scale_i (s (q + 1/2)) + code_offset_i      as packed

with gradients as in sign_planes.py, and none from where a weight is salient. Salient weights are *frozen*: the paper
finds that training them beside the others disturbs both. With ``freeze_salient: false``, which is there to see that,
they are latent weights too, coded with the packed ranges in every forward pass and passed straight through.

The released code departs from the paper in its simulated 8 bits, which turn negative weights positive before training
begins; here salient weights are those of the packed start, in the layout's own codes.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from signbit.layouts import Partial
from signbit.layouts.base import spread
from signbit.layouts.bits import pack_bits, pack_integers, unpack_bits, unpack_signs
from signbit.layouts.partial import ordinary_values, salient_values
from signbit.training.linear import Coefficients, LatentLinear
from signbit.training.magnitudes import group_sums, magnitudes, margins, optimal_scales, relative_sizes, with_means
from signbit.training.options import TrainingOptions
from signbit.training.product import Operands
from signbit.training.straight_through import Estimator, sgn, sgn_gradient, through


@dataclass(frozen=True)
class PartialMatrix:
    """Operands: latents [n, m], scales [n, G], means [n, G] or None, salient values [K], their places i m + j [K].

    ends: salient weights up to the end of each row, [n + 1] with the 0 before the first.
    """

    shape: tuple[int, int]
    group_size: int
    estimator: Estimator
    ends: tuple[int, ...]

    def values(
        self, rows: slice, latents: Tensor, scales: Tensor, means: Tensor | None, salient: Tensor, places: Tensor
    ) -> Tensor:
        middle = None if means is None else self._spread(means[rows])
        values = ordinary_values(sgn(latents[rows]), self._spread(scales[rows]), middle)
        those, inside = self._salient(rows, places)
        values.view(-1).index_copy_(0, inside, salient[those])
        return values

    def differentiate(
        self,
        rows: slice,
        gradient: Tensor,
        into: list[Any],
        latents: Tensor,
        scales: Tensor,
        means: Tensor | None,
        salient: Tensor,
        places: Tensor,
    ) -> None:
        of_latents, of_scales, of_means, of_salient, _ = into
        those, inside = self._salient(rows, places)
        if of_salient is not None:
            of_salient[those] = gradient.flatten().index_select(0, inside)
        gradient = gradient.flatten().index_fill(0, inside, 0.0).view_as(gradient)
        if of_means is not None:
            of_means[rows] = group_sums(gradient, self.group_size)
        if of_scales is not None:
            of_scales[rows] = group_sums(gradient * sgn(latents[rows]), self.group_size)
        if of_latents is not None:
            of_sign = gradient * self._spread(scales[rows])
            of_latents[rows] = sgn_gradient(latents[rows], of_sign, self.estimator)

    def _salient(self, rows: slice, places: Tensor) -> tuple[slice, Tensor]:
        """The salient weights of some rows, and their places in these."""
        those = slice(self.ends[rows.start], self.ends[rows.stop])
        return those, places[those] - rows.start * self.shape[1]

    def _spread(self, coefficients: Tensor) -> Tensor:
        return spread(coefficients, self.group_size, self.shape[1])


class LatentPartial(LatentLinear):
    start: Partial
    places: Tensor
    counts: Tensor
    salient: Tensor

    def __init__(self, start: Partial, weight: Tensor, bias: Tensor | None, options: TrainingOptions) -> None:
        super().__init__(start, bias, options)
        spec, trained = start.spec, options.scales != "fixed"
        n, m = start.shape
        self.optimal, self.frozen = options.scales == "optimal", options.freeze_salient
        places = start.salient_places()
        self.register_buffer("places", places)
        firsts = torch.arange(n + 1, device=places.device) * m
        ends = tuple(torch.searchsorted(places, firsts).tolist())
        self.matrix = PartialMatrix(start.shape, spec.group_size, options.straight_through, ends)
        ordinary = torch.ones(n * m, device=places.device).index_fill_(0, places, 0.0).view(n, m)
        self.register_buffer("counts", group_sums(ordinary, spec.group_size).clamp_(min=1))
        self.latent = nn.Parameter(self._starting(weight, ordinary, options))
        self.scale = None if self.optimal else Coefficients(start.scales, trained)
        self.mean = Coefficients(start.get_buffer("means"), trained) if spec.mean else None
        values = start.dequantize().flatten().index_select(0, places)
        if self.frozen:
            self.register_buffer("salient", values)
        else:
            self.salient = nn.Parameter(values)

    def _starting(self, weight: Tensor, ordinary: Tensor, options: TrainingOptions) -> Tensor:
        """Latent weights, zero where a weight is salient."""
        spec = self.start.spec
        signs = unpack_signs(self.start.signs, spec.shape[1])
        if options.latent == "margins":
            found = margins(
                weight, self.start.dequantize(), signs, spread(self.start.scales, spec.group_size, spec.shape[1])
            )
            sizes = relative_sizes(found, ordinary, options) * ordinary
        else:
            sizes = magnitudes(weight, ordinary, options) * ordinary
        if self.optimal:
            sizes = with_means(sizes, self.start.scales, spec.group_size, self.counts)
            # A mean magnitude is never negative: the sign of such a scale goes to its weights.
            signs *= sgn(spread(self.start.scales, spec.group_size, spec.shape[1]))
        return signs * sizes

    def operands(self) -> Operands:
        mean = None if self.mean is None else self.mean()
        salient = self.salient if self.frozen else through(self.salient, self._coded()[2])
        return self.latent, self._scales(), mean, salient, self.places

    def _largest_latent(self) -> float:
        # A mean of magnitudes is no larger than the largest.
        return torch.finfo(self.start.scales.dtype).max if self.optimal else super()._largest_latent()

    def packed_tensors(self) -> dict[str, Tensor]:
        n, m = self.start.shape
        if self.frozen:
            negative = unpack_bits(self.start.signs, m).flatten().index_select(0, self.places)
            tensors = {}
        else:
            negative, q, _ = self._coded()
            tensors = {"codes": pack_integers(q.to(torch.uint8), self.start.spec.code_bits - 1)}
        signs = (self.latent < 0).flatten().index_copy_(0, self.places, negative).view(n, m)
        tensors |= {"signs": pack_bits(signs), "scales": self._scales().to(self.start.scales.dtype)}
        return tensors if self.mean is None else tensors | {"means": self.mean.packed()}

    def _scales(self) -> Tensor:
        if self.scale is not None:
            scales: Tensor = self.scale()
            return scales
        return optimal_scales(self.latent, self.start.spec.group_size, self.counts, self.start.scales.dtype)

    @torch.no_grad()
    def _coded(self) -> tuple[Tensor, Tensor, Tensor]:
        """The nearest codes to the salient latent weights: bool negative, whole q and value, all [K]."""
        step = self._of_codes("code_scales")
        offset = self._of_codes("code_offsets") if self.start.spec.mean else None
        deviation = self.salient if offset is None else self.salient - offset
        negative = deviation < 0
        q = deviation.abs() / step.clamp(min=torch.finfo(torch.float32).tiny)
        q = q.floor_().clamp_(max=2 ** (self.start.spec.code_bits - 1) - 1)
        return negative, q, salient_values(sgn(deviation), q, step, offset)

    def _of_codes(self, name: str) -> Tensor:
        """A coefficient of codes for each salient weight, float32 [K]."""
        spec = self.start.spec
        coefficients = spread(self.start.get_buffer(name), spec.code_group_size, spec.shape[1])
        return coefficients.flatten().index_select(0, self.places)
