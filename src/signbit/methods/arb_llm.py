"""ARB-LLM: Alternating Refined Binarizations for Large Language Models (arXiv 2410.03129).

BiLLM's program (billm.py) with binarizations that are refined in turns instead of computed once. Salient columns and
the split of weights by magnitude are BiLLM's; each zone of weights that they make is binarized per row and group of
columns: the salient ones twice (order 2), the others once. For one zone of w, T = ``iterations``:

plain (section 3.2). From mu = mean w, alpha = mean|w - mu|, b = sgn(w - mu), T rounds of

    mu <- mean (w - alpha b)        alpha <- mean b (w - mu)        b <- sgn(w - mu)

each step the best of its variable with the others fixed, so that the error never rises (theorem 1). In one dimension
this is Lloyd's algorithm for two centroids mu +- alpha. Order 2 takes turns between mu, alpha_1 and alpha_2 and then
gives each weight the nearest of its four values.

x (section 3.3). After the plain rounds T more, on the error of the output: with S = X^T X and R = W - Q of the group
the loss is tr(R S R^T), and with the signs fixed, in turn for the coefficient c of each feature f (alpha of b, mu of 1;
a zone's feature is 0 outside of it),

    c <- c + f S R^T / f S f^T

These are Gauss-Seidel rounds on the normal equations of each row, [F, F], made once from k x k products: the released
code makes n x k x k ones. R is that of the whole group, so the zones correct each other; the released code fits each
zone as if the others were zero. Scales stay >= 0. S is the group's diagonal block of the damped Hessian.

rc (section 3.4). No mean; a scale of the row times one of the column, for each zone, w_ij ~ r_i c_j b_ij. From
r = mean_j|w|, c = mean_i|w / r|, T rounds of

    r_i <- sum_j c_j b_ij w_ij / sum_j c_j^2        c_j <- sum_i r_i b_ij w_ij / sum_i r_i^2

which for order 1 is the best approximation of |w| of rank one. Order 2 takes turns between r_1, c_1, r_2, c_2 and then
picks the signs.

``bitmap`` (the column-group bitmap, section 3.5): the split applies to salient columns too, whose two zones have
coefficients of their own.

Where paper and released code differ, or the paper leaves it open: both searches are on the salience matrix in the code,
and x scores splits by tr(. S .^T) of the salience's error, which mixes units. Here, as in the preset billm, columns are
searched for on the salience and the split on the weights (options ``column_search`` and ``split_search``), without the
refinement, as in the code. The code's defaults are magnitudes and no bitmap; its instructions, and ours, are the
Hessian and the bitmap. Rounds end with the signs, chosen after coefficients are rounded for storage.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, Self

import torch
from pydantic import Field, model_validator
from torch import Tensor

from signbit.calibration.hessian import Factor
from signbit.layouts import SplitPlanes
from signbit.layouts.bits import as_signs
from signbit.methods.billm import BiLLMOptions, partition
from signbit.methods.options import Method
from signbit.methods.split_code import SplitCode, nearest_pair, pack
from signbit.methods.sweep import sweep
from signbit.timing import phase


class ArbLLMOptions(BiLLMOptions):
    variant: Literal["plain", "x", "rc"] = Field("rc", description="what is refined; x: the output, rc: column scales")
    bitmap: bool = Field(True, description="split salient columns like the others (column-group bitmap)")
    iterations: int = Field(15, ge=0, le=1000, description="rounds of refinement")
    mean: bool = Field(False, description="subtract and store a mean for every scale; not for rc")

    @model_validator(mode="after")
    def _no_means_beside_column_scales(self) -> Self:
        if self.mean and self.variant == "rc":
            raise ValueError("variant rc has column scales in place of means: set mean to false, or variant to x")
        return self


@dataclass
class Zone:
    """Weights [n, k] of one zone, binarized O times.

    negative: bool [O, n, k]; float32, after rounding exact in the storage dtype: rows [O, n, 1], columns [O, 1, k]
    (ones where not rc) and mean [n, 1] or None.
    """

    negative: Tensor
    rows: Tensor
    columns: Tensor
    mean: Tensor | None

    def deviation(self, weight: Tensor) -> Tensor:
        return weight if self.mean is None else weight - self.mean

    def part(self, o: int) -> Tensor:
        return self.rows[o] * self.columns[o] * as_signs(self.negative[o])

    def choose_signs(self, weight: Tensor) -> None:
        """The nearest of all values; with two scales of any sign they are the same for the scales' sizes."""
        self.rows, self.columns = self.rows.abs(), self.columns.abs()
        deviation, scales = self.deviation(weight), self.rows * self.columns
        if len(scales) == 1:
            self.negative = (deviation < 0).unsqueeze(0)
        else:
            self.negative = torch.stack(nearest_pair(deviation, scales[0], scales[1])[:2])

    def round(self, dtype: torch.dtype) -> None:
        self.rows, self.columns = self.rows.to(dtype).float(), self.columns.to(dtype).float()
        self.mean = None if self.mean is None else self.mean.to(dtype).float()


