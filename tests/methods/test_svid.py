import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from matrices import random_weight
from signbit.methods.svid import svid


@given(st.integers(1, 40), st.integers(1, 40), st.integers(0, 1000), st.sampled_from([1.0, 1e-12, 1e-30, 1e30]))
@settings(deadline=None, max_examples=60)
def test_the_product_is_the_best_of_rank_one(n: int, m: int, seed: int, size: float) -> None:
    weight = random_weight(n, m, seed) * size
    a, c = svid(weight)
    left, values, right = torch.linalg.svd(weight.double().abs())
    wanted = values[0] * torch.outer(left[:, 0], right[0])
    assert torch.allclose(torch.outer(a.double(), c.double()), wanted, rtol=1e-4, atol=1e-4 * size)
    assert (a >= 0).all() and (c >= 0).all()
    assert torch.allclose(a.square().mean().sqrt(), c.square().mean().sqrt(), rtol=1e-3)


@pytest.mark.parametrize("seed", range(3))
def test_the_papers_proposition(seed: int) -> None:
    """No worse than the best matrix of rank one, without signs of their own."""
    weight = random_weight(30, 50, seed)
    a, c = svid(weight)
    error = (torch.where(weight < 0, -1.0, 1.0) * torch.outer(a, c) - weight).square().sum()
    rank_one = torch.linalg.svdvals(weight)[1:].square().sum()
    assert error < 0.75 * rank_one


def test_gaussian_weights_lose_what_one_sign_must() -> None:
    weight = torch.randn(400, 500, generator=torch.Generator().manual_seed(0))
    a, c = svid(weight)
    error = (torch.where(weight < 0, -1.0, 1.0) * torch.outer(a, c) - weight).square().sum() / weight.square().sum()
    assert float(error) == pytest.approx(1 - 2 / torch.pi, abs=0.005)


def test_rows_and_columns_of_zeros_have_zeros() -> None:
    weight = random_weight(8, 10)
    weight[3], weight[:, 7] = 0, 0
    a, c = svid(weight)
    assert a.nonzero().flatten().tolist() == [0, 1, 2, 4, 5, 6, 7]
    assert c.nonzero().flatten().tolist() == [0, 1, 2, 3, 4, 5, 6, 8, 9]
    assert not any(part.any() for part in svid(torch.zeros(3, 4)))


def test_blocks_that_have_nothing_to_do_with_each_other() -> None:
    """Two equal singular values: any mixture is as good, and the result is finite."""
    weight = torch.block_diag(torch.ones(3, 3), torch.ones(3, 3))
    a, c = svid(weight)
    assert (torch.outer(a, c) - weight).square().sum() == pytest.approx(9.0, rel=1e-4)


def test_nothing_is_changed_and_the_same_comes_out() -> None:
    weight = random_weight(8, 10)
    before = weight.clone()
    first, second = svid(weight), svid(weight)
    assert torch.equal(weight, before)
    assert all(torch.equal(x, y) for x, y in zip(first, second, strict=True))
