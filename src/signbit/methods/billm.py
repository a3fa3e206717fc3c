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

from typing import Literal

import torch
from pydantic import Field
from torch import Tensor

from signbit.calibration.hessian import Factor
from signbit.layouts import SplitPlanes
from signbit.methods.binarize import binarize
from signbit.methods.options import Method, SweepOptions
from signbit.methods.salience import Salience, salience, search_column_count
from signbit.methods.split import Grid, search_threshold
from signbit.methods.split_code import SplitCode, pack
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


def partition(weight: Tensor, diagonal: Tensor, options: BiLLMOptions) -> tuple[Tensor, Tensor]:
    """Steps 1, 2 and 4 for a group [n, k] whose columns have U_jj = ``diagonal`` [k]: which columns are salient, bool
    [k], and which weights are sparse, bool [n, k], by the same threshold at salient columns too."""
    with phase("search"):
        scores = salience(weight, diagonal, options.salience)
        salient = _salient_columns(weight, scores, options)
        if salient.all():
            return salient, torch.zeros_like(weight, dtype=torch.bool)
        released = options.split_search == "salience"
        key = scores if released else weight.abs()
        # Columns taken by number: many times faster than by a boolean mask.
        ordinary = key.index_select(1, (~salient).nonzero().squeeze(1))
        return salient, key > search_threshold(ordinary, options.split_candidates, options.split_grid, mean=released)


def _salient_columns(weight: Tensor, scores: Tensor, options: BiLLMOptions) -> Tensor:
    """Steps 1 and 2: the salient columns of a group, bool [k]."""
    ranking = scores.sum(0).argsort(descending=True, stable=True)
    by_salience = options.column_search == "salience"
    searched = (scores if by_salience else weight.abs()).index_select(1, ranking)
    count = search_column_count(searched, options.max_salient, residual_rest=by_salience)
    salient = torch.zeros(weight.shape[1], dtype=torch.bool, device=weight.device)
    salient[ranking[:count]] = True
    return salient


def quantize_group(weight: Tensor, diagonal: Tensor, options: BiLLMOptions) -> SplitCode:
    """Steps 1 to 4 for the weights [n, k] of one group."""
    salient, sparse = partition(weight, diagonal, options)
    with phase("fit"):
        mean, dtype = options.mean, options.storage
        sparse = sparse & ~salient
        low, high = (binarize(weight, part & ~salient, mean, dtype) for part in (~sparse, sparse))
        negative = (sparse & high.negative) | (~sparse & low.negative)
        scales, means = [low.scale, high.scale], [low.mean, high.mean]
        residual = torch.zeros_like(negative)
        if salient.any():
            # Step 3, on the salient columns alone.
            columns = weight[:, salient]
            first = binarize(columns, None, mean, dtype)
            second = binarize(columns - first.values(), None, mean, dtype)
            negative[:, salient], residual[:, salient] = first.negative, second.negative
            scales += [first.scale, second.scale]
            if first.mean is not None and second.mean is not None:
                means.append((first.mean.float() + second.mean.float()).to(dtype))
        return SplitCode(
            negative=negative,
            sparse=sparse,
            residual=residual,
            salient=salient,
            coefficients=torch.stack(scales + [mean for mean in means if mean is not None]).float(),
            columns=None,
            mean=mean,
            bitmap=False,
            dtype=dtype,
        )


def quantize(weight: Tensor, factor: Factor | None, options: BiLLMOptions) -> SplitPlanes:
    if factor is None:
        raise ValueError("billm needs a Hessian")
    size = options.groups_of(weight.shape[1])
    diagonal = factor.diagonal
    codes = sweep(
        weight, factor, size, lambda block, columns: quantize_group(block, diagonal[columns], options), options
    )
    with phase("packing"):
        return pack(codes, size)


METHOD = Method(
    name="billm",
    summary="salient columns twice, bell-shaped rest split in two, Hessian-guided sweep",
    paper="BiLLM, arXiv 2402.04291",
    layout=SplitPlanes,
    options=BiLLMOptions,
    calibrated=True,
    quantize=quantize,
)
