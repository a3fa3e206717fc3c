"""ADMM for sign factors: against trying everything, against its start, against the digest's figures."""

import itertools
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from matrices import random_factor, random_weight
from signbit.methods.admm import Metric, Schedule, solve
from signbit.methods.dual_svid import Path, rounded, truncated

DBF: dict[str, Any] = {"iterations": 120, "inner": 2, "penalty": "cubic", "start": "random"}
NANOQUANT: dict[str, Any] = {"iterations": 200, "order": "jacobi", "start": "random"}


def metric_of(width: int, seed: int = 0) -> Metric:
    """A Hessian with a diagonal of ones."""
    factor = random_factor(width, seed)
    sizes = factor.root.square().sum(1).sqrt()
    return Metric(factor.root / sizes.unsqueeze(1), factor.upper() * sizes)


def error(target: Tensor, path: Path, metric: Metric) -> float:
    difference = target - path.values()
    return float((metric.apply(difference) * difference).sum())


def relative(target: Tensor, path: Path) -> float:
    return float((target - path.values()).square().sum() / target.square().sum())


def steep(n: int, exponent: float, seed: int = 0) -> Tensor:
    """A matrix with singular values i^-exponent."""
    generator = torch.Generator().manual_seed(seed)
    left, right = (torch.linalg.qr(torch.randn(n, n, generator=generator))[0] for _ in range(2))
    return left * torch.arange(1.0, n + 1) ** -exponent @ right


@given(
    st.integers(1, 12),
    st.integers(1, 12),
    st.integers(1, 14),
    st.booleans(),
    st.sampled_from([{}, DBF, NANOQUANT, {"penalty": "cubic"}, {"start": "random"}, {"inner": 1, "order": "jacobi"}]),
    st.integers(0, 1000),
)
@settings(deadline=None, max_examples=60)
def test_it_never_ends_above_the_svid_of_its_start(
    n: int, m: int, rank: int, whole: bool, options: dict[str, Any], seed: int
) -> None:
    target, metric = random_weight(n, m, seed), metric_of(m, seed) if whole else Metric()
    schedule = Schedule(**{**options, "iterations": 12})
    found = solve(target, rank, metric, schedule)
    assert all(torch.isfinite(part).all() for part in (found.h, found.inner, found.g))
    if schedule.start == "svd":
        start = rounded(*truncated(target, rank, metric.root, metric.inverse))
    else:
        generator = torch.Generator().manual_seed(0)
        start = rounded(torch.randn(n, rank, generator=generator), torch.randn(rank, m, generator=generator))
    assert error(target, found, metric) <= error(target, start, metric) * (1 + 1e-4) + 1e-6


def least_of_all(target: Tensor) -> float:
    """The least |target - diag(h) u l v^T diag(g)|^2 of rank one, over all signs: then h and g are an SVD's."""
    n, m = target.shape
    least = float("inf")
    for u in itertools.product([1.0, -1.0], repeat=n - 1):
        for v in itertools.product([1.0, -1.0], repeat=m - 1):
            signs = torch.outer(torch.tensor([1.0, *u]), torch.tensor([1.0, *v]))
            values = torch.linalg.svdvals(signs * target)
            least = min(least, float((values[1:] ** 2).sum()))
    return least


@pytest.mark.parametrize(("options", "often"), [({}, 8), (DBF, 8), (NANOQUANT, 5)])
def test_of_rank_one_it_finds_the_best_there_is(options: dict[str, Any], often: int) -> None:
    """In most of ten matrices; Jacobi from a random start in half of them."""
    found = 0
    for seed in range(10):
        target = random_weight(4, 5, seed)
        best = least_of_all(target)
        path = solve(target, 1, Metric(), Schedule(**options))
        assert error(target, path, Metric()) >= best * (1 - 1e-4)
        found += error(target, path, Metric()) <= best * 1.01
    assert found >= often


