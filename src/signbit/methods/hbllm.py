"""HBLLM: Wavelet-Enhanced High-Fidelity 1-Bit Quantization for LLMs (arXiv 2512.00862, NeurIPS 2025).

Haar coefficients of weights are binarized instead of weights: the transform (layouts/haar.py) is orthonormal, so errors
stay what they are, and it takes neighbours' common part apart from their difference. The matrix is swept in groups of
128 columns, whose weights w already carry the error of the groups before:

1. Salient columns. s_ij = w_ij^2 / U_jj^2; columns are ranked by their l2 norm of s, and the c leading ones are
   salient, with c searched over 1 .. ``max_salient`` for the least error of binarizing s twice, both in them and in
   the rest.
2. Bands. Row variant: pairs are adjacent columns of a row, whose low and high band have a codebook each. Column
   variant: pairs are adjacent rows; each row of coefficients belongs to one band.
3. Frequency-aware grouping. A row of a band is split at one of ``split_candidates`` quantiles (0.1 to 0.9) of its
   magnitudes into a concentrated and a sparse part, for the least error when they are binarized apart:
       b = sgn(x - mu)      alpha = mean |x - mu|
   The two share the mean mu of the row and band (``share_mean``) and have a scale each.
4. Salient columns. Column variant: they are left out of step 3 and coded by it on their own, each part with a mean of
   its own. Row variant: first they are replaced by the average of the ordinary ones among their three neighbours on
   either side (FillAvg; of all ordinary ones if there are none), so that they do not spoil their partners'
   coefficients; what step 3 makes of that is subtracted from them, and the rest is coded like salient columns of the
   column variant, by pairs of rows, and added.
5. The error goes to the groups still to come (sweep.py).

Where the released code departs:

- Its scale is the root mean square of x - mu, which is not the least-squares scale for given signs: on Gaussian weights
  it costs 5% more error. The default is mean |x - mu|; ``scale: rms`` is the release's.
- It quantizes the low band first and takes the high band from what is left. For an exactly orthonormal transform that
  is the high band itself. (Its inverse is off by 1e-4: the factor is rounded to float16 on the way back only.)
- It searches c with means; here, as in billm.py, without, which makes the search a closed form.

A whole group is decided on at once, and the error passed on is the diagonal one, as in the release. ``hbllm-plus`` is
what follows from the transform T being orthonormal: of columns, it turns the Hessian H into T^T H T and leaves the
problem as it is; of rows, it even leaves H. So the row variant without salient columns is swept in its coefficients,
and the column variant always is, and there ``feedback: column``, ``refits`` and ``passes`` work as in any other method.
Only the row variant with salient columns, whose two codes overlap, is swept in weights and cannot have these.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, Self

import torch
from pydantic import Field, model_validator
from torch import Tensor

from signbit.calibration.hessian import Factor, factorize
from signbit.layouts import HaarPlanes
from signbit.layouts.base import select
from signbit.layouts.bits import as_signs
from signbit.layouts.haar import haar
from signbit.layouts.haar_planes import SalientPart, code_values
from signbit.methods.options import Method, SweepOptions
from signbit.methods.rounding import Choices
from signbit.methods.salience import salience, search_column_count
from signbit.methods.split import Center, Scale, search_row_thresholds
from signbit.methods.sweep import sweep
from signbit.timing import phase


class HBLLMOptions(SweepOptions):
    variant: Literal["row", "column"] = Field("row", description="what is paired: columns of a row, or rows")
    max_salient: int = Field(49, ge=0, description="most salient columns in a group; 0: none")
    column_norm: Literal["l1", "l2"] = Field("l2", description="norm of a column's salience that columns are ranked by")
    fill_reach: int = Field(3, ge=0, description="row variant: neighbours on either side that fill a salient column")
    partition: Literal["row", "global"] = Field("row", description="split each row of a band by itself, or all alike")
    split_candidates: int = Field(41, ge=1, le=4096, description="how many thresholds the split search tries")
    scale: Scale = Field("l1", description="mean absolute deviation (least squares), or the release's rms")
    share_mean: bool = Field(True, description="the two parts of an ordinary row and band have the same mean")

    @model_validator(mode="after")
    def _salient_columns_are_fixed(self) -> Self:
        by_weight = self.variant == "row" and self.max_salient > 0
        if by_weight and (self.feedback == "column" or self.refits or self.passes):
            raise ValueError("feedback: column, refits and passes need max_salient: 0 or variant: column")
        return self


@dataclass
class HaarCode:
    """Coefficients [n, k] of one group: a sign and a part for each, and codebooks.

    negative, sparse: bool [k, n]; codebooks: int64 [k], each column's. scales, means: float32 [B, 2, n], exact in the
    storage ``dtype``; own: for each codebook, whether its parts have a mean each.
    """

    negative: Tensor
    sparse: Tensor
    codebooks: Tensor
    scales: Tensor
    means: Tensor | None
    own: tuple[bool, ...]
    dtype: torch.dtype

    def values(self) -> Tensor:
        def of_columns(coefficients: Tensor) -> tuple[Tensor, Tensor]:
            return _pair(coefficients.index_select(0, self.codebooks))

        means = None if self.means is None else of_columns(self.means)
        return code_values(as_signs(self.negative), self.sparse.float(), of_columns(self.scales), means).T

    def choices(self) -> Choices:
        """A place's lower bit is the sign, the other the part."""
        places = torch.arange(4, device=self.codebooks.device).unsqueeze(1)
        signs, sparse = as_signs((places & 1).bool()), (places >> 1).float()
        means = [None] * len(self.own) if self.means is None else [_pair(one) for one in self.means]
        tables = [code_values(signs, sparse, _pair(one), mean) for one, mean in zip(self.scales, means, strict=True)]
        return Choices.among(tables, self.codebooks.unsqueeze(1))

    def choose(self, places: Tensor) -> None:
        self.negative, self.sparse = places & 1 != 0, places & 2 != 0

    def features(self) -> Tensor:
        signs, sparse = as_signs(self.negative).T, self.sparse.float().T
        features = []
        for codebook, own in enumerate(self.own):
            member = (self.codebooks == codebook).float()
            parts = [member * (1 - sparse), member * sparse]
            features += [part * signs for part in parts]
            if self.means is not None:
                features += parts if own else [member.expand_as(signs)]
        return torch.stack(features)

    def set_coefficients(self, coefficients: Tensor) -> None:
        rounded = iter(coefficients.to(self.dtype).float())
        for codebook, own in enumerate(self.own):
            self.scales[codebook] = torch.stack([next(rounded), next(rounded)])
            if self.means is not None:
                self.means[codebook] = torch.stack([next(rounded), next(rounded)]) if own else next(rounded)
        low, high = _pair(self.scales.index_select(0, self.codebooks) < 0)
        self.negative ^= torch.where(self.sparse, high, low)
        self.scales.abs_()


