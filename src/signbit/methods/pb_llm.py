"""PB-LLM: Partially Binarized Large Language Models (arXiv 2310.00034), its post-training half.

A few salient weights of a matrix, wherever they are, keep 8 bits; the rest is binarized:

1. Salience (section 3.2.1). s_ij = |w_ij| or w_ij^2 / U_jj^2. In each group of columns the ``salient_fraction`` of its
   weights with the largest salience, over all rows together, is salient. Exactly so many: ties go to the first.
2. Salient weights. Affine codes, evenly spaced over the range of the whole row:
       step = (max_j w_ij - min_j w_ij) / (2^bits - 1)
       w ~ step s (q + 1/2) + (max + min) / 2               s = +-1,  q = 0 .. 2^(bits - 1) - 1
3. The others, per row and group; averages over themselves only:
       b = sgn(w - mu),   mu = mean w,   alpha = mean|w - mu|;   w ~ mu + alpha b
4. All that looks at the original weights. Then GPTQ's sweep goes over the columns one by one, each weight taking the
   nearest of its values and passing its error on (sweep.py).

Paper and released code differ, and the preset ``pb-llm`` takes

- salience: Hessian. The paper's text prefers magnitude, but in its table 1 the Hessian is several times better at 10%
  salient weights; the code's default is magnitude, its instructions say Hessian.
- scale and mean: step 3. The code averages over all of a group's columns, the salient ones taken for zeros, which
  shrinks both by the share of the others: by a tenth at 10% salient weights, by half at 50%.
- codes: step 2. The code's training half casts to bytes before it clamps, which turns negative weights positive.
- when: before the sweep, as the code. Fitted at each group's turn, to weights that bear the errors of those before,
  the scales grow with these errors; the output error is 5 to 10% larger then on heavy-tailed random weights.
- groups of 128 columns, 10%: a column of table 1. The code's default is whole rows, which is about as good there.

What the preset ``pb-llm-plus`` changes. ``salience: error`` asks what binarizing a weight would cost rather than what
zeroing it would: s_ij = (w_ij - mu - alpha b)^2 / U_jj^2. A weight that happens to be as large as the scale needs no
code however salient it is, and one near zero may. alpha is that of the weights that are not chosen, so choice and scale
are found in turns. Codes have four bits and a searched range, which pays for more of them. Coefficients are one set a
row, no means, fitted again with the choices known (``refits``, ``passes``).

The decision is stored in the layout ``partial``.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, Self

import torch
from pydantic import Field, model_validator
from torch import Tensor

from signbit.calibration.hessian import Factor
from signbit.layouts import Partial
from signbit.layouts.base import select
from signbit.layouts.bits import as_signs
from signbit.layouts.partial import MAX_CODE_BITS, ordinary_values, salient_values
from signbit.methods.binarize import binarize
from signbit.methods.options import Feedback, Method, SweepOptions
from signbit.methods.salience import salience
from signbit.methods.sweep import sweep
from signbit.timing import phase

# Turns of choosing by error and scaling what was not chosen; more change little.
_ERROR_ROUNDS = 3
# The narrowest range that the search tries, as a fraction of that from the least to the greatest weight.
_NARROWEST = 0.4


class PBLLMOptions(SweepOptions):
    feedback: Feedback = Field("column", description="how the sweep passes a group's error on")
    salience: Literal["hessian", "magnitude", "error"] = Field("hessian", description="what makes a weight salient")
    salient_fraction: float = Field(0.1, ge=0, le=1, description="share of each group's weights that is salient")
    code_bits: int = Field(8, ge=2, le=MAX_CODE_BITS, description="bits of a salient weight, sign included")
    code_scope: Literal["row", "group"] = Field(
        "row",
        description="what has its own range of codes: a row, all weights in it, or its salient weights in a group",
    )
    range_candidates: int = Field(
        1, ge=1, le=100, description="how many ranges of codes are tried; 1: least to greatest"
    )

    @model_validator(mode="after")
    def _only_groups_are_fitted_again(self) -> Self:
        if self.code_scope == "row" and (self.refits or self.passes):
            raise ValueError("refits and passes work group by group and need code_scope group, which is row")
        return self


@dataclass
class PartialCode:
    """One group: negative, salient bool and q uint8 [n, k] (q means something where salient), coefficients [n] in
    storage dtype, q below ``levels``."""

    negative: Tensor
    salient: Tensor
    q: Tensor
    levels: int
    scale: Tensor
    mean: Tensor | None
    code_scale: Tensor
    code_offset: Tensor

    def __post_init__(self) -> None:
        self._to_columns()

    def values(self) -> Tensor:
        return self._values(slice(None))

    def assign(self, column: int, weights: Tensor) -> Tensor:
        at = slice(column, column + 1)
        self.choose(at, weights.unsqueeze(1))
        return self._values(at).squeeze(1)

    def choose(self, at: slice, weights: Tensor) -> None:
        """The nearest values to the weights [n, c] of some columns."""
        deviation = weights - select(self.salient[:, at].float(), (self._mean, self._offset))
        self.negative[:, at] = deviation < 0
        self.q[:, at] = (deviation.abs() * self._per_step).clamp_(max=self.levels - 1).to(torch.uint8)

    def features(self) -> Tensor:
        signs, salient = as_signs(self.negative), self.salient.float()
        rest = 1 - salient
        features = [signs * rest, signs * (self.q + 0.5) * salient, salient]
        return torch.stack(features if self.mean is None else [*features, rest])

    def set_coefficients(self, coefficients: Tensor) -> None:
        dtype = self.scale.dtype
        self.scale, self.code_scale = coefficients[:2].abs().to(dtype)
        self.code_offset = coefficients[2].to(dtype)
        if self.mean is not None:
            self.mean = coefficients[3].to(dtype)
        self._to_columns()

    def _to_columns(self) -> None:
        """Coefficients as float32 [n, 1], ready for the column-by-column work."""
        self._scale, self._step, self._offset = _columns(self.scale, self.code_scale, self.code_offset)
        self._mean = torch.zeros_like(self._scale) if self.mean is None else _columns(self.mean)[0]
        # A row whose codes are all alike has step 0: any q will do.
        self._per_step = torch.where(self._step > 0, 1 / self._step, 0.0)

    def _values(self, at: slice) -> Tensor:
        # The layout's own sums, so that packing changes nothing.
        signs = as_signs(self.negative[:, at])
        ordinary = ordinary_values(signs, self._scale, None if self.mean is None else self._mean)
        coded = salient_values(signs, self.q[:, at].float(), self._step, self._offset)
        return select(self.salient[:, at].float(), (ordinary, coded))


def _columns(*coefficients: Tensor) -> tuple[Tensor, ...]:
    return tuple(c.float().unsqueeze(1) for c in coefficients)


def find_salient(weight: Tensor, diagonal: Tensor, options: PBLLMOptions) -> Tensor:
    """Step 1 for one group [n, k], whose columns have U_jj = ``diagonal`` [k]; bool [n, k]."""
    if options.salience != "error":
        return most(salience(weight, diagonal, options.salience), options.salient_fraction)
    salient = torch.zeros_like(weight, dtype=torch.bool)
    for _ in range(_ERROR_ROUNDS):
        error = weight - binarize(weight, ~salient, options.mean, options.storage).values()
        salient = most((error / diagonal).square(), options.salient_fraction)
    return salient


def most(scores: Tensor, fraction: float) -> Tensor:
    """Where the largest of ``scores`` are, bool: this fraction of all, rounded to a count that ties do not change."""
    flat = scores.flatten()
    count = round(fraction * len(flat))
    if count == 0:
        return torch.zeros_like(scores, dtype=torch.bool)
    threshold = flat.kthvalue(len(flat) - count + 1).values
    above, tied = flat > threshold, flat == threshold
    return (above | (tied & (tied.cumsum(0) <= count - above.sum()))).view_as(scores)


def fit_codes(
    weight: Tensor, within: Tensor, salient: Tensor, importance: Tensor, options: PBLLMOptions
) -> tuple[Tensor, Tensor]:
    """Step 2: scale and offset of codes for each row of ``weight`` [n, k], from the range of the weights ``within``.

    Of ``range_candidates`` ranges around the same middle, down to a part of it, the one with the least squared error of
    the salient weights is taken, columns counting by their ``importance`` [k]. Rows without any get zeros.
    """
    levels = 2 ** (options.code_bits - 1)
    some = within.any(1)
    low = torch.where(some, weight.masked_fill(~within, torch.inf).amin(1), 0.0)
    high = torch.where(some, weight.masked_fill(~within, -torch.inf).amax(1), 0.0)
    offset = ((low + high) / 2).to(options.storage)
    steps = (high - low) / (2 * levels - 1)
    best, least = steps.to(options.storage), torch.full_like(steps, torch.inf)
    if options.range_candidates == 1:
        return best, offset
    middle, counted = offset.float().unsqueeze(1), salient * importance
    deviation = weight - middle
    for fraction in torch.linspace(1, _NARROWEST, options.range_candidates).tolist():
        step = (fraction * steps).to(options.storage)
        width = step.float().unsqueeze(1)
        q = (deviation.abs() / width.clamp(min=torch.finfo(width.dtype).tiny)).floor_().clamp_(max=levels - 1)
        error = salient_values(as_signs(deviation < 0), q, width, middle) - weight
        loss = (error.square() * counted).sum(1)
        best, least = torch.where(loss < least, step, best), torch.minimum(loss, least)
    return best, offset


def quantize(weight: Tensor, factor: Factor | None, options: PBLLMOptions) -> Partial:
    if factor is None:
        raise ValueError("pb-llm needs a Hessian")
    size = options.groups_of(weight.shape[1])
    weight = weight * ~factor.dead
    diagonal = factor.upper.diagonal()
    with phase("search"):
        groups = zip(*(x.split(size or weight.shape[1], dim=-1) for x in (weight, diagonal)), strict=True)
        salient = torch.cat([find_salient(block, part, options) for block, part in groups], dim=1)
    of_rows = None
    if options.code_scope == "row":
        with phase("fit"):
            of_rows = fit_codes(weight, torch.ones_like(salient), salient, diagonal**-2, options)

    def quantize_group(block: Tensor, columns: slice) -> PartialCode:
        original, marked = weight[:, columns], salient[:, columns]
        with phase("fit"):
            codes = of_rows or fit_codes(original, marked, marked, diagonal[columns] ** -2, options)
            rest = binarize(original, ~marked, options.mean, options.storage)
            q = torch.zeros_like(marked, dtype=torch.uint8)
            levels = 2 ** (options.code_bits - 1)
            code = PartialCode(rest.negative, marked, q, levels, rest.scale, rest.mean, *codes)
            code.choose(slice(None), block)
        return code

    codes = sweep(weight, factor, size, quantize_group, options)
    with phase("packing"):
        of_groups = codes[:1] if options.code_scope == "row" else codes
        return Partial.encode(
            negative=torch.cat([code.negative for code in codes], dim=1),
            scales=torch.stack([code.scale for code in codes], dim=1),
            means=torch.stack([code.mean for code in codes if code.mean is not None], dim=1) if options.mean else None,
            salient=salient,
            q=torch.cat([code.q for code in codes], dim=1),
            code_bits=options.code_bits,
            code_scales=torch.stack([code.code_scale for code in of_groups], dim=1),
            code_offsets=torch.stack([code.code_offset for code in of_groups], dim=1),
            group_size=size,
        )


METHOD = Method(
    name="pb-llm",
    summary="salient weights in 8 bits, the rest binarized, exact feedback column by column",
    paper="PB-LLM, arXiv 2310.00034",
    layout=Partial,
    options=PBLLMOptions,
    calibrated=True,
    quantize=quantize,
)
