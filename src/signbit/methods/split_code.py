"""The code of one group in the layout ``split_planes``: which zone, which sign, which residual sign, and coefficients.

BiLLM and ARB-LLM decide on one; error feedback, refits and coordinate descent (sweep.py, descent.py) work on it.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from signbit.layouts import SplitPlanes
from signbit.layouts.bits import as_signs
from signbit.layouts.split_planes import ordinary_values, salient_values, scaled
from signbit.methods.rounding import Choices


@dataclass
class SplitCode:
    """One group of k columns; the salient ones are one zone, or with ``bitmap`` two.

    negative, sparse, residual: bool [n, k]. ``sparse`` says which zone a weight is in, and is False at salient columns
    without ``bitmap``; ``residual`` means something at salient columns only. salient: bool [k].

    coefficients: float32 [F, n], exact in the storage ``dtype``: for Z zones of salient columns 2 scales of ordinary
    columns, Z x 2 of salient columns (first order, residual; none in a group without such columns), and if ``mean``
    2 means of ordinary columns and Z of salient ones. columns: scales of columns that all those scales are multiplied
    by, in the same order, float32 [2 + 2 (1 + bitmap), k] and exact in ``dtype`` too, or None.
    """

    negative: Tensor
    sparse: Tensor
    residual: Tensor
    salient: Tensor
    coefficients: Tensor
    columns: Tensor | None
    mean: bool
    bitmap: bool
    dtype: torch.dtype

    def __post_init__(self) -> None:
        self._marked = self.salient.nonzero().squeeze(1)

    @property
    def zones(self) -> int:
        """Zones of salient columns that there are coefficients of."""
        return (1 + self.bitmap) if len(self._marked) else 0

    @property
    def scales(self) -> Tensor:
        """Of ordinary columns, [2, n, 1]: concentrated, sparse."""
        return self.coefficients[:2].unsqueeze(2)

    @property
    def salient_scales(self) -> Tensor:
        """[Z, 2, n, 1]: first order, residual."""
        return self.coefficients[2 : self.scale_count].view(self.zones, 2, -1, 1)

    @property
    def means(self) -> Tensor | None:
        """Of ordinary columns, [2, n, 1]."""
        return self.coefficients[self.scale_count :][:2].unsqueeze(2) if self.mean else None

    @property
    def salient_means(self) -> Tensor | None:
        """[Z, n, 1]."""
        return self.coefficients[self.scale_count + 2 :].unsqueeze(2) if self.mean else None

    @property
    def scale_count(self) -> int:
        """How many of the coefficients are scales; the others are means."""
        return 2 + 2 * self.zones

    def values(self) -> Tensor:
        values = self._ordinary(slice(None), self.negative, self.sparse)
        if self.zones:
            planes = (plane[:, self._marked] for plane in (self.negative, self.residual, self.sparse))
            values[:, self._marked] = self._salient(self._marked, *planes)
        return values

    def choices(self) -> Choices:
        """A place's bits, the lowest first: the sign; of salient columns the residual's sign; the zone.

        Columns with scales of their own have tables of their own.
        """
        marked, each = self._marked, self.columns is not None
        places = torch.arange(8, device=marked.device).view(-1, 1, 1)
        first, second, third = ((places >> bit & 1).bool() for bit in range(3))
        tables = [*self._ordinary(slice(None) if each else slice(1), first[:4], second[:4]).permute(2, 0, 1)]
        which = torch.arange(len(self.salient), device=marked.device)
        if not each:
            which.zero_()
        if self.zones:
            count, at = 4 * self.zones, marked if each else marked[:1]
            doubled = self._salient(at, first[:count], second[:count], third[:count])
            which[marked] = len(tables) + torch.arange(len(at), device=marked.device)
            tables += doubled.permute(2, 0, 1)
        return Choices.among(tables, which.unsqueeze(1))

    def choose(self, places: Tensor) -> None:
        first, second, third = (places.T >> bit & 1 != 0 for bit in range(3))
        self.negative, self.residual = first, second & self.salient
        self.sparse = torch.where(self.salient, third, second)

    def features(self) -> Tensor:
        signs, residual = as_signs(self.negative), as_signs(self.residual)
        sparse, salient = self.sparse.float(), self.salient.float()
        parts = [1 - sparse, sparse]
        ordinary = [part * (1 - salient) for part in parts]
        doubled = [part * salient for part in (parts if self.bitmap else [torch.ones_like(sparse)])][: self.zones]
        features = [signs * zone for zone in ordinary] + [sign * zone for zone in doubled for sign in (signs, residual)]
        if self.columns is not None:
            features = [feature * column for feature, column in zip(features, self.columns, strict=False)]
        return torch.stack(features + ordinary + doubled if self.mean else features)

    def set_coefficients(self, coefficients: Tensor) -> None:
        turned = (coefficients[: self.scale_count] < 0).unsqueeze(2)
        self.negative ^= torch.where(self.sparse, turned[1], turned[0]) & ~self.salient
        for zone in range(self.zones):
            member = self.salient & (self.sparse == bool(zone)) if self.bitmap else self.salient
            self.negative ^= member & turned[2 + 2 * zone]
            self.residual ^= member & turned[3 + 2 * zone]
        coefficients = coefficients.clone()
        coefficients[: self.scale_count].abs_()
        self.coefficients = coefficients.to(self.dtype).float()

    # The layout's own sums, so that packing changes nothing: values of columns ``at``, given their bits.

    def _ordinary(self, at: slice, negative: Tensor, sparse: Tensor) -> Tensor:
        scales = scaled(self.scales, self._columns(at, salient=False))
        return ordinary_values(as_signs(negative), sparse.float(), scales, self.means)

    def _salient(self, at: Tensor, negative: Tensor, residual: Tensor, sparse: Tensor) -> Tensor:
        scales = scaled(self.salient_scales, self._columns(at, salient=True))
        return salient_values(as_signs(negative), as_signs(residual), sparse.float(), scales, self.salient_means)

    def _columns(self, at: slice | Tensor, salient: bool) -> Tensor | None:
        """Scales of columns ``at``: [2, c], or of salient ones [Z, 2, c]."""
        if self.columns is None:
            return None
        return self.columns[2:, at].unflatten(0, (-1, 2)) if salient else self.columns[:2, at]


def nearest_pair(deviation: Tensor, first: Tensor, second: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The nearest of the four values +-first +-second, scales not negative: where the two signs are negative, and the
    distance that is left."""
    # Taking the larger scale's sign first makes the greedy choice the nearest.
    larger = deviation < 0
    rest = deviation - torch.maximum(first, second) * as_signs(larger)
    smaller, swapped = rest < 0, second > first
    distance = (rest.abs() - torch.minimum(first, second)).abs()
    return torch.where(swapped, smaller, larger), torch.where(swapped, larger, smaller), distance