def _pair(coefficients: Tensor) -> tuple[Tensor, Tensor]:
    """[..., 2, n] as two [..., n]."""
    return coefficients.select(-2, 0), coefficients.select(-2, 1)


@dataclass
class FilledCode:
    """One group of weights in the row variant with salient columns (bool [k]): coefficients of the group with these
    filled in, and of what they lack. A column's weights are not a choice of their own here."""

    bands: HaarCode
    salient: Tensor
    lacking: HaarCode

    def values(self) -> Tensor:
        values = haar(self.bands.values(), 1)
        values[:, self.salient] += haar(self.lacking.values(), 0)
        return values


def fit(coefficients: Tensor, codebooks: Tensor, own: tuple[bool, ...], options: HBLLMOptions) -> HaarCode:
    """Step 3 for ``coefficients`` [n, k], whose columns belong to these ``codebooks`` [k]."""
    n, k = coefficients.shape
    scales, means = coefficients.new_zeros(2, len(own), 2, n)
    negative, sparse = torch.zeros(2, k, n, dtype=torch.bool, device=coefficients.device)
    for codebook, own_means in enumerate(own):
        columns = (codebooks == codebook).nonzero().squeeze(1)
        if len(columns):
            center: Center = "zero" if not options.mean else "own" if own_means else "shared"
            chosen = _fit_codebook(coefficients.index_select(1, columns), center, options)
            negative[columns], sparse[columns], scales[codebook], means[codebook] = chosen
    return HaarCode(negative, sparse, codebooks, scales, means if options.mean else None, own, options.storage)


