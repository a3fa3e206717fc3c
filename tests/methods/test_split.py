from typing import get_args

import numpy as np
import pytest
import torch
from torch import Tensor

from matrices import random_weight
from signbit.methods.split import Center, Grid, Scale, search_row_thresholds, search_threshold, split_gains


def error_of_split(x: Tensor, threshold: float, mean: bool) -> float:
    """Binarize the entries up to the threshold and those beyond apart, row by row, and measure."""
    total = 0.0
    for row in x.numpy():
        for part in (row[row <= threshold], row[row > threshold]):
            if part.size:
                center = part.mean(dtype=np.float64) if mean else 0.0
                deviation = part.astype(np.float64) - center
                values = np.where(deviation < 0, -1, 1) * np.abs(deviation).mean()
                total += float(((deviation - values) ** 2).sum())
    return total


@pytest.mark.parametrize("mean", [False, True])
@pytest.mark.parametrize(("n", "k"), [(5, 79), (1, 3), (3, 1)])
def test_gain_is_what_splitting_takes_off_the_sum_of_squares(n: int, k: int, mean: bool) -> None:
    x = random_weight(n, k).abs()
    # Also thresholds that are entries, lie below all of them, and beyond.
    thresholds = torch.cat([torch.linspace(0, 1.2 * float(x.max()), 25), x.flatten()[:5], torch.tensor([-1.0, 9.0])])
    gains = split_gains(x, thresholds, mean)
    assert gains.shape == thresholds.shape
    whole = float(x.double().square().sum())
    for threshold, gain in zip(thresholds.tolist(), gains.tolist(), strict=True):
        assert whole - gain == pytest.approx(error_of_split(x, threshold, mean), abs=2e-6 * whole)


def test_entries_at_the_threshold_belong_to_the_concentrated_part() -> None:
    x = torch.tensor([[1.0, 1.0, 3.0, 3.0]])
    assert split_gains(x, torch.tensor([1.0, 0.99, 3.0]), mean=False).tolist() == [20.0, 16.0, 16.0]


@pytest.mark.parametrize("mean", [False, True])
@pytest.mark.parametrize("grid", ["quantile", "max"])
@pytest.mark.parametrize("seed", range(3))
def test_search_finds_the_best_candidate(grid: Grid, mean: bool, seed: int) -> None:
    x = random_weight(6, 61, seed).abs()
    fractions = np.linspace(0.1, 0.9, 81)
    candidates = fractions * float(x.max())
    if grid == "quantile":
        candidates = np.quantile(x.numpy(), fractions, method="nearest")
    tried = {float(candidate): error_of_split(x, float(candidate), mean) for candidate in candidates}
    found = search_threshold(x, 81, grid, mean)
    assert min(abs(found - candidate) for candidate in tried) < 1e-6
    assert error_of_split(x, found, mean) == pytest.approx(min(tried.values()), rel=1e-4)
    assert max(tried.values()) > 1.05 * min(tried.values())


@pytest.mark.parametrize("grid", ["quantile", "max"])
def test_one_candidate(grid: Grid) -> None:
    x = torch.tensor([[1.0, 2.0, 3.0, 40.0]])
    assert search_threshold(x, 1, grid, mean=False) == pytest.approx(1.0 if grid == "quantile" else 4.0)


@pytest.mark.parametrize("mean", [False, True])
@pytest.mark.parametrize("grid", ["quantile", "max"])
@pytest.mark.parametrize("value", [0.0, 0.7])
def test_constant_input(grid: Grid, mean: bool, value: float) -> None:
    threshold = search_threshold(torch.full((4, 9), value), 81, grid, mean)
    assert 0 <= threshold <= value + 1e-6


def test_the_search_leaves_its_input_alone() -> None:
    x = random_weight(3, 20).abs()
    before = x.clone()
    search_threshold(x, 81, "quantile", mean=True)
    assert torch.equal(x, before)


# --- thresholds of rows -----------------------------------------------------------------------------------------------


def error_of_row(row: np.ndarray, threshold: float, center: Center, scale: Scale) -> float:
    total = 0.0
    for part in (row[np.abs(row) <= threshold], row[np.abs(row) > threshold]):
        if part.size:
            deviation = np.abs(part - {"zero": 0.0, "shared": row.mean(), "own": part.mean()}[center])
            size = deviation.mean() if scale == "l1" else np.sqrt((deviation**2).mean())
            total += float(((deviation - size) ** 2).sum())
    return total


@pytest.mark.parametrize("each_row", [False, True])
@pytest.mark.parametrize("scale", get_args(Scale))
@pytest.mark.parametrize("center", get_args(Center))
@pytest.mark.parametrize(("n", "k"), [(6, 61), (1, 5), (4, 2), (3, 1)])
def test_row_thresholds_are_the_best_candidates(n: int, k: int, center: Center, scale: Scale, each_row: bool) -> None:
    x = random_weight(n, k) + 0.1
    found = search_row_thresholds(x, 41, center, scale, each_row)
    assert found.shape == (n, 1)
    rows = x.double().numpy()
    pools = np.abs(rows) if each_row else np.broadcast_to(np.abs(rows).flatten(), (n, n * k))
    candidates = np.quantile(pools, np.linspace(0.1, 0.9, 41), axis=1, method="nearest")
    errors = np.array([[error_of_row(rows[i], c[i], center, scale) for i in range(n)] for c in candidates])
    reached = np.array([error_of_row(rows[i], float(found[i]) + 1e-9, center, scale) for i in range(n)])
    if not each_row:
        assert len(set(found.flatten().tolist())) == 1
        errors, reached = errors.sum(1), reached.sum()
    assert np.allclose(reached, errors.min(0), atol=1e-5)


@pytest.mark.parametrize("center", get_args(Center))
@pytest.mark.parametrize("value", [0.0, -0.7])
def test_row_thresholds_of_constant_rows(center: Center, value: float) -> None:
    assert torch.equal(
        search_row_thresholds(torch.full((4, 9), value), 41, center, "l1", True), torch.full((4, 1), abs(value))
    )