def pack(codes: list[SplitCode], group_size: int) -> SplitPlanes:
    """The codes of a matrix, one a group, left to right, as its layout."""
    negative, sparse, residual = (
        torch.cat([getattr(code, plane) for code in codes], dim=1) for plane in ("negative", "sparse", "residual")
    )
    salient = torch.cat([code.salient for code in codes])
    bitmap, mean, dtype = codes[0].bitmap, codes[0].mean, codes[0].dtype
    zones = (2,) if bitmap else ()
    marked = [code for code in codes if code.zones]

    def stored(parts: list[Tensor | None], *shape: int) -> Tensor:
        """Coefficients [..., n, 1] of groups, as [n, groups, *shape]."""
        present = [part.squeeze(-1).movedim(-1, 0).reshape(-1, *shape) for part in parts if part is not None]
        nothing = torch.zeros(len(negative), 0, *shape, device=negative.device)
        return (torch.stack(present, dim=1) if present else nothing).to(dtype)

    columns = [code.columns for code in codes if code.columns is not None]
    column_scales = torch.cat(columns, dim=1).to(dtype) if columns else None
    return SplitPlanes.encode(
        negative=negative,
        second=sparse if bitmap else (residual & salient) | (sparse & ~salient),
        salient=salient,
        scales=stored([code.scales for code in codes], 2),
        means=stored([code.means for code in codes], 2) if mean else None,
        salient_scales=stored([code.salient_scales for code in marked], *zones, 2),
        salient_means=stored([code.salient_means for code in marked], *zones) if mean else None,
        group_size=group_size,
        residual=residual[:, salient] if bitmap else None,
        column_scales=column_scales[:2] if column_scales is not None else None,
        salient_column_scales=column_scales[2:, salient].view(*zones, 2, -1) if column_scales is not None else None,
    )
