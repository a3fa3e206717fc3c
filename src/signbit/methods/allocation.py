"""How many of every M weights each decoder block keeps, N on average.

What says how much a block needs, one number a block:

    norm       the L2 norm of its weights                                   STBLLM (arXiv 2408.01803, section 3.3)
    outlier    the share of its weights whose RIA score is above 6 times the block's mean, on the inputs that the
               original model gives them                                    OWL (arXiv 2310.05175); STBLLM's code

Blocks aim at N plus that number mapped to 0 .. 2 (smallest to largest) less its mean over blocks, as in the released
code. The paper's own mapping of norms w, N_b / M = a_b + (1 - a_b) N / M with a_b = w_b / sum w, cannot be what gave
its results: it exceeds the total, and as a_b is about 1 / blocks it rounds to the same N everywhere in a deep model.

The code then rounds each block, and so keeps 52.3% of Llama-2-7B where 50% were asked for. Here N is given out one by
one, each to the block furthest below its aim, until the total is reached: it is met exactly where blocks are of one
size, and never exceeded.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Literal

import torch

from signbit.methods.options import LinearSurvey, Survey
from signbit.methods.pruning import ria

Allocation = Literal["uniform", "norm", "outlier"]
SPREAD = 2.0
OUTLIER = 6.0


def needs(survey: Survey, allocation: Allocation) -> tuple[list[float], list[int]]:
    """What each block needs, by that rule, and how many weights it has."""
    measure = {"norm": _norm, "outlier": _outliers}[allocation]
    found, sizes = [], []
    for block in survey(inputs=allocation == "outlier"):
        linears = list(block.values())
        found.append(measure(linears))
        sizes.append(sum(linear.weight.numel() for linear in linears))
    return found, sizes


def allocate(needed: list[float], sizes: list[int], keep: int, of: int) -> list[int]:
    """N of each block, 1 to ``of``, on average over the weights at most ``keep``."""
    known = [need for need, size in zip(needed, sizes, strict=True) if size]
    width = max(known) - min(known)
    unit = SPREAD / width if width else 0.0
    center = sum(known) / len(known)
    aims = [keep + unit * (need - center) for need in needed]
    counts = [1] * len(sizes)
    left = (keep - 1) * sum(sizes)
    while True:
        open_blocks = [b for b, size in enumerate(sizes) if counts[b] < of and size <= left]
        if not open_blocks:
            return counts
        chosen = max(open_blocks, key=lambda b: (aims[b] - counts[b], -b))
        counts[chosen] += 1
        left -= sizes[chosen]


def _norm(linears: Iterable[LinearSurvey]) -> float:
    return sum(float(linear.weight.square().sum()) for linear in linears) ** 0.5


def _outliers(linears: Iterable[LinearSurvey]) -> float:
    scores = []
    for linear in linears:
        power = linear.power
        assert power is not None
        scores.append(ria(linear.weight, power)(linear.weight, slice(None)))
    count = sum(score.numel() for score in scores)
    if not count:
        return 0.0
    threshold = OUTLIER * sum(float(score.sum(dtype=torch.float64)) for score in scores) / count
    return sum(int((score > threshold).sum()) for score in scores) / count
