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

from signbit.errors import SignbitError
from signbit.layouts.base import Layout, LayoutSpec, TensorSpec, group_count, is_count, scale_dtype, select, spread
from signbit.layouts.bits import pack_bits, packed_width, unpack_bits, unpack_floats, unpack_signs


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
        if not (is_count(self.salient_columns) and self.salient_groups <= groups):
            raise ValueError(f"{self.salient_columns!r} salient columns in {self.salient_groups!r} groups")
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


Pair = tuple[Tensor, Tensor]


def ordinary_values(signs: Tensor, sparse: Tensor, scales: Pair, means: Pair | None) -> Tensor:
    """Float32 values [n, k] of ordinary columns. signs: +-1 and sparse: 0 or 1, float32 [n, k].

    scales, means: float32 [n, k or 1], concentrated and sparse.
    """
    values = select(sparse, scales) * signs
    return values if means is None else values + select(sparse, means)


def salient_values(signs: Tensor, residual_signs: Tensor, scales: Pair, mean: Tensor | None) -> Tensor:
    """Float32 values [n, c] of salient columns; scales, mean: float32 [n, c or 1], first order and residual."""
    values = scales[0] * signs + scales[1] * residual_signs
    return values if mean is None else values + mean


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

    def check(self, name: str) -> None:
        marked = unpack_bits(self.salient, self.spec.shape[1]).nonzero().squeeze(1)
        groups = len((marked // (self.spec.group_size or self.spec.shape[1])).unique())
        if (len(marked), groups) != (self.spec.salient_columns, self.spec.salient_groups):
            raise SignbitError(
                f"{name}.salient marks {len(marked)} columns in {groups} groups, config.json says "
                f"{self.spec.salient_columns} in {self.spec.salient_groups}"
            )

    def dequantize(self, rows: slice = slice(None)) -> Tensor:
        m, size = self.spec.shape[1], self.spec.group_size
        signs, second = unpack_signs(self.signs[rows], m), unpack_floats(self.second[rows], m, 0.0, 1.0)
        values = ordinary_values(
            signs,
            second,
            _pair(spread(self.scales[rows].transpose(1, 2), size, m)),
            _pair(spread(self.get_buffer("means")[rows].transpose(1, 2), size, m)) if self.spec.mean else None,
        )
        if self.spec.salient_groups == 0:
            return values
        salient = unpack_bits(self.salient, m).nonzero().squeeze(1)
        # Coefficients are kept for groups that have salient columns only: each column's place among those groups.
        place = (salient // (size or m)).unique_consecutive(return_inverse=True)[1]
        values[:, salient] = salient_values(
            signs[:, salient],
            1 - 2 * second[:, salient],
            _pair(self.salient_scales[rows][:, place].float().transpose(1, 2)),
            self.get_buffer("salient_means")[rows][:, place].float() if self.spec.mean else None,
        )
        return values


def _pair(coefficients: Tensor) -> Pair:
    """[n, 2, k] as two [n, k]."""
    return coefficients[:, 0], coefficients[:, 1]
