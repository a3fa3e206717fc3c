"""BiLLM: Pushing the Limit of Post-Training Quantization for LLMs (arXiv 2402.04291).

The matrix is swept in groups of 128 columns. In each group, whose weights w already carry the error of the groups
before it:

1. Salience (section 3.1). s_ij = w_ij^2 / U_jj^2. Columns are ranked by sum_i s_ij.
2. Structured salient columns (section 3.2, algorithm 2). The c leading columns are salient, with c searched over
   1 .. ``max_salient`` for the least squared error of step 3 on them and one binarization of the rest.
3. Residual binarization of salient columns (equations 4-6), per row:
       b_o = sgn(w - mu_o),  alpha_o = mean|w - mu_o|;   r = w - mu_o - alpha_o b_o
       b_r = sgn(r - mu_r),  alpha_r = mean|r - mu_r|;   w ~ (mu_o + mu_r) + alpha_o b_o + alpha_r b_r
4. Splitting of the rest (section 3.3). A threshold p, one a group, separates the concentrated weights |w| <= p from
   the sparse ones; each part is binarized per row with its own mean and scale. p is searched for the least error.
5. The error goes to the groups still to come (sweep.py).

Paper and released code differ. In the paper both searches minimise the error of the weights; in the code both minimise
the error of binarizing the salience matrix, with means (which the paper's formulas do not have) and with two
binarizations on both sides of step 2. Which is right differs between the two:

- Columns. Whatever is binarized twice has less error, so on the weights the search of step 2 ends at ``max_salient`` in
  nearly every group, far from the few columns that the paper reports. The default is therefore the code's salience
  matrix, without its means: in closed form, with all but the same choices.
- Split. On the salience, whose distribution is all tail, the search ends at the edge of its range and calls a tenth of
  the weights sparse, whatever they are. On the weights it finds the bell's shoulders. The default is the paper's.

From the code comes what the paper leaves open: the means of the final fit, the candidates of the split (81 quantiles;
the paper's multiples of max|w| are ``split_grid: max``), the search range of c and the diagonal feedback. The preset
``billm-released`` takes the code's way in both searches.

The decision is stored in the layout ``split_planes``; the two means of step 3 are stored as their sum.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from pydantic import Field
from torch import Tensor

from signbit.calibration.hessian import Factor
from signbit.layouts import SplitPlanes
from signbit.layouts.bits import as_signs
from signbit.layouts.split_planes import ordinary_values, salient_values
from signbit.methods.binarize import binarize
from signbit.methods.options import Method, SweepOptions
from signbit.methods.salience import Salience, salience, search_column_count
from signbit.methods.split import Grid, search_threshold
from signbit.methods.sweep import sweep
from signbit.timing import phase

SearchOn = Literal["weights", "salience"]


class BiLLMOptions(SweepOptions):
    salience: Salience = Field("hessian", description="what makes a weight salient")
    max_salient: int = Field(49, ge=0, description="most salient columns in a group; 0: none")
    column_search: SearchOn = Field("salience", description="whose error the search of salient columns minimises")
    split_search: SearchOn = Field("weights", description="what is split, and whose error that search minimises")
    split_grid: Grid = Field("quantile", description="candidates: quantiles, or fractions of the largest")
    split_candidates: int = Field(81, ge=1, le=4096, description="how many thresholds the split search tries")


@dataclass
class SplitCode:
    """One group: planes bool [n, k], salient columns bool [k], coefficients in storage dtype as in the layout."""

    negative: Tensor
    second: Tensor
    salient: Tensor
    scales: Tensor
    means: Tensor | None
    salient_scales: Tensor
    salient_mean: Tensor | None

    def values(self) -> Tensor:
        values = self._ordinary(slice(None))
        values[:, self.salient] = self._salient(self.salient)
        return values

    def assign(self, column: int, weights: Tensor) -> Tensor:
        """The nearest of a weight's four values, its part or its residual's sign included."""
        at = slice(column, column + 1)
        deviation = weights.unsqueeze(1)
        if self.salient[column]:
            if self.salient_mean is not None:
                deviation = deviation - self.salient_mean.float().unsqueeze(1)
            # Taking the larger scale's sign first makes the greedy choice the nearest of the four values.
            first, second = _pair(self.salient_scales)
            swapped = second > first
            larger = deviation < 0
            smaller = deviation - torch.maximum(first, second) * as_signs(larger) < 0
            self.negative[:, at] = torch.where(swapped, smaller, larger)
            self.second[:, at] = torch.where(swapped, larger, smaller)
            return self._salient(at).squeeze(1)
        deviations = [deviation] * 2 if self.means is None else [deviation - mean for mean in _pair(self.means)]
        low, high = ((part.abs() - scale).abs() for part, scale in zip(deviations, _pair(self.scales), strict=True))
        sparse = high < low
        self.second[:, at] = sparse
        self.negative[:, at] = torch.where(sparse, deviations[1], deviations[0]) < 0
        return self._ordinary(at).squeeze(1)

    def features(self) -> Tensor:
        signs, second = as_signs(self.negative), self.second.float()
        salient = self.salient.float()
        parts = [(1 - second) * (1 - salient), second * (1 - salient)]
        features = [signs * part for part in parts] + [signs * salient, (1 - 2 * second) * salient]
        if self.means is not None:
            features += [*parts, salient.expand_as(signs)]
        return torch.stack(features)

    def set_coefficients(self, coefficients: Tensor) -> None:
        c, dtype = coefficients.T, self.scales.dtype
        self.scales, self.salient_scales = c[:, :2].abs().to(dtype), c[:, 2:4].abs().to(dtype)
        if self.means is not None:
            self.means, self.salient_mean = c[:, 4:6].to(dtype), c[:, 6].to(dtype)

    # The layout's own sums, so that packing changes nothing.

    def _ordinary(self, columns: slice | Tensor) -> Tensor:
        means = None if self.means is None else _pair(self.means)
        signs, sparse = as_signs(self.negative[:, columns]), self.second[:, columns].float()
        return ordinary_values(signs, sparse, _pair(self.scales), means)

    def _salient(self, columns: slice | Tensor) -> Tensor:
        mean = None if self.salient_mean is None else self.salient_mean.float().unsqueeze(1)
        signs, residual = as_signs(self.negative[:, columns]), as_signs(self.second[:, columns])
        return salient_values(signs, residual, _pair(self.salient_scales), mean)


def _pair(coefficients: Tensor) -> tuple[Tensor, Tensor]:
    """[n, 2] as two float32 [n, 1]."""
    return coefficients[:, :1].float(), coefficients[:, 1:].float()


def quantize_group(weight: Tensor, diagonal: Tensor, options: BiLLMOptions) -> SplitCode:
    """Steps 1 to 4 for the weights [n, k] of one group, whose columns have U_jj = ``diagonal`` [k]."""
    scores = salience(weight, diagonal, options.salience)
    with phase("search"):
        salient = _salient_columns(weight, scores, options)
        released = options.split_search == "salience"
        key = scores if released else weight.abs()
        sparse = torch.zeros_like(weight, dtype=torch.bool)
        if not salient.all():
            # Columns taken by number: many times faster than by a boolean mask.
            ordinary = key.index_select(1, (~salient).nonzero().squeeze(1))
            threshold = search_threshold(ordinary, options.split_candidates, options.split_grid, mean=released)
            sparse = (key > threshold) & ~salient
    with phase("fit"):
        mean, dtype = options.mean, options.storage
        parts = [binarize(weight, part & ~salient, mean, dtype) for part in (~sparse, sparse)]
        negative = (sparse & parts[1].negative) | (~sparse & parts[0].negative)
        # Step 3, on the salient columns alone.
        columns = weight[:, salient]
        first = binarize(columns, None, mean, dtype)
        second = binarize(columns - first.values(), None, mean, dtype)
        negative[:, salient] = first.negative
        sparse[:, salient] = second.negative
        return SplitCode(
            negative=negative,
            second=sparse,
            salient=salient,
            scales=torch.stack([part.scale for part in parts], dim=1),
            means=torch.stack([part.mean for part in parts if part.mean is not None], dim=1) if mean else None,
            salient_scales=torch.stack([first.scale, second.scale], dim=1),
            salient_mean=(
                (first.mean.float() + second.mean.float()).to(dtype)
                if first.mean is not None and second.mean is not None
                else None
            ),
        )


def _salient_columns(weight: Tensor, scores: Tensor, options: BiLLMOptions) -> Tensor:
    """Steps 1 and 2: the salient columns of a group, bool [k]."""
    ranking = scores.sum(0).argsort(descending=True, stable=True)
    by_salience = options.column_search == "salience"
    searched = (scores if by_salience else weight.abs()).index_select(1, ranking)
    count = search_column_count(searched, options.max_salient, residual_rest=by_salience)
    salient = torch.zeros(weight.shape[1], dtype=torch.bool, device=weight.device)
    salient[ranking[:count]] = True
    return salient


def quantize(weight: Tensor, factor: Factor | None, options: BiLLMOptions) -> SplitPlanes:
    if factor is None:
        raise ValueError("billm needs a Hessian")
    size = options.groups_of(weight.shape[1])
    diagonal = factor.upper.diagonal()
    codes = sweep(
        weight,
        factor,
        size,
        lambda block, columns: quantize_group(block, diagonal[columns], options),
        options,
    )
    with phase("packing"):
        marked = [code for code in codes if bool(code.salient.any())]
        means = [code.means for code in codes if code.means is not None]
        salient_means = [code.salient_mean for code in marked if code.salient_mean is not None]
        nothing = torch.zeros(weight.shape[0], 0, dtype=options.storage, device=weight.device)
        return SplitPlanes.encode(
            negative=torch.cat([code.negative for code in codes], dim=1),
            second=torch.cat([code.second for code in codes], dim=1),
            salient=torch.cat([code.salient for code in codes]),
            scales=torch.stack([code.scales for code in codes], dim=1),
            means=torch.stack(means, dim=1) if options.mean else None,
            salient_scales=torch.stack([code.salient_scales for code in marked], dim=1)
            if marked
            else nothing.unsqueeze(2).expand(-1, 0, 2),
            salient_means=(torch.stack(salient_means, dim=1) if marked else nothing) if options.mean else None,
            group_size=size,
        )


METHOD = Method(
    name="billm",
    summary="salient columns twice, bell-shaped rest split in two, Hessian-guided sweep",
    paper="BiLLM, arXiv 2402.04291",
    layout=SplitPlanes,
    options=BiLLMOptions,
    calibrated=True,
    quantize=quantize,
)
