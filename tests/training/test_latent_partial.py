"""Partial binarization in training: the start, frozen salient weights, gradients."""

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from matrices import random_factor, random_weight
from signbit.layouts import Partial
from signbit.layouts.base import SCALE_DTYPES
from signbit.layouts.bits import unpack_bits
from signbit.methods import pb_llm
from signbit.methods.pb_llm import PBLLMOptions
from signbit.modules import QuantizedLinear
from signbit.training import product
from signbit.training.latent import LatentLinear, latent_of
from signbit.training.options import TrainingOptions


def random_start(
    n: int,
    m: int,
    group_size: int,
    share: float,
    code_bits: int,
    row_codes: bool,
    mean: bool,
    dtype: str,
    seed: int = 0,
) -> Partial:
    generator = torch.Generator().manual_seed(seed)
    groups = -(-m // (group_size or m))

    def coefficients(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator).to(SCALE_DTYPES[dtype])

    return Partial.encode(
        negative=torch.rand(n, m, generator=generator) < 0.5,
        scales=coefficients(n, groups).abs(),
        means=coefficients(n, groups) if mean else None,
        salient=torch.rand(n, m, generator=generator) < share,
        q=torch.randint(0, 2 ** (code_bits - 1), (n, m), generator=generator).to(torch.uint8),
        code_bits=code_bits,
        code_scales=coefficients(n, 1 if row_codes else groups).abs(),
        code_offsets=coefficients(n, 1 if row_codes else groups) if mean else None,
        group_size=group_size,
    )


starts = st.fixed_dictionaries(
    {
        "n": st.integers(1, 20),
        "m": st.integers(1, 70),
        "group_size": st.sampled_from([0, 7, 32, 33, 64]),
        "share": st.sampled_from([0.0, 0.1, 0.4, 1.0]),
        "code_bits": st.integers(2, 8),
        "row_codes": st.booleans(),
        "mean": st.booleans(),
        "dtype": st.sampled_from(list(SCALE_DTYPES)),
        "seed": st.integers(0, 2**31),
    }
)


def some_start(**changes: Any) -> Partial:
    usual: dict[str, Any] = {"n": 20, "m": 70, "group_size": 32, "share": 0.2, "code_bits": 4, "row_codes": True}
    return random_start(**{**usual, "mean": True, "dtype": "float16", **changes})


def salient_of(layout: Partial) -> Tensor:
    """Bool [n, m]."""
    n, m = layout.shape
    marked = torch.zeros(n * m, dtype=torch.bool)
    marked[layout.salient_places()] = True
    return marked.view(n, m)


def shake(latent: LatentLinear, seed: int = 0) -> LatentLinear:
    """As after some training: everything that is trained has moved, as an optimizer moves what has a gradient."""
    generator = torch.Generator().manual_seed(seed)
    latent(torch.randn(50, latent.in_features, generator=generator)).square().sum().backward()
    with torch.no_grad():
        for parameter in latent.latents() + latent.scales():
            assert parameter.grad is not None
            noise = torch.randn(parameter.shape, generator=generator)
            parameter.add_(parameter.abs().mean() * noise * (parameter.grad != 0))
    latent.zero_grad()
    return latent


def options_of(**options: Any) -> TrainingOptions:
    return TrainingOptions(**options)


def same(layout: Partial, other: Any) -> bool:
    return layout.spec == other.spec and all(
        torch.equal(other.state_dict()[name], tensor) for name, tensor in layout.state_dict().items()
    )


@given(
    starts, st.sampled_from(["learned", "fixed"]), st.sampled_from(["constant", "weights", "margins"]), st.booleans()
)
@settings(deadline=None, max_examples=60)
def test_packed_untrained_it_is_the_start(start: dict[str, Any], scales: str, magnitudes: str, freeze: bool) -> None:
    layout = random_start(**start)
    options = options_of(scales=scales, latent=magnitudes, freeze_salient=freeze)
    latent = latent_of(layout, random_weight(*layout.shape), None, options)
    assert torch.equal(latent.weight(), layout.dequantize())
    assert same(layout, latent.pack())


@given(starts, st.sampled_from(["learned", "fixed", "optimal"]), st.booleans())
@settings(deadline=None, max_examples=60)
def test_what_is_trained_is_what_is_packed(start: dict[str, Any], scales: str, freeze: bool) -> None:
    layout = random_start(**start)
    options = options_of(scales=scales, freeze_salient=freeze)
    latent = shake(latent_of(layout, random_weight(*layout.shape), None, options))
    packed = latent.pack()
    assert torch.equal(latent.weight(), packed.dequantize())
    packed.check("m")
    x = torch.randn(3, layout.shape[1])
    assert torch.allclose(latent(x), QuantizedLinear(packed)(x), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("magnitudes", ["constant", "weights", "margins"])
@pytest.mark.parametrize("options", [{}, {"group_size": 32}, {"group_size": 0, "mean": False}], ids=str)
def test_optimal_scales_start_as_those_of_the_method_and_are_means_over_the_ordinary(
    options: dict[str, Any], magnitudes: str
) -> None:
    weight = random_weight(20, 150)
    layout = pb_llm.quantize(weight, random_factor(150), PBLLMOptions(**options))
    latent = latent_of(layout, weight, None, options_of(scales="optimal", latent=magnitudes))
    step = 2 * torch.finfo(torch.float16).eps
    assert torch.allclose(latent.pack().dequantize(), layout.dequantize(), rtol=step, atol=step)
    assert torch.equal(latent.pack().get_buffer("signs"), layout.signs)
    shake(latent)
    ordinary = ~salient_of(layout)
    size = layout.spec.group_size or 150
    for group, scales in zip(range(0, 150, size), latent.pack().get_buffer("scales").T, strict=True):
        part = slice(group, group + size)
        for row in range(20):
            wanted = latent.latents()[0][row, part][ordinary[row, part]].detach().abs().mean()
            assert float(scales[row]) == pytest.approx(float(wanted), rel=step)


@pytest.mark.parametrize("scales", ["learned", "fixed", "optimal"])
def test_frozen_salient_weights_never_move(scales: str) -> None:
    layout = some_start()
    salient = salient_of(layout)
    latent = latent_of(layout, random_weight(20, 70), None, options_of(scales=scales, latent_scale=0.5))
    optimizer = torch.optim.AdamW(latent.latents() + latent.scales(), lr=0.05, weight_decay=0.01)
    x, towards = torch.randn(40, 70), torch.randn(40, 20)
    for _ in range(20):
        optimizer.zero_grad()
        (latent(x) * towards).sum().backward()
        (parameter,) = latent.latents()
        assert parameter.grad is not None
        assert not parameter.grad[salient].any()
        optimizer.step()
    packed = latent.pack()
    assert isinstance(packed, Partial)
    assert torch.equal(packed.dequantize()[salient], layout.dequantize()[salient])
    assert all(
        torch.equal(packed.get_buffer(name), layout.get_buffer(name))
        for name in ("positions", "ends", "codes", "code_scales", "code_offsets")
    )
    flipped = unpack_bits(packed.signs, 70) != unpack_bits(layout.signs, 70)
    assert flipped[~salient].any() and not flipped[salient].any()


def test_salient_weights_that_are_not_frozen_are_trained_within_their_codes() -> None:
    layout = some_start()
    salient = salient_of(layout)
    latent = shake(latent_of(layout, random_weight(20, 70), None, options_of(freeze_salient=False)))
    assert len(latent.latents()) == 2
    packed = latent.pack()
    assert isinstance(packed, Partial)
    assert not torch.equal(packed.dequantize()[salient], layout.dequantize()[salient])
    assert torch.equal(salient_of(packed), salient)
    # The nearest of the values that there are.
    levels = (torch.arange(16) - 7.5) * layout.code_scales.float()
    values = levels + layout.get_buffer("code_offsets").float()
    rows = salient.nonzero()[:, 0]
    wanted = latent.latents()[1].detach()
    nearest = (values[rows] - wanted.unsqueeze(1)).abs().min(1).values
    assert torch.allclose((packed.dequantize()[salient] - wanted).abs(), nearest, atol=1e-3)


@pytest.mark.parametrize("mean", [False, True])
@pytest.mark.parametrize("size", [0, 32, 7])
def test_gradients_are_those_of_the_formula(mean: bool, size: int) -> None:
    layout = some_start(mean=mean, group_size=size)
    options = options_of(freeze_salient=False, latent_scale=0.7)
    latent = shake(latent_of(layout, random_weight(20, 70), None, options))
    salient = salient_of(layout).flatten()
    *some, places = latent.operands()
    operands = [None if x is None else x.detach().clone().requires_grad_() for x in some]
    leaves = [None if x is None else x.detach().double().requires_grad_() for x in some]
    w, scales, means, values = leaves
    assert w is not None and scales is not None and values is not None
    group = torch.arange(70) // (size or 70)
    smooth = 0.001 * w + w.tanh()
    weight = scales[:, group] * (smooth + (torch.where(w < 0, -1.0, 1.0) - smooth).detach())
    if means is not None:
        weight = weight + means[:, group]
    towards = torch.randn(20, 70, dtype=torch.float64)
    (weight.flatten().masked_scatter(salient, values).view(20, 70) * towards).sum().backward()
    (product.whole(latent.matrix, (*operands, places)) * towards.float()).sum().backward()
    for got, leaf in zip(operands, leaves, strict=True):
        assert (got is None) == (leaf is None)
        if got is not None and leaf is not None:
            assert got.grad is not None and leaf.grad is not None
            assert torch.allclose(got.grad.double(), leaf.grad, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("tile", [1, 200, 1 << 17])
def test_tiles_change_nothing(tile: int, monkeypatch: pytest.MonkeyPatch) -> None:
    layout = some_start()

    def gradients() -> list[Tensor]:
        latent = latent_of(layout, random_weight(20, 70), None, options_of(freeze_salient=False))
        (latent.weight() * torch.linspace(-1, 1, 1400).view(20, 70)).sum().backward()
        return [latent.weight().detach(), *[p.grad for p in latent.latents()]]  # type: ignore[list-item]

    wanted = gradients()
    monkeypatch.setattr(product, "_TILE_WEIGHTS", tile)
    assert all(torch.equal(got, one) for got, one in zip(gradients(), wanted, strict=True))
