import pytest
import torch

from signbit.layouts.haar import haar


def matrix_of(length: int, group_size: int) -> torch.Tensor:
    return haar(torch.eye(length, dtype=torch.float64), 0, group_size)


@pytest.mark.parametrize("group_size", [0, 4, 5, 1])
@pytest.mark.parametrize("length", [1, 2, 7, 16])
def test_orthonormal_and_its_own_inverse(length: int, group_size: int) -> None:
    transform = matrix_of(length, group_size)
    identity = torch.eye(length, dtype=torch.float64)
    assert torch.allclose(transform @ transform.T, identity, atol=1e-15)
    assert torch.allclose(transform @ transform, identity, atol=1e-15)


@pytest.mark.parametrize("dim", [0, 1])
def test_the_inverse_is_exact_to_float32(dim: int) -> None:
    x = torch.randn(33, 65, generator=torch.Generator().manual_seed(0))
    back = haar(haar(x, dim, 8), dim, 8)
    assert float((back - x).abs().max()) <= 4 * torch.finfo(torch.float32).eps * float(x.abs().max())


@pytest.mark.parametrize("dim", [0, 1])
def test_low_and_high_stand_where_the_pair_stood(dim: int) -> None:
    x = torch.tensor([[3.0, 1.0, 5.0, 5.0, 7.0]])
    root = 2**-0.5
    expected = torch.tensor([[4 * root, 2 * root, 10 * root, 0.0, 7.0]])
    found = haar(x if dim == 1 else x.T, dim)
    assert torch.allclose(found if dim == 1 else found.T, expected)


def test_no_pair_reaches_over_the_end_of_a_group() -> None:
    x = torch.randn(4, 14, generator=torch.Generator().manual_seed(0))
    for size in (1, 3, 4, 5, 20):
        parts = [haar(part, 1) for part in x.split(size, 1)]
        assert torch.equal(haar(x, 1, size), torch.cat(parts, 1))
