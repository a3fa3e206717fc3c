"""Round to nearest: integers on an even grid for each row and group of columns, with no look at any data.

The quantizer of GPTQ (arXiv 2210.17323, section 4, "standard uniform per-row asymmetric quantization on the min-max
grid") by itself, and what stores embeddings and heads. With b bits, for a row of one group,

    asymmetric   lo = min(w, 0), hi = max(w, 0)
    symmetric    hi = max |w|, lo = -hi
    a = (hi - lo) / (2^b - 1)      z = round(-lo / a), symmetric: 2^(b-1)      q = clamp(round(w / a) + z, 0, 2^b - 1)

so that zero is exact and every weight is within half a step of its value. ``clip`` tries smaller ranges p lo .. p hi,
p = 1, 0.99 .. 0.21, and keeps for each row the one with the least sum of |error|^2.4: ``mse`` of GPTQ's released code,
which is off there by default too. Scales are rounded *up* to their storage dtype, or the ends of the range would be
more than half a step off. One difference to that code: its symmetric grid reaches only half as far as the weights in
rows without a negative weight; here it is symmetric in all.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from pydantic import Field
from torch import Tensor

from signbit.calibration.hessian import Factor
from signbit.layouts import Integers
from signbit.layouts.integers import middle, reconstruct
from signbit.methods.options import Method, MethodOptions, SweepOptions
from signbit.methods.rounding import Choices
from signbit.methods.sweep import sweep
from signbit.timing import phase

# The smaller ranges that are tried: 79 hundredths down from the whole one.
_CLIPS = [1 - i / 100 for i in range(80)]


class RTNOptions(MethodOptions):
    bits: int = Field(4, ge=2, le=8, description="of each weight's code")
    mean: bool = Field(True, description="asymmetric: a zero point beside every scale; false: symmetric")
    clip: bool = Field(False, description="search each row's range for the least error, instead of min to max")
    clip_norm: float = Field(2.4, gt=0, le=8, description="the power of errors that the search adds up")


class Grid:
    """Scales [n] in storage dtype and zero points [n], whole numbers in float32; what follows from them is kept."""

    def __init__(self, scales: Tensor, zeros: Tensor, bits: int) -> None:
        self.scales, self.zeros, self.bits = scales, zeros, bits
        self.steps = scales.float()
        # Dividing by infinity makes rows with a scale of 0 all zeros.
        self._divisor = self.steps.masked_fill(scales == 0, torch.inf)
        self._low, self._high = -zeros, 2**bits - 1 - zeros

    @classmethod
    def over(cls, lo: Tensor, hi: Tensor, options: RTNOptions) -> Grid:
        """The finest grid that reaches from ``lo`` <= 0 to ``hi`` >= 0, both [n]."""
        largest = 2**options.bits - 1
        scales = _round_up((hi - lo) / largest, options.storage)
        if options.mean:
            zeros = (-lo / scales.float()).nan_to_num_(0, 0).round_().clamp_(0, largest)
        else:
            zeros = torch.full_like(lo, middle(options.bits))
        return cls(scales, zeros, options.bits)

    def levels(self, weights: Tensor) -> Tensor:
        """q - z for weights [n], or [k, n], whole numbers in float32."""
        return torch.clamp((weights / self._divisor).round_(), self._low, self._high)


@dataclass
class IntegerCode:
    """One group: levels q - z, float32 [n, k], on a grid."""

    levels: Tensor
    grid: Grid

    @classmethod
    def fit(cls, weight: Tensor, options: RTNOptions) -> IntegerCode:
        hi = weight.amax(1).clamp_(min=0)
        lo = weight.amin(1).clamp_(max=0)
        if not options.mean:
            hi = torch.maximum(hi, -lo)
            lo = -hi
        with phase("search"):
            grid = _clipped(weight, lo, hi, options) if options.clip else Grid.over(lo, hi, options)
        return cls(grid.levels(weight.T).T, grid)

    def values(self) -> Tensor:
        return reconstruct(self.levels, self.grid.steps.unsqueeze(1))

    def choices(self) -> Choices:
        grid, which = self.grid, torch.zeros(self.levels.shape[1], 1, device=self.levels.device)
        return Choices.of_steps([reconstruct(-grid.zeros, grid.steps)], [grid.steps], [2**grid.bits], which)

    def choose(self, places: Tensor) -> None:
        # A row with a scale of 0 stays at zero: nothing may be made of its choices later.
        self.levels = ((places - self.grid.zeros) * (self.grid.steps > 0)).T

    def features(self) -> Tensor:
        return self.levels.unsqueeze(0)

    def set_coefficients(self, coefficients: Tensor) -> None:
        grid = self.grid
        self.grid = Grid(coefficients[0].abs().to(grid.scales.dtype), grid.zeros, grid.bits)


def _clipped(weight: Tensor, lo: Tensor, hi: Tensor, options: RTNOptions) -> Grid:
    """The best grid for each row over a part of its range."""
    weight = weight.T.contiguous()
    best = Grid.over(lo, hi, options)
    scales, zeros, least = best.scales, best.zeros, torch.full_like(lo, torch.inf)
    for part in _CLIPS:
        grid = Grid.over(part * lo, part * hi, options)
        error = reconstruct(grid.levels(weight), grid.steps).sub_(weight).abs_().pow_(options.clip_norm).sum(0)
        better = error < least
        least = torch.where(better, error, least)
        scales, zeros = torch.where(better, grid.scales, scales), torch.where(better, grid.zeros, zeros)
    return Grid(scales, zeros, options.bits)


def _round_up(scales: Tensor, dtype: torch.dtype) -> Tensor:
    """The least numbers of ``dtype``, 16 bits wide, that are no smaller than these (none negative)."""
    rounded = scales.to(dtype)
    # The next larger number is the next bit pattern.
    return (rounded.view(torch.int16) + (rounded.float() < scales)).view(dtype)


def quantize_integers(
    weight: Tensor, factor: Factor | None, options: RTNOptions, sweep_options: SweepOptions | None
) -> Integers:
    """Sweep ``weight`` with integers on one grid a row and group."""
    size = options.groups_of(weight.shape[1])
    codes = sweep(weight, factor, size, lambda block, _: IntegerCode.fit(block, options), sweep_options)
    with phase("packing"):
        unsigned = [code.levels + code.grid.zeros.unsqueeze(1) for code in codes]
        zeros = torch.stack([code.grid.zeros for code in codes], dim=1)
        return Integers.encode(
            codes=torch.cat(unsigned, dim=1).to(torch.uint8),
            scales=torch.stack([code.grid.scales for code in codes], dim=1),
            zeros=zeros.to(torch.uint8) if options.mean else None,
            bits=options.bits,
            group_size=size,
        )


def quantize(weight: Tensor, factor: Factor | None, options: RTNOptions) -> Integers:
    return quantize_integers(weight, None, options, None)


def integer_rows(weight: Tensor, bits: int, scale_dtype: Literal["float16", "bfloat16"]) -> Integers:
    """``weight`` [n, m] of any float dtype on one symmetric grid a row: for embeddings and heads."""
    return quantize(weight.float(), None, RTNOptions(bits=bits, group_size=0, mean=False, scale_dtype=scale_dtype))


METHOD = Method(
    name="rtn",
    summary="round to integers of 2 to 8 bits, no calibration",
    paper="the quantizer of GPTQ, arXiv 2210.17323",
    layout=Integers,
    options=RTNOptions,
    calibrated=False,
    quantize=quantize,
)