def fit_zone(weight: Tensor, member: Tensor, order: int, options: ArbLLMOptions) -> Zone:
    """Binarize the members (bool [n, k]) of each row of ``weight`` [n, k], by the rounds of plain or of rc."""
    (n, k), mask = weight.shape, member.float()
    count, by_column = mask.sum(1, keepdim=True), options.variant == "rc"
    negative = torch.zeros(order, n, k, dtype=torch.bool, device=weight.device)
    zone = Zone(negative, weight.new_zeros(order, n, 1), weight.new_ones(order, 1, k), None)
    if options.mean:
        zone.mean = _ratio((weight * mask).sum(1, keepdim=True), count)
    rest = zone.deviation(weight)
    for o in range(order):
        zone.negative[o], size = rest < 0, rest.abs() * mask
        zone.rows[o] = _ratio(size.sum(1, keepdim=True), count)
        if by_column:
            zone.columns[o] = _ratio(_ratio(size, zone.rows[o]).sum(0, keepdim=True), mask.sum(0, keepdim=True), 1.0)
        rest = rest - zone.part(o)
    for _ in range(options.iterations):
        _refine(weight, mask, count, zone, by_column)
        zone.choose_signs(weight)
    zone.round(options.storage)
    zone.choose_signs(weight)
    return zone


def _refine(weight: Tensor, mask: Tensor, count: Tensor, zone: Zone, by_column: bool) -> None:
    """One round of least squares, one coefficient after the other, signs fixed; mask: float [n, k], count: [n, 1]."""
    parts = [zone.part(o) for o in range(len(zone.negative))]
    if zone.mean is not None:
        rest = weight - sum(parts)
        zone.mean = _ratio((rest * mask).sum(1, keepdim=True), count)
    for o, negative in enumerate(zone.negative):
        others = sum(part for q, part in enumerate(parts) if q != o)
        pull = (zone.deviation(weight) - others) * as_signs(negative) * mask
        column = zone.columns[o].T
        zone.rows[o] = row = _ratio(pull @ column, mask @ column.square())
        if by_column:
            zone.columns[o] = _ratio(row.T @ pull, row.T.square() @ mask, 1.0)
        parts[o] = zone.part(o)


def _ratio(numerator: Tensor, denominator: Tensor, empty: float = 0.0) -> Tensor:
    """The quotient, or ``empty`` where a zone has no weights or only zeros."""
    quotient = numerator / denominator.clamp(min=torch.finfo(numerator.dtype).tiny)
    return torch.where(denominator > 0, quotient, empty)


def calibrate(weight: Tensor, code: SplitCode, metric: Tensor, iterations: int) -> None:
    """The rounds of x on a group [n, k] with S = ``metric`` [k, k]."""
    features = code.features()
    product = features @ metric
    normal = torch.einsum("fnk,gnk->fgn", product, features)
    right = (product * weight).sum(2)
    coefficients, scales = code.coefficients.clone(), code.scale_count
    order = [*range(scales, len(features)), *range(scales)]  # means first
    for _ in range(iterations):
        for f in order:
            gradient = right[f] - (normal[f] * coefficients).sum(0)
            coefficients[f] += _ratio(gradient, normal[f, f])
            if f < scales:
                coefficients[f].clamp_(min=0)
    code.set_coefficients(coefficients)


def quantize_group(weight: Tensor, diagonal: Tensor, metric: Tensor | None, options: ArbLLMOptions) -> SplitCode:
    """One group [n, k] whose columns have U_jj = ``diagonal`` [k]; metric: S [k, k], for x only."""
    salient, sparse = partition(weight, diagonal, options)
    with phase("fit"):
        if not options.bitmap:
            sparse &= ~salient
        low, high = (fit_zone(weight, part & ~salient, 1, options) for part in (~sparse, sparse))
        negative = (sparse & high.negative[0]) | (~sparse & low.negative[0])
        residual = torch.zeros_like(negative)
        zones, doubled = [low, high], []
        if salient.any():
            inside = sparse[:, salient]
            members = (~inside, inside) if options.bitmap else (~inside,)
            doubled = [fit_zone(weight[:, salient], member, 2, options) for member in members]
            chosen = (inside & doubled[-1].negative) | (~inside & doubled[0].negative)
            negative[:, salient], residual[:, salient] = chosen
        columns = None
        if options.variant == "rc":
            columns = weight.new_ones(4 + 2 * options.bitmap, weight.shape[1])
            columns[:2] = torch.cat([low.columns, high.columns]).squeeze(1)
            if doubled:
                columns[2:, salient] = torch.cat([zone.columns for zone in doubled]).squeeze(1)
        zones += doubled
        means = [zone.mean.unsqueeze(0) for zone in zones if zone.mean is not None]
        code = SplitCode(
            negative=negative,
            sparse=sparse,
            residual=residual,
            salient=salient,
            coefficients=torch.cat([zone.rows for zone in zones] + means).squeeze(2),
            columns=columns,
            mean=options.mean,
            bitmap=options.bitmap,
            dtype=options.storage,
        )
        if metric is not None:
            calibrate(weight, code, metric, options.iterations)
    return code


def quantize(weight: Tensor, factor: Factor | None, options: ArbLLMOptions) -> SplitPlanes:
    if factor is None:
        raise ValueError("arb-llm needs a Hessian")
    size, diagonal = options.groups_of(weight.shape[1]), factor.diagonal

    def decide(block: Tensor, columns: slice) -> SplitCode:
        # H = R R^T with R upper triangular: a diagonal block of H needs its rows of R from the diagonal on.
        root = factor.root[columns, columns.start :] if options.variant == "x" else None
        return quantize_group(block, diagonal[columns], None if root is None else root @ root.T, options)

    codes = sweep(weight, factor, size, decide, options)
    with phase("packing"):
        return pack(codes, size)


METHOD = Method(
    name="arb-llm",
    summary="BiLLM's zones, binarized in alternating rounds; with column scales or on the output's error",
    paper="ARB-LLM, arXiv 2410.03129",
    layout=SplitPlanes,
    options=ArbLLMOptions,
    calibrated=True,
    quantize=quantize,
)
