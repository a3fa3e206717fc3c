"""PB-LLM: Partially Binarized Large Language Models (arXiv 2310.00034), its post-training half.

A few salient weights of a matrix, wherever they are, keep 8 bits; the rest is binarized:

1. Salience (section 3.2.1). s_ij = |w_ij| or w_ij^2 / U_jj^2. In each group of columns the ``salient_fraction`` of its
   weights with the largest salience, over all rows together, is salient. Exactly so many: ties go to the first.
   ``two-tails`` is the choice of the paper's training code: of the whole matrix, half that share of lowest values and
   half of highest.
2. Salient weights. Affine codes, evenly spaced over the range of the whole row:
       step = (max_j w_ij - min_j w_ij) / (2^bits - 1)
       w ~ step s (q + 1/2) + (max + min) / 2               s = +-1,  q = 0 .. 2^(bits - 1) - 1
   ``mean: false`` is for the codes too: the range is then -max_j |w_ij| to max_j |w_ij|, with no middle to store.
3. The others, per row and group; averages over themselves only:
       b = sgn(w - mu),   mu = mean w,   alpha = mean|w - mu|;   w ~ mu + alpha b
4. All that looks at the original weights. Then GPTQ's sweep goes over the columns one by one, each weight taking the
   nearest of its values and passing its error on (sweep.py).

Paper and released code differ, and the preset ``pb-llm`` takes

- salience: Hessian. The paper's text prefers magnitude, but in its table 1 the Hessian is several times better at 10%
  salient weights; the code's default is magnitude, its instructions say Hessian.
- scale and mean (``averages``): the code's. It averages over all of a group's columns, salient weights taken for zeros,
      mu = sum w / k,   alpha = sum |w - mu| / k          sums over the group with zeros at salient weights, k columns
  which shrinks both, by a tenth at 10% salient weights and by half at 50%. Step 3 fits each weight better, but not the
  layer's output once errors are fed back: on the demo model shrinking takes 6 to 12% off the output error, and it is
  what the published figures were made with.
- codes: step 2. The code's training half casts to bytes before it clamps, which turns negative weights positive.
- when: before the sweep, as the code. Fitted at each group's turn, to weights that bear the errors of those before,
  the scales grow with these errors; the output error is 5 to 10% larger then on heavy-tailed random weights.
- groups of 128 columns, 10%: a column of table 1. The code's default is whole rows, which is about as good there.

What the preset ``pb-llm-plus`` changes. ``salience: error`` asks what binarizing a weight would cost rather than what
zeroing it would: s_ij = (w_ij - mu - alpha b)^2 / U_jj^2. A weight that happens to be as large as the scale needs no
code however salient it is, and one near zero may. alpha is that of the weights that are not chosen, so choice and scale
are found in turns. Codes have three bits and a searched range, which pays for more of them. Coefficients are two scales
a row, no means, fitted again with the choices known (``refits``, ``passes``).

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
from signbit.layouts.bits import as_floats, as_signs
from signbit.layouts.partial import MAX_CODE_BITS, salient_values
from signbit.methods.binarize import Binarized, binarize
from signbit.methods.options import Feedback, Method, SweepOptions
from signbit.methods.rounding import Choices, round_in_turn
from signbit.methods.salience import salience
from signbit.methods.sorting import kth_smallest
from signbit.methods.sweep import sweep
from signbit.timing import phase

# Turns of choosing by error and scaling what was not chosen; more change little.
_ERROR_ROUNDS = 3
# The narrowest range that the search tries, as a fraction of that from the least to the greatest weight.
_NARROWEST = 0.4


class PBLLMOptions(SweepOptions):
    mean: bool = Field(True, description="store a mean beside every scale, and the middle of every range of codes")
    feedback: Feedback = Field("column", description="how the sweep passes a group's error on")
    salience: Literal["hessian", "magnitude", "error", "two-tails"] = Field(
        "hessian", description="what makes a weight salient; two-tails: the matrix's lowest and highest values"
    )
    salient_fraction: float = Field(
        0.1, ge=0, le=1, description="share of each group's weights that is salient; of the matrix's for two-tails"
    )
    averages: Literal["binarized", "group"] = Field(
        "binarized",
        description="scale and mean of binarized weights: averages over them, or the released code's, which are over "
        "all of the group with zeros at salient weights",
    )
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
    """One group: level float32 and salient bool [k, n]. A level is s (q + 1/2), with q below ``levels``; where a weight
    is not salient, q is 0 and the level half a sign.

    Coefficients [n] in storage dtype; mean and code_offset are both there or both None. Columns come first, so that the
    column-by-column work is on runs of memory.
    """

    level: Tensor
    salient: Tensor
    levels: int
    scale: Tensor
    mean: Tensor | None
    code_scale: Tensor
    code_offset: Tensor | None

    @property
    def negative(self) -> Tensor:
        return self.level < 0

    @property
    def q(self) -> Tensor:
        return self.level.abs() - 0.5

    def values(self) -> Tensor:
        # lerp is exact at both ends, and many times faster than torch.where.
        salient = as_floats(self.salient)
        return torch.lerp(self._ordinary(self.level), self._coded(self.level), salient).T

    # The layout's sums, so that packing changes nothing: halves of a doubled scale are exact.

    def _ordinary(self, level: Tensor) -> Tensor:
        values = 2 * self.scale.float() * level
        return values if self.mean is None else values + self.mean.float()

    def _coded(self, level: Tensor) -> Tensor:
        values = self.code_scale.float() * level
        return values if self.code_offset is None else values + self.code_offset.float()

    def choices(self) -> Choices:
        lowest = torch.tensor([0.5, self.levels - 0.5]).neg_().to(self.level.device)
        first = [self._ordinary(lowest[0]), self._coded(lowest[1])]
        step = [2 * self.scale.float(), self.code_scale.float()]
        return Choices.of_steps(first, step, [2, 2 * self.levels], self.salient)

    def choose(self, places: Tensor) -> None:
        self.level = places + torch.where(self.salient, 0.5 - self.levels, -0.5)

    def features(self) -> Tensor:
        salient = as_floats(self.salient)
        rest = 1 - salient
        features = [2 * self.level * rest, self.level * salient]
        if self.mean is not None:
            features += [rest, salient]
        return torch.stack(features).mT

    def set_coefficients(self, coefficients: Tensor) -> None:
        dtype = self.scale.dtype
        signs = as_signs(coefficients[:2] < 0)
        self.level *= torch.where(self.salient, signs[1], signs[0])
        self.scale, self.code_scale = coefficients[:2].abs().to(dtype)
        if self.mean is not None:
            self.mean, self.code_offset = coefficients[2:].to(dtype)


def find_all_salient(weight: Tensor, diagonal: Tensor, size: int, options: PBLLMOptions) -> Tensor:
    """Step 1: bool [n, m], for groups of ``size`` columns, 0 for one group."""
    if options.salience == "two-tails":
        return two_tails(weight, options.salient_fraction)
    groups = zip(*(x.split(size or weight.shape[1], dim=-1) for x in (weight, diagonal)), strict=True)
    return torch.cat([find_salient(block, part, options) for block, part in groups], dim=1)


def two_tails(weight: Tensor, fraction: float) -> Tensor:
    """The lowest and the highest weights, each half of this fraction; bool like ``weight``."""
    low = most(-weight, fraction / 2)
    # The other half is of what is left, so that equal weights are not counted twice.
    return low | most(weight.masked_fill(low, -torch.inf), fraction / 2)


def find_salient(weight: Tensor, diagonal: Tensor, options: PBLLMOptions) -> Tensor:
    """Step 1 for one group [n, k], whose columns have U_jj = ``diagonal`` [k]; bool [n, k]."""
    if options.salience in ("hessian", "magnitude"):
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
    threshold = kth_smallest(flat, len(flat) - count + 1)
    found = flat > threshold
    tied = (flat == threshold).nonzero().squeeze(1)
    found[tied[: count - int(found.sum())]] = True
    return found.view_as(scores)


def binarize_rest(weight: Tensor, salient: Tensor, options: PBLLMOptions) -> Binarized:
    """Step 3 for one group [n, k]; of averages over the group, salient weights are part as zeros."""
    if options.averages == "binarized":
        return binarize(weight, ~salient, options.mean, options.storage)
    return binarize(weight * ~salient, None, options.mean, options.storage)


def fit_codes(
    weight: Tensor, within: Tensor | None, salient: Tensor, importance: Tensor, options: PBLLMOptions
) -> tuple[Tensor, Tensor | None]:
    """Step 2: scale and offset of codes for each row of ``weight`` [n, k], from the range of the weights ``within``;
    None: all.

    Of ``range_candidates`` ranges around the same middle, down to a part of it, the one with the least squared error of
    the salient weights is taken, columns counting by their ``importance`` [k]. Rows without any get zeros.
    """
    levels = 2 ** (options.code_bits - 1)
    offset, widths = _range(weight, within, options)
    steps = widths / (2 * levels - 1)
    best, least = steps.to(options.storage), torch.full_like(steps, torch.inf)
    if options.range_candidates == 1:
        return best, offset
    middle, counted = None if offset is None else offset.float().unsqueeze(1), salient * importance
    deviation = weight if middle is None else weight - middle
    for fraction in torch.linspace(1, _NARROWEST, options.range_candidates).tolist():
        step = (fraction * steps).to(options.storage)
        width = step.float().unsqueeze(1)
        q = (deviation.abs() / width.clamp(min=torch.finfo(width.dtype).tiny)).floor_().clamp_(max=levels - 1)
        error = salient_values(as_signs(deviation < 0), q, width, middle) - weight
        loss = (error.square() * counted).sum(1)
        best, least = torch.where(loss < least, step, best), torch.minimum(loss, least)
    return best, offset


def _range(weight: Tensor, within: Tensor | None, options: PBLLMOptions) -> tuple[Tensor | None, Tensor]:
    """Middle, in storage dtype, and width of the range of each row's weights ``within``; without a mean around zero."""
    if not options.mean:
        return None, 2 * (weight if within is None else weight * within).abs().amax(1)
    if within is None:
        low, high = weight.amin(1), weight.amax(1)
    else:
        some = within.any(1)
        low = torch.where(some, weight.masked_fill(~within, torch.inf).amin(1), 0.0)
        high = torch.where(some, weight.masked_fill(~within, -torch.inf).amax(1), 0.0)
    return ((low + high) / 2).to(options.storage), high - low