def best_given_scales(target: Tensor, path: Path, metric: Metric) -> float:
    """Every U and V of rank 2 with the path's scales: per V, each row of U by itself."""
    n, m = target.shape
    choices = torch.tensor(list(itertools.product([1.0, -1.0], repeat=2)))
    vs = torch.tensor(list(itertools.product([1.0, -1.0], repeat=2 * m))).view(-1, 2, m)
    within = path.inner.unsqueeze(1) * vs * path.g
    rows = torch.einsum("ck,vkm->vcm", choices, within)
    total = torch.zeros(len(vs))
    for i in range(n):
        difference = target[i] - path.h[i] * rows
        total += ((metric.apply(difference.flatten(0, 1)).view_as(difference)) * difference).sum(2).min(1).values
    return float(total.min())


@pytest.mark.parametrize("whole", [False, True])
def test_of_rank_two_no_signs_are_much_better_for_the_scales_it_found(whole: bool) -> None:
    good = 0
    for seed in range(12):
        target, metric = random_weight(5, 5, seed), metric_of(5, seed) if whole else Metric()
        path = solve(target, 2, metric, Schedule())
        best = best_given_scales(target, path, metric)
        own = error(target, path, metric)
        assert own >= best * (1 - 1e-3)
        good += own <= 1.05 * best
    assert good >= 7


@pytest.mark.parametrize(
    ("exponent", "bits", "options", "wanted"),
    [
        (None, 1.0, DBF, 0.325),
        (None, 1.0, NANOQUANT, 0.328),
        (None, 0.55, {"start": "random", "iterations": 200}, 0.540),
        (0.6, 1.0, DBF, 0.162),
        (0.6, 1.0, NANOQUANT, 0.162),
        (0.6, 1.0, {"iterations": 200}, 0.162),
    ],
)
def test_errors_are_those_of_others_programs(
    exponent: float | None, bits: float, options: dict[str, Any], wanted: float
) -> None:
    n = 256
    target = torch.randn(n, n, generator=torch.Generator().manual_seed(0)) if exponent is None else steep(n, exponent)
    path = solve(target, round(bits * n / 2), Metric(), Schedule(**options))
    assert relative(target, path) == pytest.approx(wanted, rel=0.06)


@pytest.mark.parametrize(("exponent", "wanted"), [(None, 0.633), (0.6, 0.594)])
def test_dual_svid_is_what_it_is(exponent: float | None, wanted: float) -> None:
    n = 256
    target = torch.randn(n, n, generator=torch.Generator().manual_seed(0)) if exponent is None else steep(n, exponent)
    assert relative(target, rounded(*truncated(target, n // 2, None, None))) == pytest.approx(wanted, rel=0.04)


def test_the_whole_hessian_is_worth_it() -> None:
    target, metric = random_weight(64, 96), metric_of(96)
    blind, seeing = (solve(target, 40, one, Schedule()) for one in (Metric(), metric))
    assert error(target, seeing, metric) < 0.8 * error(target, blind, metric)


def test_the_truncated_decomposition_is_the_best_in_its_metric() -> None:
    target, metric = random_weight(20, 30), metric_of(30)
    A, B = truncated(target, 8, metric.root, metric.inverse)
    assert metric.root is not None
    wanted = (torch.linalg.svdvals(target @ metric.root)[8:] ** 2).sum()
    assert metric.error(target, A, B) == pytest.approx(float(wanted), rel=1e-3)


def test_nothing_is_changed_and_the_same_comes_out() -> None:
    target = random_weight(20, 30)
    before = target.clone()
    for options in ({}, NANOQUANT):
        first, second = (solve(target, 12, Metric(), Schedule(**{**options, "iterations": 10})) for _ in range(2))
        assert torch.equal(first.values(), second.values())
    assert torch.equal(target, before)
    other = Schedule(iterations=10, start="random", seed=1)
    assert not torch.equal(solve(target, 12, Metric(), other).values(), first.values())
