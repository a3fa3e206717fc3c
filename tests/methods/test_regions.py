import itertools
from typing import Any, get_args

import numpy as np
import pytest
import torch
from torch import Tensor

from matrices import random_weight
from signbit.methods.regions import Cuts, search_cuts
from signbit.methods.salience import search_column_count


def error(magnitudes: np.ndarray, member: np.ndarray, cuts: tuple[float, ...]) -> float:
    """Binarize each region by itself, row by row."""
    total = 0.0
    for row, inside in zip(magnitudes, member, strict=True):
        region = np.searchsorted(cuts, row, side="left")
        for r in range(len(cuts) + 1):
            part = row[inside & (region == r)]
            total += float(((part - part.mean()) ** 2).sum()) if part.size else 0.0
    return total


@pytest.mark.parametrize("cuts", get_args(Cuts))
@pytest.mark.parametrize("regions", [2, 3])
@pytest.mark.parametrize("seed", range(3))
def test_the_cuts_are_the_best_of_the_candidates(regions: int, cuts: Cuts, seed: int) -> None:
    magnitudes = random_weight(5, 24, seed).abs()
    member = torch.rand(5, 24, generator=torch.Generator().manual_seed(seed)) < 0.6
    found = search_cuts(magnitudes, member, regions, 12, cuts)
    x, inside = magnitudes.double().numpy(), member.numpy()
    candidates = np.quantile(x[inside], np.linspace(0.1, 0.9, 12), method="nearest")
    sets: list[tuple[Any, ...]]
    if regions == 2:
        sets = [(p,) for p in candidates]
    elif cuts == "tied":
        sets = [(p, 2 * p) for p in candidates]
    else:
        sets = list(itertools.combinations_with_replacement(candidates, 2))
    best = min(error(x, inside, choice) for choice in sets)
    assert len(found) == regions - 1
    assert error(x, inside, tuple(found)) == pytest.approx(best, rel=1e-5)


def test_one_region_has_no_cuts() -> None:
    assert search_cuts(torch.ones(2, 4), torch.ones(2, 4, dtype=torch.bool), 1, 9, "tied") == []


@pytest.mark.parametrize("cuts", get_args(Cuts))
def test_degenerate_groups(cuts: Cuts) -> None:
    nobody = torch.zeros(2, 4, dtype=torch.bool)
    assert search_cuts(torch.ones(2, 4), nobody, 3, 9, cuts) == [0, 0]
    assert len(search_cuts(torch.zeros(2, 4), ~nobody, 3, 9, cuts)) == 2
    assert len(search_cuts(torch.ones(1, 1), torch.ones(1, 1, dtype=torch.bool), 3, 1, cuts)) == 2


def binarized_twice(x: Tensor, times: int) -> float:
    """What is left of the squares of x [k] after binarizing it so often."""
    for _ in range(times if len(x) else 0):
        x = x - x.abs().mean() * torch.where(x < 0, -1.0, 1.0)
    return float(x.square().sum())


@pytest.mark.parametrize("residual_rest", [False, True])
@pytest.mark.parametrize("seed", range(4))
def test_the_column_count_counts_members_only(residual_rest: bool, seed: int) -> None:
    """A pruned weight is no zero to be approximated: it is not there."""
    member = torch.rand(7, 20, generator=torch.Generator().manual_seed(seed)) < 0.5
    magnitudes = random_weight(7, 20, seed).abs().double() * member
    errors = []
    for count in range(1, 13):
        parts = [(slice(0, count), 2), (slice(count, None), 1 + residual_rest)]
        errors.append(
            sum(
                binarized_twice(row[at][inside[at]], times)
                for row, inside in zip(magnitudes, member, strict=True)
                for at, times in parts
            )
        )
    found = search_column_count(magnitudes, 12, residual_rest=residual_rest, member=member)
    assert errors[found - 1] == pytest.approx(min(errors), rel=1e-9)
