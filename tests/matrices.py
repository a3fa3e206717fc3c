"""Random weights and correlated inputs, and what calibration makes of them."""

import torch
from torch import Tensor

from signbit.calibration.hessian import Factor, HessianAccumulator, factorize


def random_weight(n: int, m: int, seed: int = 0) -> Tensor:
    """Heavy-tailed, with columns of different sizes, as weights are."""
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(n, m, generator=generator) * torch.rand(n, m, generator=generator)
    return weight * (0.5 + torch.rand(m, generator=generator))


def skewed_weight(n: int, m: int, seed: int = 0) -> Tensor:
    """A few columns stand out, as in the models that salience was made for."""
    weight = random_weight(n, m, seed)
    weight[:, 3::11] *= 3
    return weight


def half(x: Tensor) -> Tensor:
    """x as float16 holds it, in float64."""
    return x.half().double()


def random_inputs(tokens: int, width: int, seed: int = 0) -> Tensor:
    """Correlated inputs of different sizes."""
    generator = torch.Generator().manual_seed(seed)
    mix = torch.randn(width, width, generator=generator) / width**0.5 + torch.eye(width)
    return torch.randn(tokens, width, generator=generator) @ mix


def hessian_of(inputs: Tensor) -> Tensor:
    accumulator = HessianAccumulator(inputs.shape[-1], torch.device("cpu"))
    accumulator.add(inputs)
    return accumulator.hessian()


def random_factor(width: int, seed: int = 0) -> Factor:
    return factorize(hessian_of(random_inputs(4 * width, width, seed)), 0.01)


def damped(factor: Factor) -> Tensor:
    """The Hessian that was factored, in float64."""
    return factor.root.double() @ factor.root.double().T


def binarized(x: Tensor, times: int) -> Tensor:
    """Each row of x, then its residual, and so on, binarized without means and put together again."""
    values = torch.zeros_like(x)
    for _ in range(times if x.shape[1] else 0):
        rest = x - values
        values = values + rest.abs().mean(1, keepdim=True) * torch.where(rest < 0, -1.0, 1.0)
    return values
