"""STBLLM: Breaking the 1-Bit Barrier with Structured Binary LLMs (arXiv 2408.01803).

Each decoder block keeps N of every M weights of a row, N chosen block by block (section 3.3, allocation.py). Then each
matrix is swept in groups of 128 columns. In a group, whose weights w already carry the error of the groups before it:

1. N:M pruning (section 3.2). The N weights of highest importance (pruning.py) in every M consecutive columns of a row
   are kept, the others are zero.
2. Salient columns, as in BiLLM (section 3.4): of the kept weights, s_ij = w_ij^2 / U_jj^2; columns are ranked by
   sum_i s_ij and the c leading ones are binarized twice, with a residual, c searched over 1 .. ``max_salient``.
3. Trisection of the other kept weights (section 3.4): dense |w| <= p_1 < intermediate <= p_2 < sparse, each binarized
   per row with its own scale and mean. p_1 is searched for the least error, p_2 = 2 p_1 (regions.py).
4. The error, that of the pruned weights included, goes to the groups still to come (sweep.py).

A pruned weight is in no region. So it is zero whatever becomes of the coefficients, and ``choices`` leaves it so in
feedback, refits and passes.

Paper and released code differ.

- In the code pruned weights do not stay so. It never applies its mask again: zeros enter the dense region and come out
  as +-scale + mean, and the error feedback fills those of later groups even before. What it evaluates as 4:8 is a dense
  model with a sign for every weight. There is no option for that.
- Pruning looks at the swept weights in the paper, which are what is rounded next, and at the original ones in the code:
  ``prune_on``. The default is the paper's; it has the lower output error.
- Importance is SI in the paper and RIA in the code. By the paper's formula half the scores are negative, and then a
  larger input counts against a weight (pruning.py): the output error is up to several times that of RIA, on inputs with
  outliers most, which cannot be what gave the paper's results. The default is RIA.
- N of a block goes by the norm of its weights in the paper and by outliers in the code (allocation.py).
- The searches of steps 2 and 3 look at the weights in the paper and at the salience matrix in the code. The defaults
  are BiLLM's, for its reasons (billm.py): salience for the columns, weights for the regions. Here they count kept
  weights only, in closed form and without means; in the code pruned ones count as zeros, and means are subtracted.

Groups of a whole row, as cheap scales need them, would be pruned by what their weights are before any error reaches
them. With ``mask_size`` a first sweep in groups of so many columns only decides which weights to keep.

From the code comes what the paper leaves open: the means of the final fit, 160 quantiles as candidates, c <= 49, and
the diagonal feedback.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Literal, Self

import torch
from pydantic import Field, model_validator
from torch import Tensor

from signbit.calibration.hessian import Factor
from signbit.layouts import Structured
from signbit.layouts.bits import as_signs
from signbit.layouts.ranks import MAX_OF
from signbit.layouts.structured import MAX_REGIONS, kept_values
from signbit.methods.allocation import Allocation, allocate, needs
from signbit.methods.binarize import binarize
from signbit.methods.options import Method, Survey, SweepOptions
from signbit.methods.pruning import Importance, importance, keep_best
from signbit.methods.regions import Cuts, search_cuts
from signbit.methods.rounding import Choices
from signbit.methods.salience import Salience, salience, search_column_count
from signbit.methods.sweep import sweep
from signbit.timing import phase

SearchOn = Literal["weights", "salience"]


class StbllmOptions(SweepOptions):
    keep: int = Field(4, ge=1, le=MAX_OF, description="weights kept (N) ...")
    of: int = Field(8, ge=1, le=MAX_OF, description="... of this many consecutive ones of a row (M)")
    allocation: Allocation = Field("norm", description="by what blocks differ in how many they keep; keep is the mean")
    importance: Importance = Field("ria", description="what makes a weight worth keeping")
    prune_on: Literal["swept", "original"] = Field("swept", description="whose importance: as swept, or as they were")
    mask_size: int = Field(
        0, ge=0, description="columns pruned at a time in a sweep of its own before; 0: no such sweep"
    )
    salience: Salience = Field("hessian", description="what makes a kept weight salient")
    max_salient: int = Field(49, ge=0, description="most salient columns in a group; 0: none")
    column_search: SearchOn = Field("salience", description="whose error the search of salient columns minimises")
    regions: int = Field(3, ge=1, le=MAX_REGIONS, description="regions of the other kept weights")
    region_search: SearchOn = Field("weights", description="what is cut, and whose error that search minimises")
    region_cuts: Cuts = Field("tied", description="of three regions: second threshold twice the first, or free")
    region_candidates: int = Field(160, ge=1, le=4096, description="how many thresholds that search tries")

    @model_validator(mode="after")
    def _possible(self) -> Self:
        if self.keep > self.of:
            raise ValueError(f"keep {self.keep} of {self.of} is more than all")
        if self.group_size % self.of:
            raise ValueError(f"group_size {self.group_size} is no multiple of {self.of}, of which {self.keep} are kept")
        if self.mask_size % self.of:
            raise ValueError(f"mask_size {self.mask_size} is no multiple of {self.of}, of which {self.keep} are kept")
        if self.regions == 1 and self.max_salient:
            raise ValueError("one region has no map to hold the residuals of salient columns: set max_salient 0")
        return self


@dataclass
class StructuredCode:
    """One group. kept, negative, residual: bool [k, n]; members: bool [P, k, n], the parts: regions, and salient
    weights if any column is ``salient`` (bool [k]); scales and means [P, n] and residual scale [n] in storage dtype.

    Columns come first, so that the column-by-column work is on runs of memory.
    """

    kept: Tensor
    negative: Tensor
    residual: Tensor
    members: Tensor
    salient: Tensor
    scales: Tensor
    means: Tensor | None
    residual_scale: Tensor

    def __post_init__(self) -> None:
        self.regions = len(self.scales) - int(self.salient.any())
        self._set_floats()

    def _set_floats(self) -> None:
        self._scales, self._residual_scale = self.scales.float(), self.residual_scale.float()
        self._means = None if self.means is None else self.means.float()

    def values(self) -> Tensor:
        return self._values(self.negative.T, self.members.mT.float(), self.residual.T)

    def _values(self, negative: Tensor, members: Tensor, residual: Tensor | None) -> Tensor:
        """The layout's own sum, so that packing changes nothing; bits [n or 1, k], members [P, n or 1, k]."""
        part = None
        if self.regions < len(self.scales) and residual is not None:
            part = self._residual_scale.unsqueeze(1) * as_signs(residual) * members[-1]
        means = None if self._means is None else self._means.unsqueeze(2)
        return kept_values(as_signs(negative), members, self._scales.unsqueeze(2), means, part)

    def choices(self) -> Choices:
        """A place's lowest bit is the sign, the others the region, or of salient weights the residual's sign. A pruned
        weight has no choice."""
        parts, device = len(self.scales), self.kept.device
        places = torch.arange(2 * self.regions, device=device)
        members = torch.nn.functional.one_hot(places >> 1, parts).T.float().unsqueeze(1)
        tables = [self._values(places & 1 != 0, members, None)]
        if self.regions < parts:
            places = torch.arange(4, device=device)
            members = torch.nn.functional.one_hot(torch.full_like(places, parts - 1), parts).T.float().unsqueeze(1)
            tables.append(self._values(places & 1 != 0, members, places & 2 != 0))
        tables.append(torch.zeros_like(tables[0][:, :1]))
        which = torch.where(self.kept, self.salient.int().unsqueeze(1), len(tables) - 1)
        return Choices.among([table.T for table in tables], which)

    def choose(self, places: Tensor) -> None:
        salient = self.salient.unsqueeze(1)
        self.negative, second = places & 1 != 0, places >> 1
        self.residual = (second != 0) & salient
        ordinary = self.kept & ~salient
        for region in range(self.regions):
            torch.logical_and(second == region, ordinary, out=self.members[region])

    def features(self) -> Tensor:
        members, signs = self.members.mT.float(), as_signs(self.negative.T)
        features = [members * signs]
        if self.regions < len(self.scales):
            features.append(members[-1:] * as_signs(self.residual.T))
        if self.means is not None:
            features.append(members)
        return torch.cat(features)

    def set_coefficients(self, coefficients: Tensor) -> None:
        parts, dtype = len(self.scales), self.scales.dtype
        turned = coefficients < 0
        self.negative ^= (self.members & turned[:parts].unsqueeze(1)).any(0)
        self.scales = coefficients[:parts].abs().to(dtype)
        if self.regions < parts:
            self.residual ^= self.members[-1] & turned[parts]
            self.residual_scale = coefficients[parts].abs().to(dtype)
        if self.means is not None:
            self.means = coefficients[-parts:].to(dtype)
        self._set_floats()


