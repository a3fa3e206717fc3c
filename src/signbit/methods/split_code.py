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
        self._is_salient = self.salient.tolist()
        self._marked = self.salient.nonzero().squeeze(1)

    @property
    def zones(self) -> int:
        """Zones of salient columns that there are coefficients of."""
        return (1 + self.bitmap) if any(self._is_salient) else 0

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
        values = self._ordinary(slice(None))
        if self.zones:
            values[:, self._marked] = self._salient(self._marked)
        return values

    def assign(self, column: int, weights: Tensor) -> Tensor:
        """The nearest of all values that a weight can have, its zone and its residual's sign included."""
        at = slice(column, column + 1)
        if self._is_salient[column]:
            return self._assign_salient(at, weights.unsqueeze(1)).squeeze(1)
        deviation = weights.unsqueeze(1) if self.means is None else weights.unsqueeze(1) - self.means
        distance = (deviation.abs() - scaled(self.scales, self._columns(at, salient=False))).abs()
        sparse = distance[1] < distance[0]
        self.sparse[:, at] = sparse
        self.negative[:, at] = (deviation if self.means is None else _choose(sparse, deviation)) < 0
        return self._ordinary(at).squeeze(1)

    def _assign_salient(self, at: slice, weights: Tensor) -> Tensor:
        deviation = weights if self.salient_means is None else weights - self.salient_means
        first, second = scaled(self.salient_scales, self._columns(at, salient=True)).unbind(1)
        negative, residual, distance = nearest_pair(deviation, first, second)
        if self.bitmap:
            sparse = distance[1] < distance[0]
            self.sparse[:, at] = sparse
            self.negative[:, at], self.residual[:, at] = _choose(sparse, negative), _choose(sparse, residual)
        else:
            self.negative[:, at], self.residual[:, at] = negative[0], residual[0]
        return self._salient(at)

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

    # The layout's own sums, so that packing changes nothing.

    def _ordinary(self, at: slice) -> Tensor:
        scales = scaled(self.scales, self._columns(at, salient=False))
        return ordinary_values(as_signs(self.negative[:, at]), self.sparse[:, at].float(), scales, self.means)

    def _salient(self, at: slice | Tensor) -> Tensor:
        return salient_values(
            as_signs(self.negative[:, at]),
            as_signs(self.residual[:, at]),
            self.sparse[:, at].float(),
            scaled(self.salient_scales, self._columns(at, salient=True)),
            self.salient_means,
        )

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


def _choose(second: Tensor, pair: Tensor) -> Tensor:
    return torch.where(second, pair[1], pair[0])


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
