"""Split planes: two bits a weight, a sign and a second bit, with a few salient columns that carry a residual.

Each row and group has a codebook for each *zone* of weights. Ordinary columns have two zones, a *concentrated* and a
*sparse* one, each with its scale (and mean); a few *salient* columns, the same for all rows, are one zone more, or with
``bitmap`` two more, split like the rest, in which weights carry a second-order residual:

    ordinary   W_ij = mean  +/- scale
    salient    W_ij = mean  +/- scale_o +/- scale_r

Without ``bitmap`` an ordinary weight needs its sign and its zone, a salient weight its sign and that of its residual.
So one second plane serves both: at salient columns it holds residual signs, elsewhere zones. With ``bitmap`` that plane
holds zones everywhere, and residual signs have a plane of their own, as wide as there are salient columns. Nothing is
permuted; which columns are salient costs one bit per column of the matrix. With ``column_scales`` every scale is the
product of one of row and group and one of the column.

Stored for n rows, m columns of which C are salient, G groups of which S have salient columns; z: Z = 2 zones with
``bitmap``, else the dimension is absent:

| tensor | shape | dtype | what |
|---|---|---|---|
| signs | [n, packed_width(m)] | uint8 | bit 1 = negative |
| second | [n, packed_width(m)] | uint8 | 1 = sparse; at salient columns without ``bitmap``: 1 = residual is negative |
| residual | [n, packed_width(C)] | uint8 | only if ``bitmap``: residual signs of the salient columns, in order |
| salient | [packed_width(m)] | uint8 | 1 = salient column |
| scales | [n, G, 2] | scale dtype | concentrated, sparse |
| salient_scales | [n, S, (z,) 2] | scale dtype | first order, residual |
| column_scales | [2, m] | scale dtype | only if ``column_scales``; concentrated, sparse; not used at salient columns |
| salient_column_scales | [(z,) 2, C] | scale dtype | only if ``column_scales`` |
| means | [n, G, 2] | scale dtype | only if ``mean`` |
| salient_means | [n, S (, z)] | scale dtype | only if ``mean`` |
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from signbit.errors import SignbitError
from signbit.layouts.base import Layout, LayoutSpec, TensorSpec, group_count, scale_dtype, select, spread
from signbit.layouts.bits import pack_bits, packed_width, unpack_bits, unpack_floats, unpack_signs


@dataclass(frozen=True)
class SplitPlanesSpec(LayoutSpec):
    group_size: int
    mean: bool
    salient_columns: int
    salient_groups: int
    scale_dtype: str
    bitmap: bool = False
    column_scales: bool = False

    def matrix_tensors(self) -> dict[str, TensorSpec]:
        n, m = self.shape
        groups, dtype = group_count(m, self.group_size), scale_dtype(self.scale_dtype)
        if self.salient_columns > m or self.salient_groups > groups:
            raise ValueError(f"{self.salient_columns!r} salient columns in {self.salient_groups!r} groups")
        zones = (2,) if self.bitmap else ()
        plane = TensorSpec((n, packed_width(m)), torch.uint8, "signs")
        tensors = {
            "signs": plane,
            "second": TensorSpec(plane.shape, torch.uint8, "masks"),
            "salient": TensorSpec((packed_width(m),), torch.uint8, "columns"),
            "scales": TensorSpec((n, groups, 2), dtype, "scales"),
            "salient_scales": TensorSpec((n, self.salient_groups, *zones, 2), dtype, "scales"),
        }
        if self.bitmap:
            tensors["residual"] = TensorSpec((n, packed_width(self.salient_columns)), torch.uint8, "signs")
        if self.column_scales:
            tensors["column_scales"] = TensorSpec((2, m), dtype, "scales")
            tensors["salient_column_scales"] = TensorSpec((*zones, 2, self.salient_columns), dtype, "scales")
        if self.mean:
            tensors["means"] = TensorSpec((n, groups, 2), dtype, "means")
            tensors["salient_means"] = TensorSpec((n, self.salient_groups, *zones), dtype, "means")
        return tensors


def ordinary_values(signs: Tensor, sparse: Tensor, scales: Tensor, means: Tensor | None) -> Tensor:
    """Float32 values [n, k] of ordinary columns. signs: +-1 and sparse: 0 or 1, float32 [n, k].

    scales, means: float32 [2, n, k or 1], concentrated and sparse.
    """
    values = _zone(sparse, scales) * signs
    return values if means is None else values + _zone(sparse, means)


def salient_values(
    signs: Tensor, residual_signs: Tensor, sparse: Tensor, scales: Tensor, means: Tensor | None
) -> Tensor:
    """Float32 values [n, c] of salient columns of Z zones; where Z is 1, ``sparse`` is not looked at.

    scales: float32 [Z, 2, n, c or 1], first order and residual; means: [Z, n, c or 1].
    """
    values = _zone(sparse, scales[:, 0]) * signs + _zone(sparse, scales[:, 1]) * residual_signs
    return values if means is None else values + _zone(sparse, means)


def scaled(scales: Tensor, columns: Tensor | None) -> Tensor:
    """Scales of rows [..., n, k or 1] times those of columns [..., k], if there are any."""
    return scales if columns is None else scales * columns.unsqueeze(-2)


def _zone(sparse: Tensor, coefficients: Tensor) -> Tensor:
    return coefficients[0] if len(coefficients) == 1 else select(sparse, (coefficients[0], coefficients[1]))


class SplitPlanes(Layout):
    kind = "split_planes"
    Spec = SplitPlanesSpec
    of_columns = frozenset({"salient", "column_scales", "salient_column_scales"})
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
        residual: Tensor | None = None,
        column_scales: Tensor | None = None,
        salient_column_scales: Tensor | None = None,
    ) -> SplitPlanes:
        """Pack bool planes ``[n, m]`` and the bool column map ``[m]``; with a bitmap also ``residual`` ``[n, C]``.

        Coefficients are in the shapes and in the dtype that they are stored in.
        """
        n, m = negative.shape
        spec = SplitPlanesSpec(
            shape=(n, m),
            group_size=group_size,
            mean=means is not None,
            salient_columns=int(salient.sum()),
            salient_groups=salient_scales.shape[1],
            scale_dtype=str(scales.dtype).removeprefix("torch."),
            bitmap=residual is not None,
            column_scales=column_scales is not None,
        )
        tensors = {
            "signs": pack_bits(negative),
            "second": pack_bits(second),
            "salient": pack_bits(salient),
            "scales": scales,
            "salient_scales": salient_scales,
        }
        if residual is not None:
            tensors["residual"] = pack_bits(residual)
        if column_scales is not None and salient_column_scales is not None:
            tensors |= {"column_scales": column_scales, "salient_column_scales": salient_column_scales}
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
            scaled(spread(self.scales[rows].permute(2, 0, 1), size, m), self._optional("column_scales")),
            spread(self.get_buffer("means")[rows].permute(2, 0, 1), size, m) if self.spec.mean else None,
        )
        if self.spec.salient_groups:
            salient = unpack_bits(self.salient, m).nonzero().squeeze(1)
            values[:, salient] = self._salient_values(rows, salient, signs[:, salient], second[:, salient])
        return values

    def _salient_values(self, rows: slice, salient: Tensor, signs: Tensor, second: Tensor) -> Tensor:
        zones = 2 if self.spec.bitmap else 1
        # Coefficients are kept for groups that have salient columns only: each column's place among those groups.
        place = (salient // (self.spec.group_size or self.spec.shape[1])).unique_consecutive(return_inverse=True)[1]
        scales = self.salient_scales[rows][:, place].float().view(*signs.shape, zones, 2).permute(2, 3, 0, 1)
        columns, means = self._optional("salient_column_scales"), self._optional("salient_means")
        residual = unpack_signs(self.get_buffer("residual")[rows], len(salient)) if zones == 2 else 1 - 2 * second
        return salient_values(
            signs,
            residual,
            second,
            scaled(scales, None if columns is None else columns.view(zones, 2, -1)),
            None if means is None else means[rows][:, place].view(*signs.shape, zones).permute(2, 0, 1),
        )

    def _optional(self, name: str) -> Tensor | None:
        """A tensor that not every spec has, in float32."""
        return self._buffers[name].float() if name in self._buffers else None  # type: ignore[union-attr]
