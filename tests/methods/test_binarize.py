from itertools import product

import numpy as np
import pytest
import torch
from torch import Tensor

from signbit.methods.binarize import binarize

FP16 = torch.float16


def weights_and_members(n: int, k: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(n, k, generator=generator) + 0.3, torch.rand(n, k, generator=generator) < 0.6


@pytest.mark.parametrize("mean", [False, True])
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_scale_is_the_least_squares_one_for_its_signs_and_mean(mean: bool, masked: bool, dtype: torch.dtype) -> None:
    weight, member = weights_and_members(20, 37)
    result = binarize(weight, member if masked else None, mean, dtype)
    assert result.scale.dtype == dtype
    assert (result.mean is not None) == mean
    for i in range(20):
        of = member[i] if masked else torch.ones(37, dtype=torch.bool)
        members = weight[i, of].double().numpy()
        center = 0.0
        if result.mean is not None:
            center = float(result.mean[i])
            assert torch.tensor(members.mean()).to(dtype) == result.mean[i]
        signs = 1.0 - 2.0 * result.negative[i, of].double().numpy()
        assert np.array_equal(signs, np.where(members < center, -1.0, 1.0))
        alpha = np.linalg.lstsq(signs[:, None], members - center, rcond=None)[0][0]
        assert float(result.scale[i]) == pytest.approx(alpha, rel=torch.finfo(dtype).eps)


def test_no_other_signs_and_scale_do_better() -> None:
    """Against all 2^7 sign patterns, each with its own best scale."""
    weight, member = weights_and_members(6, 7)
    result = binarize(weight, member, False, FP16)
    for i in range(6):
        members = weight[i, member[i]]
        patterns = torch.tensor(list(product([-1.0, 1.0], repeat=len(members))))
        best = (members.square().sum() - (patterns @ members).square() / len(members)).min()
        error = (result.values()[i, member[i]] - members).square().sum()
        assert float(error) == pytest.approx(float(best), rel=1e-4)


def test_what_is_no_member_has_no_say() -> None:
    weight, member = weights_and_members(4, 10)
    result = binarize(weight, member, True, FP16)
    other = binarize(torch.where(member, weight, 1e4), member, True, FP16)
    assert torch.equal(result.scale, other.scale)
    assert result.mean is not None and other.mean is not None and torch.equal(result.mean, other.mean)
    assert torch.equal(result.negative & member, other.negative & member)


def test_signs_are_taken_around_the_stored_mean() -> None:
    """The mean of the row rounds up to 1 in float16; a weight between the two is negative."""
    exact = 1 - 2**-13
    weight = torch.tensor([[exact, exact]])
    result = binarize(weight, None, True, FP16)
    assert result.mean is not None and result.mean.item() == 1
    assert result.negative.all()


def test_zero_is_positive() -> None:
    result = binarize(torch.tensor([[0.0, -0.0, -2.0, 2.0]]), None, False, FP16)
    assert result.negative.tolist() == [[False, False, True, False]]
    assert result.values().tolist() == [[1.0, 1.0, -1.0, 1.0]]


@pytest.mark.parametrize("mean", [False, True])
def test_rows_without_members_are_zero(mean: bool) -> None:
    weight, member = weights_and_members(3, 5)
    member[1] = False
    result = binarize(weight, member, mean, FP16)
    assert torch.equal(result.values()[1], torch.zeros(5))
    assert (result.scale[[0, 2]] > 0).all()


def test_no_columns() -> None:
    result = binarize(torch.zeros(3, 0), None, True, FP16)
    assert result.values().shape == (3, 0)
    assert torch.equal(result.scale, torch.zeros(3, dtype=FP16))
