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
from signbit.methods.options import Method, MethodOptions
from signbit.methods.rounding import Choices
from signbit.methods.sweep import sweep
from signbit.timing import phase


class SignOptions(MethodOptions):
    group_size: int = Field(0, ge=0, description="columns that share scales; 0: the whole row")
    mean: bool = Field(False, description="subtract and store a mean for every group")
    planes: int = Field(1, ge=1, le=8, description="sign planes; each binarizes the residual of those before")


@dataclass
class PlanesCode:
    """One group of sign planes: negative bool [P, k, n], scales [P, n] and mean [n] or None in storage dtype.

    Columns come first, so that the column-by-column work is on runs of memory.
    """

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
        negative = torch.stack([f.negative.T for f in fitted])
        return cls(negative, torch.stack([f.scale for f in fitted]), fitted[0].mean)

    def __post_init__(self) -> None:
        self._scales, self._mean = self.scales.float(), None if self.mean is None else self.mean.float()

    def values(self) -> Tensor:
        return self._values(as_signs(self.negative.mT))

    def _values(self, signs: Tensor) -> Tensor:
        """Of signs [P, n or 1, k]; the layout's own sum, so that packing changes nothing."""
        means = None if self._mean is None else self._mean.unsqueeze(1)
        return reconstruct(signs, self._scales.unsqueeze(2), means)

    def choices(self) -> Choices:
        """Bit p of a place: whether plane p's sign is negative."""
        planes, columns, _ = self.negative.shape
        places = torch.arange(1 << planes, device=self.negative.device)
        negative = torch.stack([places >> plane & 1 for plane in range(planes)]).unsqueeze(1)
        which = torch.zeros(columns, 1, device=places.device)
        return Choices.among([self._values(as_signs(negative.bool())).T], which)

    def choose(self, places: Tensor) -> None:
        for plane, negative in enumerate(self.negative):
            torch.ne(places & 1 << plane, 0, out=negative)

    def features(self) -> Tensor:
        signs = as_signs(self.negative.mT)
        return signs if self.mean is None else torch.cat([signs, torch.ones_like(signs[:1])])

    def set_coefficients(self, coefficients: Tensor) -> None:
        if self.mean is not None:
            self.mean = coefficients[-1].to(self.mean.dtype)
        scales = coefficients[: len(self.scales)]
        self.negative = self.negative ^ (scales < 0).unsqueeze(1)
        self.scales = scales.abs().to(self.scales.dtype)
        self.__post_init__()


def pack(codes: list[PlanesCode], group_size: int, columns: Tensor | None = None) -> SignPlanes:
    """The codes of a matrix, one a group, left to right, as its layout; columns: scales [m], exact in their dtype."""
    means = [code.mean for code in codes if code.mean is not None]
    scales = torch.stack([code.scales for code in codes], dim=2)
    return SignPlanes.encode(
        negative=torch.cat([code.negative for code in codes], dim=1).mT,
        scales=scales,
        means=torch.stack(means, dim=1) if means else None,
        group_size=group_size,
        column_scales=None if columns is None else columns.to(scales.dtype),
    )


def quantize(weight: Tensor, factor: Factor | None, options: SignOptions) -> SignPlanes:
    size = options.groups_of(weight.shape[1])
    codes = sweep(
        weight,
        None,
        size,
        lambda block, _: PlanesCode.fit(block, options.planes, options.mean, options.storage),
        None,
    )
    with phase("packing"):
        return pack(codes, size)


METHOD = Method(
    name="sign",
    summary="round to sign planes, no calibration",
    paper="XNOR-Net's binary weights, arXiv 1603.05279; planes: arXiv 1706.02021",
    layout=SignPlanes,
    options=SignOptions,
    calibrated=False,
    quantize=quantize,
)
