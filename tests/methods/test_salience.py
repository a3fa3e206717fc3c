import pytest
import torch
from torch import Tensor

from matrices import binarized, damped, random_factor, random_weight
from signbit.methods.salience import salience, search_column_count


def errors(x: Tensor, limit: int, residual_rest: bool) -> list[float]:
    """Squared error for 1 .. limit leading columns binarized twice."""
    x = x.double()
    return [
        float((binarized(x[:, :count], times=2) - x[:, :count]).square().sum())
        + float((binarized(x[:, count:], times=1 + residual_rest) - x[:, count:]).square().sum())
        for count in range(1, min(limit, x.shape[1]) + 1)
    ]


def sorted_columns(n: int, k: int, seed: int) -> Tensor:
    """Columns in descending size, the first few much larger: some count between 1 and k is best."""
    weight = random_weight(n, k, seed)
    weight[:, :: max(k // 4, 2)] *= 4
    return weight[:, weight.square().sum(0).argsort(descending=True)]


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("residual_rest", [False, True])
@pytest.mark.parametrize(("k", "limit"), [(128, 49), (40, 40), (10, 49), (2, 5), (1, 1)])
def test_count_is_that_of_trying_all(k: int, limit: int, residual_rest: bool, seed: int) -> None:
    weight = sorted_columns(6, k, seed)
    magnitudes = weight.square() if residual_rest else weight.abs()  # BiLLM's two uses
    tried = errors(magnitudes, limit, residual_rest)
    found = search_column_count(magnitudes, limit, residual_rest=residual_rest)
    assert tried[found - 1] == pytest.approx(min(tried), rel=1e-5)


@pytest.mark.parametrize("residual_rest", [False, True])
def test_the_choices_tried_here_are_not_trivial(residual_rest: bool) -> None:
    """The best count lies inside the range, and some count is clearly worse."""
    for seed in range(4):
        tried = errors(sorted_columns(6, 40, seed).abs(), 40, residual_rest)
        assert 1 < 1 + tried.index(min(tried)) < 40
        assert max(tried) > 1.05 * min(tried)


def test_signs_do_not_matter_to_the_error() -> None:
    """What allows the search to look at magnitudes only."""
    weight = sorted_columns(4, 20, 0)
    assert errors(weight, 20, False) == pytest.approx(errors(weight.abs(), 20, False))


@pytest.mark.parametrize("residual_rest", [False, True])
def test_no_column_is_salient_where_none_may_be(residual_rest: bool) -> None:
    assert search_column_count(torch.ones(3, 8), 0, residual_rest=residual_rest) == 0


@pytest.mark.parametrize("residual_rest", [False, True])
@pytest.mark.parametrize("value", [0.0, 1.0])
def test_constant_blocks(residual_rest: bool, value: float) -> None:
    assert 1 <= search_column_count(torch.full((3, 8), value), 5, residual_rest=residual_rest) <= 5


def test_hessian_salience_is_twice_the_loss_of_zeroing_a_weight_with_the_later_ones_free() -> None:
    factor = random_factor(12)
    hessian = damped(factor)
    weight = random_weight(3, 12)
    found = salience(weight, factor.diagonal, "hessian")
    for j in range(12):
        # 1/2 d H d^T over d with d_j = -w_j and d_(j+1).. free; normal equations for the free part.
        later = hessian[j + 1 :, j + 1 :]
        schur = hessian[j, j] - hessian[j, j + 1 :] @ torch.linalg.solve(later, hessian[j + 1 :, j])
        assert torch.allclose(found[:, j].double(), weight[:, j].double() ** 2 * schur, rtol=1e-4)


def test_magnitude_salience() -> None:
    assert salience(torch.tensor([[-2.0, 1.0]]), torch.tensor([9.0, 0.1]), "magnitude").tolist() == [[2.0, 1.0]]
