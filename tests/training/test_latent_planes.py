"""Layouts that train by their own mathematics: values, gradients, and the way back into bits."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from signbit.bench import random_layouts as random
from signbit.errors import SignbitError
from signbit.layouts import HaarPlanes, Layout, SplitPlanes, Structured
from signbit.training.latent import latent_of
from signbit.training.options import TrainingOptions
from signbit.training.planes import LatentPlanes


def haar_columns(n: int, m: int) -> Layout:
    groups = -(-m // random.GROUP)
    return HaarPlanes.encode(
        axis="column",
        negative=torch.rand(n, m) < 0.5,
        second=torch.rand(n, m) < 0.5,
        scales=torch.rand(n, groups, 1, 2).half(),
        means=torch.rand(n, groups, 1, 1).half(),
        salient=None,
        group_size=random.GROUP,
    )


def arb(n: int, m: int) -> Layout:
    """Split planes with all that they may have."""
    salient, groups = random._salient_columns(m)
    count, all_groups = int(salient.sum()), -(-m // random.GROUP)
    return SplitPlanes.encode(
        negative=torch.rand(n, m) < 0.5,
        second=torch.rand(n, m) < 0.5,
        salient=salient,
        scales=torch.rand(n, all_groups, 2).half(),
        means=None,
        salient_scales=torch.rand(n, groups, 2, 2).half(),
        salient_means=None,
        group_size=random.GROUP,
        residual=torch.rand(n, count) < 0.5,
        column_scales=torch.rand(2, m).half(),
        salient_column_scales=torch.rand(2, 2, count).half(),
    )


Maker = Callable[[int, int], Layout]
MAKERS: dict[str, Maker] = {
    "billm": random.billm,
    "arb": arb,
    "hbllm-row": random.hbllm,
    "hbllm-column": haar_columns,
    "stbllm": random.stbllm,
    "int4": random.int4,
}
every = pytest.mark.parametrize("make", MAKERS.values(), ids=MAKERS.keys())


def latent(start: Layout, **options: Any) -> LatentPlanes:
    made = latent_of(start, torch.zeros(start.shape), None, TrainingOptions(**options))
    assert isinstance(made, LatentPlanes)
    return made


@every
@pytest.mark.parametrize("shape", [(7, 200), (10, 128)])
def test_the_matrix_is_what_is_stored(make: Maker, shape: tuple[int, int]) -> None:
    torch.manual_seed(0)
    start = make(*shape)
    module = latent(start)
    assert torch.equal(module.weight(), start.dequantize())
    packed = module.pack()
    assert dict(packed.named_buffers()).keys() == dict(start.named_buffers()).keys()
    for name, tensor in packed.named_buffers():
        assert torch.equal(tensor, start.get_buffer(name)), name


@every
def test_what_was_trained_is_what_is_stored(make: Maker) -> None:
    torch.manual_seed(1)
    module = latent(make(6, 136))
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.02)
    assert torch.equal(module.weight(), module.pack().dequantize())


@every
def test_gradients_of_coefficients_are_those_of_the_matrix(make: Maker) -> None:
    """By differences: W is linear in each coefficient, so two evaluations are exact up to rounding."""
    torch.manual_seed(2)
    module = latent(make(6, 136))
    direction = torch.randn(module.start.shape)
    (module.weight() * direction).sum().backward()
    for one in module.scales():
        place = tuple(int(torch.randint(0, size, ())) for size in one.shape)
        gradient, before = float(one.grad[place]), float(one.detach()[place])  # type: ignore[index]
        step = 0.5  # far beyond what storage rounds
        losses = []
        for value in (before + step, before - step):
            with torch.no_grad():
                one[place] = value
            losses.append(float((module.weight() * direction).sum()))
        with torch.no_grad():
            one[place] = before
        assert gradient == pytest.approx((losses[0] - losses[1]) / (2 * step), rel=5e-3, abs=5e-3)


@every
def test_gradients_of_latents_are_those_of_signs(make: Maker) -> None:
    """Turning one sign changes a linear loss by minus twice sign and gradient."""
    torch.manual_seed(3)
    module = latent(make(6, 136), straight_through="identity")
    direction = torch.randn(module.start.shape)

    def loss() -> Tensor:
        return (module.weight() * direction).sum()

    before = loss()
    before.backward()
    for plane in module.latents():
        assert plane.grad is not None
        row, column = divmod(int(plane.grad.abs().argmax()), plane.shape[1])
        gradient, sign = float(plane.grad[row, column]), float(plane.detach()[row, column].sign())
        with torch.no_grad():
            plane[row, column] *= -1
            changed = loss() - before
            plane[row, column] *= -1
        assert float(changed) == pytest.approx(-2 * sign * gradient, rel=1e-3, abs=1e-4)


def test_magnitudes_of_the_weights_are_refused() -> None:
    with pytest.raises(SignbitError, match="use margins or constant"):
        latent(random.billm(4, 64), latent="weights")


@every
def test_latents_start_at_what_turning_costs_for_its_effect(make: Maker) -> None:
    """Turned, a sign adds 4 a d to the squared error and moves the weight by 2 a: |d| is half of what one is by the
    other."""
    torch.manual_seed(4)
    start = make(4, 136)
    weight = start.dequantize() + 0.3 * torch.randn(start.shape)
    module = latent_of(start, weight, None, TrainingOptions(latent="margins"))
    before = start.dequantize()
    for plane in module.latents():
        found, wanted = [], []
        for column in range(plane.shape[1]):
            size = float(plane.detach()[2, column].abs())
            with torch.no_grad():
                plane[2, column] *= -1
                turned = module.weight()
                plane[2, column] *= -1
            moved = float((turned - before).norm())
            if moved > 0:
                cost = float((turned - weight).square().sum() - (before - weight).square().sum())
                found.append(size)
                wanted.append(abs(cost) / (2 * moved))
        mean = sum(wanted) / len(wanted)
        assert found == pytest.approx([0.01 * d / mean for d in wanted], rel=0.01, abs=3e-5)


def test_a_tiny_scale_leaves_the_margins_of_others_alone() -> None:
    """A part of few weights may have next to no scale. Counted in such scales its margins would be in the millions."""
    torch.manual_seed(5)
    start = random.stbllm(8, 512)
    weight = start.dequantize() + 0.3 * torch.randn(start.shape)
    scales = start.get_buffer("scales").clone()
    scales[:, 0, 0] = 1e-6
    tiny = Structured(start.spec, dict(start.named_buffers()) | {"scales": scales})
    sizes = [
        latent_of(one, weight, None, TrainingOptions(latent="margins")).latents()[0].detach().abs().median()
        for one in (start, tiny)
    ]
    assert 0.5 < float(sizes[1] / sizes[0]) < 2
    assert float(sizes[1]) > 2e-3