def _fit_codebook(x: Tensor, center: Center, options: HBLLMOptions) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Signs and parts, bool [k, n], scales and means [2, n] for coefficients x [n, k] of one codebook."""
    each_row = options.partition == "row"
    with phase("search"):
        thresholds = search_row_thresholds(x, options.split_candidates, center, options.scale, each_row)
    with phase("fit"):
        sparse = x.abs() > thresholds
        parts = torch.stack([~sparse, sparse]).float()
        counts = parts.sum(2).clamp_(min=1)
        if center == "own":
            means = (parts * x).sum(2) / counts
        else:
            means = (x.mean(1) if center == "shared" else x.new_zeros(len(x))).expand(2, -1)
        means = means.to(options.storage).float()
        deviation = x - select(parts[1], (means[0].unsqueeze(1), means[1].unsqueeze(1)))
        if options.scale == "l1":
            scales = (parts * deviation.abs()).sum(2) / counts
        else:
            scales = ((parts * deviation.square()).sum(2) / counts).sqrt()
        return (deviation < 0).T, sparse.T, scales.to(options.storage).float(), means


def salient_columns(weight: Tensor, diagonal: Tensor, options: HBLLMOptions) -> Tensor:
    """Step 1: the salient columns, bool [k], of weights [n, k] of a group with U_jj = ``diagonal`` [k]."""
    with phase("search"):
        scores = salience(weight, diagonal, "hessian")
        norms = scores.norm(1 if options.column_norm == "l1" else 2, dim=0)
        ranking = norms.argsort(descending=True, stable=True)
        count = search_column_count(scores.index_select(1, ranking), options.max_salient, residual_rest=True)
        salient = torch.zeros(weight.shape[1], dtype=torch.bool, device=weight.device)
        salient[ranking[:count]] = True
        return salient


def fill_average(weight: Tensor, salient: Tensor, reach: int) -> Tensor:
    """FillAvg: salient columns of a group replaced by the average of the ordinary ones at most ``reach`` away, or of
    all ordinary ones if there are none so near; by 0 if all are salient."""
    places, marked = torch.arange(weight.shape[1], device=weight.device), salient.nonzero().squeeze(1)
    ordinary = ~salient.unsqueeze(1)
    near = ((places.unsqueeze(1) - marked).abs() <= min(reach, len(places))) & ordinary
    window = (near | (ordinary & ~near.any(0))).float()
    filled = weight.clone()
    filled[:, marked] = weight @ window / window.sum(0).clamp_(min=1)
    return filled


def quantize_bands(coefficients: Tensor, options: HBLLMOptions) -> HaarCode:
    """Row variant: step 3 for the interleaved low and high band of a group."""
    bands = torch.arange(coefficients.shape[1], device=coefficients.device) % 2
    return fit(coefficients, bands, (not options.share_mean,) * 2, options)


def quantize_filled(weight: Tensor, diagonal: Tensor, options: HBLLMOptions) -> FilledCode:
    """Row variant: steps 1 to 4 for the weights of a group."""
    salient = salient_columns(weight, diagonal, options)
    bands = quantize_bands(haar(fill_average(weight, salient, options.fill_reach), 1), options)
    marked = salient.nonzero().squeeze(1)
    lacking = (weight - haar(bands.values(), 1)).index_select(1, marked)
    return FilledCode(bands, salient, fit(haar(lacking, 0), torch.zeros_like(marked), (True,), options))


def quantize_pairs_of_rows(coefficients: Tensor, diagonal: Tensor, options: HBLLMOptions) -> HaarCode:
    """Column variant: steps 1 to 4 for the coefficients of a group."""
    if options.max_salient == 0:
        codebooks = torch.zeros(coefficients.shape[1], dtype=torch.int64, device=coefficients.device)
        return fit(coefficients, codebooks, (not options.share_mean,), options)
    salient = salient_columns(haar(coefficients, 0), diagonal, options)
    return fit(coefficients, salient.long(), (not options.share_mean, True), options)


def transformed(factor: Factor, group_size: int) -> Factor:
    """The factor of T^T H T, for the transform T of the row variant."""
    hessian = factor.root @ factor.root.T
    return factorize(haar(haar(hessian, 0, group_size), 1, group_size), 0)


def quantize(weight: Tensor, factor: Factor | None, options: HBLLMOptions) -> HaarPlanes:
    if factor is None:
        raise ValueError("hbllm needs a Hessian")
    size = options.groups_of(weight.shape[1])
    diagonal = factor.diagonal
    if options.variant == "column":
        codes = sweep(
            haar(weight, 0),
            factor,
            size,
            lambda group, columns: quantize_pairs_of_rows(group, diagonal[columns], options),
            options,
        )
        salient = [code.codebooks == 1 for code in codes]
        return _pack(codes, salient, codes, size, options)
    if options.max_salient == 0:
        coefficients = haar(weight * ~factor.dead, 1, size)
        codes = sweep(
            coefficients, transformed(factor, size), size, lambda group, _: quantize_bands(group, options), options
        )
        return _pack(codes, [], [], size, options)
    filled = sweep(
        weight, factor, size, lambda group, columns: quantize_filled(group, diagonal[columns], options), options
    )
    return _pack([f.bands for f in filled], [f.salient for f in filled], [f.lacking for f in filled], size, options)


def _pack(
    codes: list[HaarCode], salient: list[Tensor], salient_codes: list[HaarCode], size: int, options: HBLLMOptions
) -> HaarPlanes:
    """The layout. ``salient`` columns of each group have the last codebook of that group's ``salient_codes``."""
    bands = 2 if options.variant == "row" else 1
    with phase("packing"):

        def stacked(coefficients: list[Tensor]) -> Tensor:
            return torch.stack(coefficients).to(options.storage).movedim(-1, 0)

        def planes(of: list[HaarCode]) -> dict[str, Tensor]:
            return {
                "negative": torch.cat([code.negative for code in of]).T,
                "second": torch.cat([code.sparse for code in of]).T,
            }

        means = [code.means[:bands] for code in codes if code.means is not None]
        part = None
        marked = [code for columns, code in zip(salient, salient_codes, strict=True) if columns.any()]
        if marked:
            salient_means = [code.means[-1] for code in marked if code.means is not None]
            part = SalientPart(
                columns=torch.cat(salient),
                scales=stacked([code.scales[-1] for code in marked]),
                means=stacked(salient_means) if options.mean else None,
                **(planes(marked) if options.variant == "row" else {}),
            )
        return HaarPlanes.encode(
            axis=options.variant,
            **planes(codes),
            scales=stacked([code.scales[:bands] for code in codes]),
            means=stacked(means)[..., : 1 if options.share_mean else 2] if options.mean else None,
            salient=part,
            group_size=size,
        )


METHOD = Method(
    name="hbllm",
    summary="two-part codes of Haar coefficients, salient columns apart, Hessian-guided sweep",
    paper="HBLLM, arXiv 2512.00862",
    layout=HaarPlanes,
    options=HBLLMOptions,
    calibrated=True,
    quantize=quantize,
)
