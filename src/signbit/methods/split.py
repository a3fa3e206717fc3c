"""Where to split a bell-shaped group of weights in two: a concentrated and a sparse part, each with its own scale.

BiLLM (arXiv 2402.04291, section 3.3) looks for the threshold p, one for all rows of a group, that minimises the squared
error when {|w| <= p} and {|w| > p} are binarized apart, each per row. A part of n weights whose magnitudes add up to A
is left with sum w^2 - A^2 / n. In a row sorted by magnitude the two parts are a run and the run after it, so the A of
every candidate are differences of prefix sums: one sort serves all candidates, and no matrix is ever rebuilt.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from signbit.methods.sorting import sort_rows

Grid = Literal["quantile", "max"]


def search_threshold(magnitudes: Tensor, candidates: int, grid: Grid, mean: bool) -> float:
    """The best threshold on ``magnitudes`` [n, k], none negative, among ``candidates``.

    quantile: from the 0.1 to the 0.9 quantile of all magnitudes (the released code); max: the paper's evenly spaced
    fractions of the largest, from 0.1 to 0.9.
    """
    if grid == "quantile":
        ordered = sort_rows(magnitudes.flatten())
        ranks = torch.linspace(0.1, 0.9, candidates, dtype=torch.float64) * (len(ordered) - 1)
        thresholds = ordered[ranks.round().long().to(ordered.device)]
    else:
        thresholds = torch.linspace(0.1, 0.9, candidates, device=magnitudes.device) * magnitudes.max()
    return float(thresholds[split_gains(magnitudes, thresholds, mean).argmax()])


def split_gains(magnitudes: Tensor, thresholds: Tensor, mean: bool) -> Tensor:
    """By how much the split at each threshold [T] lowers the sum of squares of ``magnitudes`` [n, k], all rows; [T].

    ``mean``: binarize the parts around their means; then magnitudes are taken for the values themselves.
    """
    rows = sort_rows(magnitudes)
    n, k = rows.shape
    sums = torch.nn.functional.pad(rows.cumsum(1), (1, 0))
    cut = torch.searchsorted(rows, thresholds.expand(n, -1).contiguous(), right=True)
    low = sums.gather(1, cut)
    high = sums[:, -1:] - low
    low_count = cut.to(rows.dtype)
    high_count = (k - low_count).clamp_(min=1)
    low_count.clamp_(min=1)
    gain = low.square() / low_count + high.square() / high_count
    if mean:
        start, stop = torch.zeros_like(cut), torch.full_like(cut, k)
        gain += _deviation(rows, sums, start, cut, low / low_count).square() / low_count
        gain += _deviation(rows, sums, cut, stop, high / high_count).square() / high_count
    return gain.sum(0)


def _deviation(rows: Tensor, sums: Tensor, start: Tensor, stop: Tensor, center: Tensor) -> Tensor:
    """sum |x - center| over the run start .. stop of each sorted row, from the rows' prefix sums."""
    middle = torch.searchsorted(rows, center.contiguous()).clamp(start, stop)
    below, inside = sums.gather(1, middle) - sums.gather(1, start), sums.gather(1, stop) - sums.gather(1, start)
    return inside - 2 * below + center * (2 * middle - start - stop)


Center = Literal["zero", "shared", "own"]
Scale = Literal["l1", "rms"]


def search_row_thresholds(values: Tensor, candidates: int, center: Center, scale: Scale, each_row: bool) -> Tensor:
    """Where to split ``values`` [n, k] by magnitude, row by row (or all rows alike), for the least error; [n, 1].

    Candidates are the 0.1 to the 0.9 quantile of the row's (or all) magnitudes. The parts are binarized around zero,
    the row's mean or their own; in a row sorted by value the concentrated one is a run, so its sums are differences of
    prefix sums, and the sparse one's are what is left.
    """
    rows = sort_rows(values)
    n, k = rows.shape
    magnitudes = sort_rows(rows.abs() if each_row else rows.abs().flatten().unsqueeze(0))
    ranks = torch.linspace(0.1, 0.9, candidates, dtype=torch.float64) * (magnitudes.shape[1] - 1)
    thresholds = magnitudes[:, ranks.round().long().to(rows.device)].expand(n, -1).contiguous()
    start, stop = torch.searchsorted(rows, -thresholds), torch.searchsorted(rows, thresholds, right=True)
    first, last = torch.zeros_like(start[:, :1]), torch.full_like(start[:, :1], k)

    def both(inside: Tensor, whole: Tensor) -> list[Tensor]:
        return [inside, whole - inside]

    sums, squares = (torch.nn.functional.pad(x.cumsum(1), (1, 0)) for x in (rows, rows.square()))
    counts = both((stop - start).to(rows.dtype), last.to(rows.dtype))
    totals, powers = (both(x.gather(1, stop) - x.gather(1, start), x[:, -1:]) for x in (sums, squares))
    if center == "own":
        centers = [total / count.clamp(min=1) for total, count in zip(totals, counts, strict=True)]
    else:
        centers = [sums[:, -1:] / k if center == "shared" else torch.zeros_like(sums[:, -1:])] * 2
    inside = [_deviation(rows, sums, start, stop, c) for c in centers[: 1 + (center == "own")]]
    deviations = [inside[0], _deviation(rows, sums, first, last, centers[1]) - inside[-1]]
    parts = zip(counts, totals, powers, centers, deviations, strict=True)
    losses = torch.stack([_binarized_error(*part, scale) for part in parts]).sum(0)
    best = (losses if each_row else losses.sum(0, keepdim=True)).argmin(1, keepdim=True)
    return thresholds.gather(1, best.expand(n, 1))


def _binarized_error(
    count: Tensor, total: Tensor, power: Tensor, center: Tensor, deviation: Tensor, scale: Scale
) -> Tensor:
    """What binarizing ``count`` values x leaves of their squares, with total sum x, power sum x^2, deviation
    sum |x - center|; its scale is the mean of |x - center| (l1), which is best, or its root mean square."""
    spread = power - center * (2 * total - count * center)
    count = count.clamp(min=1)
    if scale == "l1":
        return spread - deviation.square() / count
    return 2 * (spread - deviation * (spread.clamp(min=0) / count).sqrt())