def quantize(weight: Tensor, factor: Factor | None, options: PBLLMOptions) -> Partial:
    if factor is None:
        raise ValueError("pb-llm needs a Hessian")
    size = options.groups_of(weight.shape[1])
    weight = weight * ~factor.dead
    diagonal = factor.diagonal
    with phase("search"):
        salient = find_all_salient(weight, diagonal, size, options)
    of_rows = None
    if options.code_scope == "row":
        with phase("fit"):
            of_rows = fit_codes(weight, None, salient, diagonal**-2, options)

    def quantize_group(block: Tensor, columns: slice) -> PartialCode:
        original, marked = weight[:, columns], salient[:, columns]
        with phase("fit"):
            codes = of_rows or fit_codes(original, marked, marked, diagonal[columns] ** -2, options)
            rest = binarize_rest(original, marked, options)
            chosen, levels = marked.T.contiguous(), 2 ** (options.code_bits - 1)
            level = torch.full_like(chosen, 0.5, dtype=torch.float32)
            code = PartialCode(level, chosen, levels, rest.scale, rest.mean, *codes)
            if options.feedback != "column":  # else the sweep chooses
                round_in_turn(code, block.T)
        return code

    codes = sweep(weight, factor, size, quantize_group, options)
    with phase("packing"):
        return _pack(codes, options, size)


def _pack(codes: list[PartialCode], options: PBLLMOptions, size: int) -> Partial:
    of_groups = codes[:1] if options.code_scope == "row" else codes
    means = [code.mean for code in codes if code.mean is not None]
    offsets = [code.code_offset for code in of_groups if code.code_offset is not None]
    return Partial.encode(
        negative=torch.cat([code.negative for code in codes]).T,
        scales=torch.stack([code.scale for code in codes], dim=1),
        means=torch.stack(means, dim=1) if means else None,
        salient=torch.cat([code.salient for code in codes]).T,
        q=torch.cat([code.q for code in codes]).T.to(torch.uint8),
        code_bits=options.code_bits,
        code_scales=torch.stack([code.code_scale for code in of_groups], dim=1),
        code_offsets=torch.stack(offsets, dim=1) if offsets else None,
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
