"""Plain signs: W = mean + sum over planes of alpha_p sgn(residual_p), with no look at any data.

The baseline below all others: what one sign (or a few) a weight can do by itself. One plane is binary weights with the
least-squares scale; each further plane binarizes what the planes before it left over (Guo et al., arXiv 1706.02021,
equation 5).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from pydantic import Field
from torch import Tensor

from signbit.calibration.hessian import Factor
from signbit.layouts import SignPlanes
from signbit.layouts.bits import as_signs
from signbit.layouts.sign_planes import reconstruct
from signbit.methods.binarize import binarize
from signbit.methods.options import Method, MethodOptions, SweepOptions
from signbit.methods.sweep import sweep
from signbit.timing import phase


class SignOptions(MethodOptions):
    group_size: int = Field(0, ge=0, description="columns that share scales; 0: the whole row")
    mean: bool = Field(False, description="subtract and store a mean for every group")
    planes: int = Field(1, ge=1, le=8, description="sign planes; each binarizes the residual of those before")


@dataclass
class PlanesCode:
    """One group of sign planes: negative bool [P, n, k], scales [P, n], mean [n] or None."""

    negative: Tensor
    scales: Tensor
    mean: Tensor | None

    @classmethod
    def fit(cls, weight: Tensor, planes: int, mean: bool, dtype: torch.dtype) -> PlanesCode:
        fitted = [binarize(weight, None, mean, dtype)]
        residual = weight
        while len(fitted) < planes:
            residual = residual - fitted[-1].values()
            fitted.append(binarize(residual, None, False, dtype))
        return cls(torch.stack([f.negative for f in fitted]), torch.stack([f.scale for f in fitted]), fitted[0].mean)

    def values(self) -> Tensor:
        return self._values_of(self.negative)

    def assign(self, column: int, weights: Tensor) -> Tensor:
        at = slice(column, column + 1)
        residual = weights if self.mean is None else weights - self.mean.float()
        for plane, scale in enumerate(self.scales.float()):
            self.negative[plane, :, column] = residual < 0
            residual = residual - scale * as_signs(residual < 0)
        return self._values_of(self.negative[:, :, at]).squeeze(1)

    def features(self) -> Tensor:
        signs = as_signs(self.negative)
        return signs if self.mean is None else torch.cat([signs, torch.ones_like(signs[:1])])

    def set_coefficients(self, coefficients: Tensor) -> None:
        if self.mean is not None:
            self.mean = coefficients[-1].to(self.mean.dtype)
        # Larger scales first: then the greedy choice of signs is the nearest of all values.
        scales = coefficients[: len(self.scales)].abs().sort(0, descending=True).values
        self.scales = scales.to(self.scales.dtype)

    def _values_of(self, negative: Tensor) -> Tensor:
        # The layout's own sum, so that packing changes nothing.
        means = None if self.mean is None else self.mean.float().unsqueeze(1)
        return reconstruct(as_signs(negative), self.scales.float().unsqueeze(2), means)


def quantize_planes(
    weight: Tensor, factor: Factor | None, options: MethodOptions, planes: int, sweep_options: SweepOptions | None
) -> SignPlanes:
    """Sweep ``weight`` with sign planes per row and group."""
    size = options.groups_of(weight.shape[1])
    codes = sweep(
        weight,
        factor,
        size,
        lambda block, _: PlanesCode.fit(block, planes, options.mean, options.storage),
        sweep_options,
    )
    with phase("packing"):
        return SignPlanes.encode(
            negative=torch.cat([code.negative for code in codes], dim=2),
            scales=torch.stack([code.scales for code in codes], dim=2),
            means=torch.stack([code.mean for code in codes if code.mean is not None], dim=1) if options.mean else None,
            group_size=size,
        )


def quantize(weight: Tensor, factor: Factor | None, options: SignOptions) -> SignPlanes:
    return quantize_planes(weight, None, options, options.planes, None)


METHOD = Method(
    name="sign",
    summary="round to sign planes, no calibration",
    paper="XNOR-Net's binary weights, arXiv 1603.05279; planes: arXiv 1706.02021",
    layout=SignPlanes,
    options=SignOptions,
    calibrated=False,
    quantize=quantize,
)
