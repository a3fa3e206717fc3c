"""Split planes: two bits a weight, whose second bit means one thing or another by its column.

Each row and group has three codebooks: ordinary columns belong to a *concentrated* or a *sparse* group of weights, each
with its own scale (and mean); a few *salient* columns, the same for all rows, carry a second-order residual:

    ordinary   W_ij = mean_g  +/- scale_g              g = 0 concentrated, 1 sparse
    salient    W_ij = mean    +/- scale_o +/- scale_r

An ordinary weight needs its sign and its group, a salient weight needs its sign and the sign of its residual. So one
second plane serves both: at salient columns it holds residual signs, elsewhere group membership. Nothing is permuted
and nothing is stored twice; the salient columns cost one bit per column of the matrix, not per weight.

Stored for n rows, m columns, G groups of which S have salient columns:

| tensor | shape | dtype | what |
|---|---|---|---|
| signs | [n, packed_width(m)] | uint8 | bit 1 = negative |
| second | [n, packed_width(m)] | uint8 | ordinary column: 1 = sparse; salient column: 1 = residual is negative |
| salient | [packed_width(m)] | uint8 | 1 = salient column |
| scales | [n, G, 2] | scale dtype | concentrated, sparse |
| means | [n, G, 2] | scale dtype | only if ``mean`` |
| salient_scales | [n, S, 2] | scale dtype | first order, residual |
| salient_means | [n, S] | scale dtype | only if ``mean`` |
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from signbit.layouts.base import Layout, LayoutSpec, TensorSpec, by_group, group_count, scale_dtype
from signbit.layouts.bits import pack_bits, packed_width, unpack_bits


@dataclass(frozen=True)
class SplitPlanesSpec(LayoutSpec):
    group_size: int
    mean: bool
    salient_columns: int
    salient_groups: int
    scale_dtype: str

    def tensors(self) -> dict[str, TensorSpec]:
        n, m = self.shape
        groups, dtype = group_count(m, self.group_size), scale_dtype(self.scale_dtype)
        plane = TensorSpec((n, packed_width(m)), torch.uint8, "signs")
        tensors = {
            "signs": plane,
            "second": TensorSpec(plane.shape, torch.uint8, "masks"),
            "salient": TensorSpec((packed_width(m),), torch.uint8, "columns"),
            "scales": TensorSpec((n, groups, 2), dtype, "scales"),
            "salient_scales": TensorSpec((n, self.salient_groups, 2), dtype, "scales"),
        }
        if self.mean:
            tensors["means"] = TensorSpec((n, groups, 2), dtype, "means")
            tensors["salient_means"] = TensorSpec((n, self.salient_groups), dtype, "means")
        return tensors


def ordinary_values(negative: Tensor, sparse: Tensor, scales: Tensor, means: Tensor | None) -> Tensor:
    """Float32 values of ordinary columns. negative, sparse: bool [..., k]; scales, means: [..., 2]."""
    scales = scales.float()
    magnitude = torch.where(sparse, scales[..., 1:], scales[..., :1])
    values = torch.where(negative, -magnitude, magnitude)
    if means is None:
        return values
    means = means.float()
    return values + torch.where(sparse, means[..., 1:], means[..., :1])


def salient_values(negative: Tensor, residual: Tensor, scales: Tensor, means: Tensor | None) -> Tensor:
    """Float32 values of salient columns. negative, residual: bool [..., c]; scales: [..., 2]; means: [...]."""
    scales = scales.float()
    first, second = scales[..., :1], scales[..., 1:]
    values = torch.where(negative, -first, first) + torch.where(residual, -second, second)
    return values if means is None else values + means.float().unsqueeze(-1)


class SplitPlanes(Layout):
    kind = "split_planes"
    Spec = SplitPlanesSpec
    spec: SplitPlanesSpec
    signs: Tensor
    second: Tensor
    salient: Tensor
    scales: Tensor
    salient_scales: Tensor

    @classmethod
    def encode(
        cls,
        negative: Tensor,
        second: Tensor,
        salient: Tensor,
        scales: Tensor,
        means: Tensor | None,
        salient_scales: Tensor,
        salient_means: Tensor | None,
        group_size: int,
    ) -> SplitPlanes:
        """Pack bool planes ``[n, m]``, the bool column map ``[m]`` and coefficients already in storage dtype."""
        n, m = negative.shape
        spec = SplitPlanesSpec(
            shape=(n, m),
            group_size=group_size,
            mean=means is not None,
            salient_columns=int(salient.sum()),
            salient_groups=salient_scales.shape[1],
            scale_dtype=str(scales.dtype).removeprefix("torch."),
        )
        tensors = {
            "signs": pack_bits(negative),
            "second": pack_bits(second),
            "salient": pack_bits(salient),
            "scales": scales,
            "salient_scales": salient_scales,
        }
        if means is not None and salient_means is not None:
            tensors |= {"means": means, "salient_means": salient_means}
        return cls(spec, tensors)

    @property
    def nominal_bits(self) -> float:
        return 1 + self.spec.salient_columns / self.spec.shape[1]

    def dequantize(self, rows: slice = slice(None)) -> Tensor:
        m, size = self.spec.shape[1], self.spec.group_size
        negative = unpack_bits(self.signs[rows], m)
        second = unpack_bits(self.second[rows], m)
        salient = unpack_bits(self.salient, m)
        means = self.get_buffer("means")[rows] if self.spec.mean else None
        values = ordinary_values(by_group(negative, size), by_group(second, size), self.scales[rows], means)
        values = values.flatten(-2)[..., :m]
        columns = salient.nonzero().squeeze(1)
        if len(columns):
            # Coefficients are kept for groups that have salient columns only: number those groups.
            group = columns // (size or m)
            slot = torch.unique_consecutive(group, return_inverse=True)[1]
            means = self.get_buffer("salient_means")[rows][:, slot] if self.spec.mean else None
            values[:, columns] = salient_values(
                negative[:, columns, None], second[:, columns, None], self.salient_scales[rows][:, slot], means
            ).squeeze(-1)
        return values
