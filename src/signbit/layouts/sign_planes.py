"""Sign planes: W = mean + sum over planes of scale * sign, all of it times a scale of the column if there are any.

Stored for a matrix of n rows and m columns in G groups, with P planes:

| tensor | shape | dtype | what |
|---|---|---|---|
| signs | [P, n, packed_width(m)] | uint8 | bit 1 = negative |
| scales | [P, n, G] | scale dtype | |
| means | [n, G] | scale dtype | only if ``mean`` |
| column_scales | [m] | scale dtype | only if ``column_scales`` |

Plain sign, XNOR and residual binarization are stored this way.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from signbit.layouts.base import Layout, LayoutSpec, TensorSpec, group_count, scale_dtype, spread
from signbit.layouts.bits import pack_bits, packed_width, unpack_signs


@dataclass(frozen=True)
class SignPlanesSpec(LayoutSpec):
    planes: int
    group_size: int
    mean: bool
    scale_dtype: str
    column_scales: bool = False

    def matrix_tensors(self) -> dict[str, TensorSpec]:
        n, m = self.shape
        groups, dtype = group_count(m, self.group_size), scale_dtype(self.scale_dtype)
        tensors = {
            "signs": TensorSpec((self.planes, n, packed_width(m)), torch.uint8, "signs"),
            "scales": TensorSpec((self.planes, n, groups), dtype, "scales"),
        }
        if self.mean:
            tensors["means"] = TensorSpec((n, groups), dtype, "means")
        if self.column_scales:
            tensors["column_scales"] = TensorSpec((m,), dtype, "scales")
        return tensors


def reconstruct(signs: Tensor, scales: Tensor, means: Tensor | None) -> Tensor:
    """Values [n, k] of planes, in float32; methods and the layout both use this, so they agree to the bit.

    signs: float32 [P, n, k] of +-1; scales [P, n, k or 1] and means [n, k or 1]: float32.
    """
    values = scales[0] * signs[0]
    for plane in range(1, len(signs)):
        values = values + scales[plane] * signs[plane]
    return values if means is None else values + means


class SignPlanes(Layout):
    kind = "sign_planes"
    Spec = SignPlanesSpec
    spec: SignPlanesSpec
    signs: Tensor
    scales: Tensor

    @classmethod
    def encode(
        cls,
        negative: Tensor,
        scales: Tensor,
        means: Tensor | None,
        group_size: int,
        column_scales: Tensor | None = None,
    ) -> SignPlanes:
        """Pack bool planes ``[P, n, m]``; scales ``[P, n, G]``, means ``[n, G]`` and column scales ``[m]`` are already
        in storage dtype."""
        planes, n, m = negative.shape
        spec = SignPlanesSpec(
            shape=(n, m),
            planes=planes,
            group_size=group_size,
            mean=means is not None,
            scale_dtype=str(scales.dtype).removeprefix("torch."),
            column_scales=column_scales is not None,
        )
        tensors = {"signs": pack_bits(negative), "scales": scales}
        if means is not None:
            tensors["means"] = means
        if column_scales is not None:
            tensors["column_scales"] = column_scales
        return cls(spec, tensors)

    @property
    def nominal_bits(self) -> float:
        return float(self.spec.planes)

    def dequantize(self, rows: slice = slice(None)) -> Tensor:
        m, size = self.spec.shape[1], self.spec.group_size
        means = spread(self.get_buffer("means")[rows], size, m) if self.spec.mean else None
        values = reconstruct(unpack_signs(self.signs[:, rows], m), spread(self.scales[:, rows], size, m), means)
        return values * self.get_buffer("column_scales").float() if self.spec.column_scales else values