def quantize_group(weight: Tensor, kept: Tensor, diagonal: Tensor, options: StbllmOptions) -> StructuredCode:
    """Steps 2 and 3 for the weights [n, k] of one group, those not ``kept`` (bool [n, k]) pruned; its columns have
    U_jj = ``diagonal`` [k]."""
    with phase("search"):
        scores = salience(weight, diagonal, options.salience) * kept
        salient = _salient_columns(weight, scores, kept, options)
        ordinary = kept & ~salient
        key = scores if options.region_search == "salience" else weight.abs()
        cuts = search_cuts(key, ordinary, options.regions, options.region_candidates, options.region_cuts)
    with phase("fit"):
        dtype = options.storage
        edges = [torch.ones_like(ordinary), *(key > cut for cut in cuts), torch.zeros_like(ordinary)]
        members = [ordinary & low & ~high for low, high in pairwise(edges)]
        parts = [binarize(weight, member, options.mean, dtype) for member in members]
        residual, residual_scale = torch.zeros_like(kept), torch.zeros(len(weight), dtype=dtype, device=weight.device)
        if salient.any():
            members.append(kept & salient)
            first = binarize(weight, members[-1], options.mean, dtype)
            second = binarize(weight - first.values(), members[-1], options.mean, dtype)
            residual, residual_scale = second.negative, second.scale
            if first.mean is not None and second.mean is not None:
                first.mean = (first.mean.float() + second.mean.float()).to(dtype)
            parts.append(first)
        together = torch.stack(members)
        negative = (torch.stack([part.negative for part in parts]) & together).any(0)
        return StructuredCode(
            kept=kept.T.contiguous(),
            negative=negative.T.contiguous(),
            residual=(residual & together[-1]).T.contiguous(),
            members=together.mT.contiguous(),
            salient=salient,
            scales=torch.stack([part.scale for part in parts]),
            means=torch.stack([part.mean for part in parts if part.mean is not None]) if options.mean else None,
            residual_scale=residual_scale,
        )


