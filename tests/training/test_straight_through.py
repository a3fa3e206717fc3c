import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from signbit.training.straight_through import Estimator, rounded, sgn, sgn_gradient, through

LATENTS = torch.tensor([-3.0, -1.0, -0.5, -0.01, -0.0, 0.0, 1e-30, 0.01, 0.5, 1.0, 1.5], dtype=torch.float64)


def test_the_sign_of_zero_is_plus_one() -> None:
    assert sgn(LATENTS).tolist() == [-1, -1, -1, -1, 1, 1, 1, 1, 1, 1, 1]
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        assert sgn(LATENTS.to(dtype)).dtype == dtype


@pytest.mark.parametrize(
    ("estimator", "derivative"),
    [
        ("identity", torch.ones(11, dtype=torch.float64)),
        ("tanh", 1.001 - (LATENTS.exp() - (-LATENTS).exp()).square() / (LATENTS.exp() + (-LATENTS).exp()).square()),
        ("clip", torch.tensor([0, 1, 1, 1, 1, 1, 1, 1, 1, 1, 0], dtype=torch.float64)),
    ],
)
def test_gradients_are_their_formulas(estimator: Estimator, derivative: torch.Tensor) -> None:
    gradient = torch.linspace(-2, 3, 11, dtype=torch.float64)
    assert torch.allclose(sgn_gradient(LATENTS, gradient, estimator), gradient * derivative, rtol=1e-12)


@pytest.mark.parametrize(
    ("estimator", "smooth"),
    [
        ("identity", lambda w: w),
        ("tanh", lambda w: 0.001 * w + torch.tanh(w)),
        ("clip", lambda w: w.clamp(-1, 1)),
    ],
)
def test_gradients_are_those_of_the_smooth_function_that_stands_for_the_sign(estimator: Estimator, smooth) -> None:
    """By central differences."""
    latents = torch.tensor([-2.0, -0.7, -0.01, 0.02, 0.4, 0.99, 1.3], dtype=torch.float64)
    step = 1e-6
    slope = (smooth(latents + step) - smooth(latents - step)) / (2 * step)
    assert torch.allclose(sgn_gradient(latents, torch.ones_like(latents), estimator), slope, atol=1e-8)


def test_through_takes_the_value_and_gives_back_the_gradient() -> None:
    latent = torch.tensor([1.0, 2.0], requires_grad=True)
    (through(latent, torch.tensor([5.0, -3.0], requires_grad=True)) * torch.tensor([2.0, 7.0])).sum().backward()
    assert latent.grad is not None
    assert latent.grad.tolist() == [2, 7]
    assert through(latent, torch.tensor([5.0, -3.0])).tolist() == [5, -3]


@given(st.floats(-6e4, 6e4, width=32), st.sampled_from([torch.float16, torch.bfloat16]))
def test_rounded_is_what_the_dtype_holds(value: float, dtype: torch.dtype) -> None:
    latent = torch.tensor([value], requires_grad=True)
    found = rounded(latent, dtype)
    assert found.dtype == torch.float32
    assert torch.equal(found, latent.detach().to(dtype).float())
    found.backward()
    assert latent.grad is not None
    assert latent.grad.item() == 1
