"""Haar planes: two bits a Haar coefficient, and a few salient columns with codebooks of their own.

A codebook has two parts, concentrated and sparse, and stands for a coefficient by its sign and its part:

    C_ij = mean_g +/- scale_g              g = 0 concentrated, 1 sparse

The ``axis`` along which neighbours are paired (haar.py) decides which coefficients share one. In each row and group:

    row      W = Haar over adjacent columns of a group (C): a codebook for the low band and one for the high band.
             Salient columns have coefficients S beside C, with a third codebook: W[:, salient] += Haar over rows (S)
    column   W = Haar over adjacent rows (C): a codebook for ordinary columns and one for salient columns. A row of C is
             the low or the high band of a pair of rows

Stored for n rows, m columns, s of them salient, G groups, S of them with salient columns, B = 2 (row) or 1 (column):

| tensor | shape | dtype | what |
|---|---|---|---|
| signs | [n, packed_width(m)] | uint8 | bit 1 = negative |
| second | [n, packed_width(m)] | uint8 | bit 1 = sparse |
| scales | [n, G, B, 2] | scale dtype | concentrated, sparse |
| means | [n, G, B, M] | scale dtype | only if M = ``means`` > 0; M = 1: both parts have the same |
| salient | [packed_width(m)] | uint8 | bit 1 = salient column; this and the rest only if s > 0 |
| salient_scales | [n, S, 2] | scale dtype | |
| salient_means | [n, S, 2] | scale dtype | only if ``means`` > 0 |
| salient_signs, salient_second | [n, packed_width(s)] | uint8 | only along the row axis |
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from signbit.errors import SignbitError
from signbit.layouts.base import Layout, LayoutSpec, TensorSpec, group_count, scale_dtype, select
from signbit.layouts.bits import pack_bits, packed_width, unpack_bits, unpack_floats, unpack_signs
from signbit.layouts.haar import haar


@dataclass(frozen=True)
class HaarPlanesSpec(LayoutSpec):
    axis: str
    group_size: int
    means: int
    salient_columns: int
    salient_groups: int
    scale_dtype: str

    def matrix_tensors(self) -> dict[str, TensorSpec]:
        n, m = self.shape
        groups, dtype = group_count(m, self.group_size), scale_dtype(self.scale_dtype)
        if self.axis not in ("row", "column"):
            raise ValueError(f"axis {self.axis!r} is neither row nor column")
        if self.means > 2:
            raise ValueError(f"a codebook has 0, 1 or 2 means, not {self.means!r}")
        if self.salient_columns > m or self.salient_groups > groups:
            raise ValueError(f"{self.salient_columns!r} salient columns in {self.salient_groups!r} groups")
        plane = TensorSpec((n, packed_width(m)), torch.uint8, "signs")
        bands = 2 if self.axis == "row" else 1
        tensors = {
            "signs": plane,
            "second": TensorSpec(plane.shape, torch.uint8, "masks"),
            "scales": TensorSpec((n, groups, bands, 2), dtype, "scales"),
        }
        if self.means:
            tensors["means"] = TensorSpec((n, groups, bands, self.means), dtype, "means")
        if self.salient_columns:
            coefficients, width = (n, self.salient_groups, 2), packed_width(self.salient_columns)
            tensors["salient"] = TensorSpec((packed_width(m),), torch.uint8, "columns")
            tensors["salient_scales"] = TensorSpec(coefficients, dtype, "scales")
            if self.means:
                tensors["salient_means"] = TensorSpec(coefficients, dtype, "means")
            if self.axis == "row":
                tensors["salient_signs"] = TensorSpec((n, width), torch.uint8, "signs")
                tensors["salient_second"] = TensorSpec((n, width), torch.uint8, "masks")
        return tensors


Pair = tuple[Tensor, Tensor]


def code_values(signs: Tensor, second: Tensor, scales: Pair, means: Pair | None) -> Tensor:
    """Float32 coefficients; methods and the layout both use this, so they agree to the bit.

    signs: +-1 and second: 0 or 1, float32; scales, means: float32, concentrated and sparse.
    """
    values = select(second, scales) * signs
    return values if means is None else values + select(second, means)


@dataclass(frozen=True)
class SalientPart:
    """The salient columns (bool [m]) of a matrix, their codebooks [n, S, 2] and, along the row axis, planes [n, s]."""

    columns: Tensor
    scales: Tensor
    means: Tensor | None
    negative: Tensor | None = None
    second: Tensor | None = None


class HaarPlanes(Layout):
    kind = "haar_planes"
    Spec = HaarPlanesSpec
    of_columns = frozenset({"salient"})
    spec: HaarPlanesSpec
    scales: Tensor

    @classmethod
    def encode(
        cls,
        axis: str,
        negative: Tensor,
        second: Tensor,
        scales: Tensor,
        means: Tensor | None,
        salient: SalientPart | None,
        group_size: int,
    ) -> HaarPlanes:
        """Pack bool planes ``[n, m]`` of coefficients, with scales and means already in storage dtype."""
        n, m = negative.shape
        tensors = {"signs": pack_bits(negative), "second": pack_bits(second), "scales": scales}
        if means is not None:
            tensors["means"] = means
        if salient is not None:
            tensors |= {"salient": pack_bits(salient.columns), "salient_scales": salient.scales}
            if salient.means is not None:
                tensors["salient_means"] = salient.means
            if salient.negative is not None and salient.second is not None:
                tensors["salient_signs"] = pack_bits(salient.negative)
                tensors["salient_second"] = pack_bits(salient.second)
        spec = HaarPlanesSpec(
            shape=(n, m),
            axis=axis,
            group_size=group_size,
            means=0 if means is None else means.shape[-1],
            salient_columns=0 if salient is None else int(salient.columns.sum()),
            salient_groups=0 if salient is None else salient.scales.shape[1],
            scale_dtype=str(scales.dtype).removeprefix("torch."),
        )
        return cls(spec, tensors)

    @property
    def nominal_bits(self) -> float:
        beside = self.spec.salient_columns if self.spec.axis == "row" else 0
        return 1 + beside / self.spec.shape[1]

    def check(self, name: str) -> None:
        marked, place = self._salient()
        groups = len(place.unique())
        if (len(marked), groups) != (self.spec.salient_columns, self.spec.salient_groups):
            raise SignbitError(
                f"{name}.salient marks {len(marked)} columns in {groups} groups, config.json says "
                f"{self.spec.salient_columns} in {self.spec.salient_groups}"
            )

    def dequantize(self, rows: slice = slice(None)) -> Tensor:
        wanted = range(self.spec.shape[0])[rows]
        if not wanted:
            return torch.empty(0, self.spec.shape[1], device=self.device)
        # Whole pairs of rows, since the transform over rows mixes the two.
        first = min(wanted) // 2 * 2
        pairs = self._dequantize_pairs(slice(first, max(wanted) // 2 * 2 + 2))
        return pairs[wanted.start - first : wanted.stop - first : wanted.step]

    def _dequantize_pairs(self, rows: slice) -> Tensor:
        m, groups = self.spec.shape[1], self.scales.shape[1]
        size = self.spec.group_size or m
        columns = torch.arange(m, device=self.device)
        salient, place = self._salient()
        if self.spec.axis == "column":
            codebooks = columns // size
            codebooks[salient] = groups + place
            return haar(self._coefficients("", rows, codebooks), 0)
        codebooks = columns // size * 2 + columns % size % 2
        values = haar(self._coefficients("", rows, codebooks), 1, self.spec.group_size)
        if len(salient):
            values[:, salient] += haar(self._coefficients("salient_", rows, 2 * groups + place), 0)
        return values

    def _coefficients(self, prefix: str, rows: slice, codebooks: Tensor) -> Tensor:
        """Coefficients of the planes with this prefix; ``codebooks`` [k]: the number of each column's codebook."""
        count = len(codebooks)

        def pair(name: str) -> Pair:
            # Codebooks are numbered group by group, and after them those of salient columns.
            table = self.get_buffer(name)[rows].flatten(1, 2).expand(-1, -1, 2)
            if self.spec.salient_columns:
                table = torch.cat([table, self.get_buffer(f"salient_{name}")[rows]], 1)
            first, second = table.float().index_select(1, codebooks).unbind(2)
            return first, second

        return code_values(
            unpack_signs(self.get_buffer(f"{prefix}signs")[rows], count),
            unpack_floats(self.get_buffer(f"{prefix}second")[rows], count, 0.0, 1.0),
            pair("scales"),
            pair("means") if self.spec.means else None,
        )

    def _salient(self) -> tuple[Tensor, Tensor]:
        """The salient columns, and each one's place among the groups that have salient columns."""
        size = self.spec.group_size or self.spec.shape[1]
        if not self.spec.salient_columns:
            nothing = torch.empty(0, dtype=torch.int64, device=self.device)
            return nothing, nothing
        columns = unpack_bits(self.get_buffer("salient"), self.spec.shape[1]).nonzero().squeeze(1)
        return columns, (columns // size).unique_consecutive(return_inverse=True)[1]