def _salient_columns(weight: Tensor, scores: Tensor, kept: Tensor, options: StbllmOptions) -> Tensor:
    """Step 2: the salient columns of a group, bool [k]."""
    ranking = scores.sum(0).argsort(descending=True, stable=True)
    by_salience = options.column_search == "salience"
    searched = scores if by_salience else weight.abs() * kept
    searched, member = searched.index_select(1, ranking), kept.index_select(1, ranking)
    count = search_column_count(searched, options.max_salient, residual_rest=by_salience, member=member)
    salient = torch.zeros(weight.shape[1], dtype=torch.bool, device=weight.device)
    salient[ranking[:count]] = True
    return salient


def quantize(weight: Tensor, factor: Factor | None, options: StbllmOptions) -> Structured:
    if factor is None:
        raise ValueError("stbllm needs a Hessian")
    original = weight * ~factor.dead
    scores, diagonal = importance(original, factor, options.importance), factor.diagonal

    def prune(block: Tensor, columns: slice) -> Tensor:
        with phase("search"):
            looked_at = block if options.prune_on == "swept" else original[:, columns]
            return keep_best(scores(looked_at, columns), options.keep, options.of)

    def run(size: int, prune: Callable[[Tensor, slice], Tensor], options: StbllmOptions) -> list[StructuredCode]:
        def group(block: Tensor, columns: slice) -> StructuredCode:
            return quantize_group(block, prune(block, columns), diagonal[columns], options)

        return sweep(weight, factor, size, group, options)

    size = options.groups_of(weight.shape[1])
    if options.mask_size:
        first = run(options.mask_size, prune, options.model_copy(update={"passes": 0}))
        kept = torch.cat([code.kept for code in first]).T
        codes = run(size, lambda _, columns: kept[:, columns], options)
    else:
        codes = run(size, prune, options)
    with phase("packing"):
        return _pack(codes, options, size)


def _pack(codes: Sequence[StructuredCode], options: StbllmOptions, size: int) -> Structured:
    regions = options.regions
    marked = [code for code in codes if code.salient.any()]
    nothing = codes[0].residual_scale.unsqueeze(1)[:, :0]
    salient_scales = [torch.stack([code.scales[-1], code.residual_scale], dim=1) for code in marked]
    salient_means = [code.means[-1] for code in marked if code.means is not None]
    means = [code.means[:regions].T for code in codes if code.means is not None]
    # At salient columns the region map holds the residual's sign.
    region = [code.members[:regions].to(torch.uint8).argmax(0) + code.residual * code.kept for code in codes]
    return Structured.encode(
        kept=torch.cat([code.kept for code in codes]).T,
        keep=options.keep,
        of=options.of,
        negative=torch.cat([code.negative for code in codes]).T,
        region=torch.cat(region).T.to(torch.uint8),
        salient=torch.cat([code.salient for code in codes]),
        scales=torch.stack([code.scales[:regions].T for code in codes], dim=1),
        means=torch.stack(means, dim=1) if options.mean else None,
        salient_scales=torch.stack(salient_scales, dim=1) if marked else nothing.unsqueeze(2).expand(-1, 0, 2),
        salient_means=(torch.stack(salient_means, dim=1) if marked else nothing) if options.mean else None,
        group_size=size,
    )


def allocate_blocks(survey: Survey, options: StbllmOptions) -> list[StbllmOptions] | None:
    """Options with each block's N."""
    if options.allocation == "uniform":
        return None
    counts = allocate(*needs(survey, options.allocation), options.keep, options.of)
    return [options.model_copy(update={"keep": count}) for count in counts]


METHOD = Method(
    name="stbllm",
    summary="N of every M kept, salient columns twice, the rest in three regions, Hessian-guided sweep",
    paper="STBLLM, arXiv 2408.01803",
    layout=Structured,
    options=StbllmOptions,
    calibrated=True,
    quantize=quantize,
    allocate=allocate_blocks,
)
