import pytest
import torch
from torch import Tensor

from matrices import hessian_of, random_inputs, random_weight
from signbit.calibration.hessian import factorize
from signbit.methods.pruning import Importance, importance, input_power, keep_best


@pytest.mark.parametrize("damping", [0.01, 1.0])
def test_input_power_is_the_undamped_diagonal(damping: float) -> None:
    inputs = random_inputs(200, 40)
    inputs[:, [3, 17]] = 0
    hessian = hessian_of(inputs)
    found = input_power(factorize(hessian, damping))
    assert torch.allclose(found, hessian.diagonal(), rtol=1e-3, atol=1e-4 * float(hessian.diagonal().mean()))
    assert found[3] == found[17] == 0


def test_no_input_at_all() -> None:
    assert torch.equal(input_power(factorize(torch.zeros(5, 5), 0.01)), torch.zeros(5))


def slow(weight: Tensor, norms: Tensor, metric: Importance) -> Tensor:
    size = weight.double().abs()
    relative = size / size.sum(1, keepdim=True) + size / size.sum(0, keepdim=True)
    if metric == "ria":
        return relative * norms.sqrt()
    return (relative - relative.mean()) / relative.var(correction=0).sqrt() * norms


@pytest.mark.parametrize("metric", ["si", "ria"])
def test_scores_are_the_papers_formulas(metric: Importance) -> None:
    weight, inputs = random_weight(12, 40), random_inputs(200, 40)
    inputs *= 1 + torch.arange(40) % 7
    factor = factorize(hessian_of(inputs), 0.01)
    scores = importance(weight, factor, metric)
    norms = (inputs.double().square().sum(0) * 2 / 200).sqrt()
    expected = slow(weight, norms, metric)
    for columns in (slice(0, 16), slice(16, 40)):
        found = scores(weight[:, columns], columns)
        assert torch.allclose(found.double(), expected[:, columns], rtol=2e-3, atol=2e-3)


def test_standardised_scores_below_the_mean_count_large_inputs_against_a_weight() -> None:
    """That is the formula, with its consequence."""
    weight = torch.tensor([[1.0, 1.0, 8.0, 8.0]] * 4)
    factor = factorize(torch.tensor([1.0, 100.0, 1.0, 100.0]).diag(), 0.0)
    low, low_large, high, high_large = importance(weight, factor, "si")(weight, slice(0, 4))[0].tolist()
    assert low_large < low < 0 < high < high_large


@pytest.mark.parametrize("metric", ["si", "ria", "hessian", "magnitude"])
@pytest.mark.parametrize("weight", [torch.zeros(3, 8), torch.ones(3, 8), torch.ones(1, 1)], ids=str)
def test_degenerate_layers_have_scores(metric: Importance, weight: Tensor) -> None:
    width = weight.shape[1]
    for hessian in (torch.eye(width), torch.zeros(width, width)):
        scores = importance(weight, factorize(hessian, 0.01), metric)(weight, slice(0, width))
        assert scores.shape == weight.shape and scores.isfinite().all()


@pytest.mark.parametrize(("keep", "of"), [(4, 8), (1, 4), (2, 3), (5, 5), (3, 16)])
@pytest.mark.parametrize("width", [1, 3, 8, 40, 45])
def test_keeps_the_highest_of_each_cell(keep: int, of: int, width: int) -> None:
    scores = torch.randn(6, width, generator=torch.Generator().manual_seed(0))
    scores[0] = 1  # equal: left before right
    kept = keep_best(scores, keep, of)
    for start in range(0, width, of):
        cell = scores[:, start : start + of]
        count = -(-cell.shape[1] * keep // of)
        expected = torch.zeros_like(cell, dtype=torch.bool)
        expected.scatter_(1, (-cell).argsort(dim=1, stable=True)[:, :count], True)
        assert torch.equal(kept[:, start : start + of], expected)
