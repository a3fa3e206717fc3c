"""Partial binarization: a sign and a scale for most weights, a code of a few bits for the salient ones.

    ordinary   W_ij = scale s + mean                             s = +-1
    salient    W_ij = code_scale s (q + 1/2) + code_offset       q = 0 .. 2^(code_bits - 1) - 1

The levels s (q + 1/2) are the 2^code_bits evenly spaced ones of an affine quantizer, counted from its middle. Their
sign is the sign that every weight has anyway: a salient weight stores code_bits - 1 bits beside it and none is wasted.
Without ``mean`` both kinds are symmetric around zero: there is neither mean nor code_offset.

Stored for n rows, m columns, G groups, C groups of codes, K salient weights:

| tensor | shape | dtype | what |
|---|---|---|---|
| signs | [n, packed_width(m)] | uint8 | bit 1 = negative |
| scales | [n, G] | scale dtype | |
| means | [n, G] | scale dtype | only if ``mean`` |
| positions | see positions.py | uint8 | which weights are salient |
| ends | [strips, 2], or [strips, 1] for a bitmap | int32 | salient weights, and gaps, up to the end of a strip |
| codes | [code_bits - 1, packed_width(K)] | uint8 | q of the salient weights, row by row, as bit planes |
| code_scales | [n, C] | scale dtype | |
| code_offsets | [n, C] | scale dtype | the middle of the quantizer's range; only if ``mean`` |

Groups of codes are those of the scales, or whole rows: ``code_group_size`` is ``group_size`` or 0.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from signbit.errors import SignbitError
from signbit.layouts import positions
from signbit.layouts.base import Layout, LayoutSpec, TensorSpec, group_count, scale_dtype, spread
from signbit.layouts.bits import pack_bits, pack_integers, packed_width, unpack_integers, unpack_signs
from signbit.layouts.positions import MAX_GAP_BITS, STRIP_ROWS, strip_count

MAX_CODE_BITS = 8
# Weights whose positions are checked at a time.
_CHECKED_WEIGHTS = 1 << 22


@dataclass(frozen=True)
class PartialSpec(LayoutSpec):
    """salient: how many weights are; gap_bits, gaps: of their positions (positions.py)."""

    group_size: int
    mean: bool
    salient: int
    gap_bits: int
    gaps: int
    code_bits: int
    code_group_size: int
    scale_dtype: str

    def matrix_tensors(self) -> dict[str, TensorSpec]:
        n, m = self.shape
        self._check()
        dtype = scale_dtype(self.scale_dtype)
        scales = TensorSpec((n, group_count(m, self.group_size)), dtype, "scales")
        code_scales = TensorSpec((n, group_count(m, self.code_group_size)), dtype, "scales")
        plane = TensorSpec((n, packed_width(m)), torch.uint8, "signs")
        stream = (self.gap_bits, packed_width(self.gaps)) if self.gap_bits else plane.shape
        tensors = {"signs": plane, "scales": scales}
        if self.mean:
            tensors["means"] = TensorSpec(scales.shape, dtype, "means")
        tensors["positions"] = TensorSpec(stream, torch.uint8, "masks")
        tensors["ends"] = TensorSpec((strip_count(n), 2 if self.gap_bits else 1), torch.int32, "masks")
        tensors["codes"] = TensorSpec((self.code_bits - 1, packed_width(self.salient)), torch.uint8, "codes")
        tensors["code_scales"] = code_scales
        if self.mean:
            tensors["code_offsets"] = TensorSpec(code_scales.shape, dtype, "means")
        return tensors

    def _check(self) -> None:
        """ValueError for numbers that no matrix has."""
        n, m = self.shape
        if self.salient > min(n * m, 2**31 - 1):
            raise ValueError(f"{self.salient!r} salient weights of {n * m}")
        if self.gap_bits > MAX_GAP_BITS or self.gap_bits == 1:
            raise ValueError(f"gaps of {self.gap_bits!r} bits")
        if self.gaps > min(n * m, 2**31 - 1) or (self.gaps and not self.gap_bits):
            raise ValueError(f"{self.gaps!r} gaps of {self.gap_bits} bits between {self.salient} salient weights")
        if not 1 < self.code_bits <= MAX_CODE_BITS:
            raise ValueError(f"codes of {self.code_bits!r} bits")
        if self.code_group_size not in (0, self.group_size):
            raise ValueError(f"code_group_size {self.code_group_size!r} is neither 0 nor {self.group_size}")


def ordinary_values(signs: Tensor, scale: Tensor, mean: Tensor | None) -> Tensor:
    """Float32 values of binarized weights; everything float32 and broadcast, signs +-1."""
    values = scale * signs
    return values if mean is None else values + mean


def salient_values(signs: Tensor, q: Tensor, scale: Tensor, offset: Tensor | None) -> Tensor:
    """Float32 values of coded weights; everything float32 and broadcast, signs +-1, q whole."""
    values = scale * (signs * (q + 0.5))
    return values if offset is None else values + offset


class Partial(Layout):
    kind = "partial"
    Spec = PartialSpec
    spec: PartialSpec
    signs: Tensor
    scales: Tensor
    positions: Tensor
    ends: Tensor
    codes: Tensor
    code_scales: Tensor

    @classmethod
    def encode(
        cls,
        negative: Tensor,
        scales: Tensor,
        means: Tensor | None,
        salient: Tensor,
        q: Tensor,
        code_bits: int,
        code_scales: Tensor,
        code_offsets: Tensor | None,
        group_size: int,
    ) -> Partial:
        """Pack bool ``negative`` and ``salient`` [n, m], integers ``q`` [n, m] (read where salient) and coefficients
        already in storage dtype: scales, means [n, G], code_scales, code_offsets [n, G] or, a row's, [n, 1]. Means and
        offsets are both there or both None."""
        if (means is None) != (code_offsets is None):
            raise ValueError("partial: means and code_offsets go together")
        n, m = negative.shape
        where = positions.encode(salient)
        spec = PartialSpec(
            shape=(n, m),
            group_size=group_size,
            mean=means is not None,
            salient=len(where.places),
            gap_bits=where.gap_bits,
            gaps=where.gaps,
            code_bits=code_bits,
            code_group_size=group_size if code_scales.shape[1] == scales.shape[1] else 0,
            scale_dtype=str(scales.dtype).removeprefix("torch."),
        )
        tensors = {
            "signs": pack_bits(negative),
            "scales": scales,
            "positions": where.stream,
            "ends": where.ends,
            "codes": pack_integers(q.flatten()[where.places], code_bits - 1),
            "code_scales": code_scales,
        }
        if means is not None and code_offsets is not None:
            tensors |= {"means": means, "code_offsets": code_offsets}
        return cls(spec, tensors)

    @property
    def nominal_bits(self) -> float:
        share = self.spec.salient / max(self.spec.shape[0] * self.spec.shape[1], 1)
        return 1 - share + share * self.spec.code_bits

    def dequantize(self, rows: slice = slice(None)) -> Tensor:
        n, m = self.spec.shape
        start, stop, step = rows.indices(n)
        stop = max(start, stop)
        first, last = start // STRIP_ROWS, strip_count(stop)
        # Whole strips, since that is how salient weights are found.
        top = first * STRIP_ROWS
        tile = slice(top, last * STRIP_ROWS)
        signs = unpack_signs(self.signs[tile], m)
        means = self._spread("means", tile) if self.spec.mean else None
        values = ordinary_values(signs, self._spread("scales", tile), means).flatten()
        strip, place, code = self._salient(first, last)
        place += strip * (STRIP_ROWS * m)
        row = place // m
        coefficient = row
        if self.code_scales.shape[1] > 1:
            coefficient = row * self.code_scales.shape[1] + (place - row * m) // self.spec.code_group_size

        def of_codes(name: str) -> Tensor:
            return self.get_buffer(name)[tile].float().flatten().index_select(0, coefficient)

        values[place] = salient_values(
            signs.flatten().index_select(0, place),
            unpack_integers(self.codes, code.start, code.stop),
            of_codes("code_scales"),
            of_codes("code_offsets") if self.spec.mean else None,
        )
        return values.view(-1, m)[start - top : stop - top : step]

    def salient_places(self) -> Tensor:
        """Where the salient weights are, as i m + j in the order of their codes: int64, ascending."""
        strip, place, _ = self._salient(0, len(self.ends))
        return place + strip * (STRIP_ROWS * self.spec.shape[1])

    def check(self, name: str) -> None:
        ends = self.ends.long()
        counts = [self.spec.salient, self.spec.gaps][: ends.shape[1]]
        steps = ends.diff(dim=0, prepend=torch.zeros_like(ends[:1]))
        if len(ends) and (bool((steps < 0).any()) or ends[-1].tolist() != counts):
            raise SignbitError(f"{name}.ends does not rise to {counts}, which config.json says: the file is damaged")
        n, m = self.spec.shape
        tile = max(1, _CHECKED_WEIGHTS // max(1, STRIP_ROWS * m))
        for first in range(0, len(ends), tile):
            last = min(first + tile, len(ends))
            strip, place, _ = self._salient(first, last)
            rows = (n - (first + strip) * STRIP_ROWS).clamp(max=STRIP_ROWS)
            found = torch.bincount(strip, minlength=last - first)
            if bool((place >= rows * m).any()) or not torch.equal(found, steps[first:last, 0]):
                raise SignbitError(
                    f"{name}.positions marks other weights of rows {first * STRIP_ROWS} to {last * STRIP_ROWS} than "
                    f"{name}.ends says: the file is damaged"
                )

    def _spread(self, name: str, rows: slice) -> Tensor:
        return spread(self.get_buffer(name)[rows], self.spec.group_size, self.spec.shape[1])

    def _salient(self, first: int, last: int) -> tuple[Tensor, Tensor, slice]:
        """The salient weights of some strips: their strip, from ``first`` on, their place in it, and their codes."""
        ends = torch.nn.functional.pad(self.ends.long(), (0, 0, 1, 0))[first : last + 1]
        start, stop = ends[0].tolist(), ends[-1].tolist()
        if self.spec.gap_bits:
            strip, place = positions.decode_gaps(self.positions, start[1], stop[1], ends[:, 1].diff())
        else:
            bitmap = self.positions[first * STRIP_ROWS : last * STRIP_ROWS]
            strip, place = positions.decode_bitmap(bitmap, self.spec.shape[1])
        return strip, place, slice(start[0], stop[0])
