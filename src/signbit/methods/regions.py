"""Where to cut a bell-shaped group of weights into up to three regions by magnitude, each with its own scale.

STBLLM (arXiv 2408.01803, section 3.4) cuts the weights that are kept and not salient at p_1 < p_2, the same for all
rows of a group, for the least squared error when each region is binarized by itself, per row. A region of n weights
whose magnitudes add up to A is left with sum w^2 - A^2 / n. In a row sorted by magnitude the regions are runs, so A and
n of all candidates are differences of prefix sums, and one sort serves all; it is BiLLM's split (split.py) with three
parts and a mask.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from signbit.methods.sorting import sort_rows

Cuts = Literal["tied", "free"]


def search_cuts(magnitudes: Tensor, member: Tensor, regions: int, candidates: int, cuts: Cuts) -> list[float]:
    """The best ``regions`` - 1 thresholds for the members (bool [n, k]) of ``magnitudes`` [n, k], none negative.

    Candidates are evenly spaced quantiles of the members' magnitudes, 0.1 to 0.9. Of three regions, tied: p_2 = 2 p_1
    (paper and code); free: every pair of candidates.
    """
    if regions == 1 or not bool(member.any()):
        return [0.0] * (regions - 1)
    masked = magnitudes * member
    ordered = sort_rows(masked.flatten())
    outside = len(ordered) - int(member.sum())
    ranks = outside + torch.linspace(0.1, 0.9, candidates, dtype=torch.float64) * (len(ordered) - outside - 1)
    first = ordered[ranks.round().long().to(ordered.device)]
    runs = _Runs(masked, member)
    if regions == 2 or cuts == "tied":
        thresholds = [first] if regions == 2 else [first, 2 * first]
        best = int(runs.gains([runs.up_to(threshold) for threshold in thresholds]).argmax())
        return [float(threshold[best]) for threshold in thresholds]
    count, total = runs.up_to(first)
    gains = [
        runs.gains([(count[:, i : i + 1], total[:, i : i + 1]), (count[:, i:], total[:, i:])])
        for i in range(candidates)
    ]
    low = int(torch.stack([gain.max() for gain in gains]).argmax())
    return [float(first[low]), float(first[low + int(gains[low].argmax())])]


class _Runs:
    """Rows sorted by magnitude: those outside are zeros, come first and add nothing to any sum."""

    def __init__(self, masked: Tensor, member: Tensor) -> None:
        self.rows = sort_rows(masked)
        self.sums = torch.nn.functional.pad(self.rows.cumsum(1), (1, 0))
        self.outside = (~member).sum(1, keepdim=True)

    def up_to(self, thresholds: Tensor) -> tuple[Tensor, Tensor]:
        """How many of each row are at most the thresholds [T], and what they add up to: [n, T] each."""
        count = torch.searchsorted(self.rows, thresholds.expand(len(self.rows), -1).contiguous(), right=True)
        return count, self.sums.gather(1, count)

    def gains(self, ends: list[tuple[Tensor, Tensor]]) -> Tensor:
        """What cutting at these ends, ascending, [n, T or 1] each, takes off the sum of squares of all rows: [T]."""
        whole = torch.full_like(self.outside, self.rows.shape[1]), self.sums[:, -1:]
        start, below = self.outside, self.sums[:, :1]
        total = torch.zeros_like(ends[-1][1][0])
        for count, upto in [*ends, whole]:
            total += ((upto - below).square() / (count - start).clamp(min=1)).sum(0)
            start, below = count, upto
        return total
