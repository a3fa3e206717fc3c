import itertools
from dataclasses import dataclass

import numpy as np
import pytest
import torch
from torch import Tensor

from choosing import choose_column
from matrices import damped, random_factor, random_weight
from signbit.methods import rounding
from signbit.methods.descent import descend, least_squares
from signbit.methods.options import SweepOptions
from signbit.methods.rounding import Choices, round_in_turn
from signbit.methods.sweep import sweep


@dataclass
class Levels:
    """Two scales a row, each weight with either, and a sign: float32 throughout, so nothing is lost to rounding."""

    scales: Tensor
    negative: Tensor
    large: Tensor

    def values(self) -> Tensor:
        low, high = self.scales[:, :1], self.scales[:, 1:]
        return torch.where(self.negative, -1.0, 1.0) * torch.where(self.large, high, low)

    def choices(self) -> Choices:
        low, high = self.scales.unbind(1)
        return Choices.among([torch.stack([low, -low, high, -high])], torch.zeros(self.negative.shape[1], 1))

    def choose(self, places: Tensor) -> None:
        self.negative, self.large = places.T & 1 != 0, places.T & 2 != 0

    def features(self) -> Tensor:
        signs, large = torch.where(self.negative, -1.0, 1.0), self.large.float()
        return torch.stack([signs * (1 - large), signs * large])

    def set_coefficients(self, coefficients: Tensor) -> None:
        self.scales = coefficients.T.abs()


def fit(weight: Tensor, columns: slice) -> Levels:
    mean = weight.abs().mean(1, keepdim=True)
    code = Levels(torch.cat([0.5 * mean, 1.5 * mean], dim=1), weight < 0, torch.zeros_like(weight, dtype=torch.bool))
    round_in_turn(code, weight.T)
    return code


def error_of(weight: Tensor, codes: list[Levels], hessian: Tensor) -> float:
    difference = (weight - torch.cat([code.values() for code in codes], dim=1)).double()
    return float(((difference @ hessian) * difference).sum())


@pytest.mark.parametrize("count", [1, 3])
def test_least_squares_is_the_solution_row_by_row(count: int) -> None:
    generator = torch.Generator().manual_seed(0)
    features = torch.randn(count, 4, 10, generator=generator)
    target, metric = torch.randn(4, 10, generator=generator), damped(random_factor(10)).float()
    found = least_squares(features, target @ metric, metric)
    root = np.linalg.cholesky(metric.double().numpy())
    for row in range(4):
        expected = np.linalg.lstsq(root.T @ features[:, row].double().numpy().T, root.T @ target[row].double().numpy())
        assert np.allclose(found[:, row].numpy(), expected[0], rtol=1e-3, atol=1e-4)


def test_least_squares_of_features_that_are_zero_or_alike() -> None:
    ones = torch.ones(2, 6)
    found = least_squares(torch.stack([ones, ones, 0 * ones]), 3 * ones, torch.eye(6))
    assert torch.isfinite(found).all()
    assert torch.allclose(found[:2].sum(0), torch.tensor(3.0), atol=1e-3) and (found[2] == 0).all()
    assert (least_squares(0 * ones.unsqueeze(0), ones, torch.eye(6)) == 0).all()


@pytest.mark.parametrize("size", [7, 16, 0])
def test_each_pass_lowers_the_error(size: int) -> None:
    weight, factor = random_weight(6, 33), random_factor(33)
    hessian, options = damped(factor), SweepOptions(feedback="column")
    codes = sweep(weight, factor, size, fit, options)
    groups = [slice(start, min(start + (size or 33), 33)) for start in range(0, 33, size or 33)]
    errors = [error_of(weight, codes, hessian)]
    for _ in range(6):
        descend(weight, factor, groups, codes, 1)
        errors.append(error_of(weight, codes, hessian))
    assert all(after <= before * (1 + 1e-5) for before, after in itertools.pairwise(errors))
    assert errors[1] < 0.97 * errors[0]


def test_many_passes_end_where_no_single_change_helps() -> None:
    weight, factor = random_weight(4, 24), random_factor(24)
    hessian = damped(factor)
    (code,) = sweep(weight, factor, 0, fit, SweepOptions(feedback="column", passes=60))
    least = error_of(weight, [code], hessian)
    for row in range(4):
        for column in range(24):
            for plane in (code.negative, code.large):
                plane[row, column] ^= True
                assert error_of(weight, [code], hessian) >= least * (1 - 1e-4)
                plane[row, column] ^= True


@pytest.mark.parametrize("turns", [1, 5, 128])
def test_a_pass_is_coordinate_descent(monkeypatch: pytest.MonkeyPatch, turns: int) -> None:
    """Against the textbook loop: the gradient from scratch for each column."""
    monkeypatch.setattr(rounding, "TURNS", turns)
    weight, factor = random_weight(6, 33), random_factor(33)
    hessian = damped(factor)
    found, expected = (sweep(weight, factor, 0, fit, SweepOptions(feedback="column"))[0] for _ in range(2))
    descend(weight, factor, [slice(0, 33)], [found], 1)
    product, metric = (weight.double() @ hessian).float(), hessian.float()
    expected.set_coefficients(least_squares(expected.features(), product, metric))
    for j in range(33):
        values = expected.values().double()
        gradient = (weight - values) @ hessian[:, j]
        choose_column(expected, j, (values[:, j] + gradient / hessian[j, j]).float())
    assert torch.allclose(found.values(), expected.values(), atol=1e-4)


def test_passes_of_the_sweep_are_those_of_descend() -> None:
    weight, factor = random_weight(5, 20), random_factor(20)
    once = sweep(weight, factor, 8, fit, SweepOptions(feedback="block"))
    descend(weight, factor, [slice(0, 8), slice(8, 16), slice(16, 20)], once, 2)
    both = sweep(weight, factor, 8, fit, SweepOptions(feedback="block", passes=2))
    assert all(torch.equal(a.values(), b.values()) for a, b in zip(once, both, strict=True))


@pytest.mark.parametrize("feedback", ["diagonal", "block", "column"])
def test_refits_lower_the_error(feedback: str) -> None:
    weight, factor = random_weight(20, 40), random_factor(40)
    hessian = damped(factor)
    errors = [
        error_of(weight, sweep(weight, factor, 20, fit, SweepOptions(feedback=feedback, refits=refits)), hessian)
        for refits in (0, 3)
    ]
    assert errors[1] < errors[0]
