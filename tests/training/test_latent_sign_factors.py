"""Sign factors in training: the start, products, gradients."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file
from torch import Tensor

import signbit
from matrices import random_inputs, random_weight
from signbit import Recipe
from signbit.errors import SignbitError
from signbit.layouts import Layout, SignFactors
from signbit.layouts.base import SCALE_DTYPES
from signbit.methods.sign_factors import SignFactorsOptions, quantize
from signbit.modules import QuantizedLinear
from signbit.training.latent import LatentLinear, latent_of
from signbit.training.options import TrainingOptions
from signbit.training.sign_factors import LatentSignFactors

MakeDir = Callable[..., Path]


def random_start(
    paths: int,
    n: int,
    r: int,
    m: int,
    scales: tuple[bool, bool, bool],
    dtype: str = "float16",
    seed: int = 0,
    correction: bool = False,
) -> Layout:
    generator = torch.Generator().manual_seed(seed)

    def coefficients(there: bool, length: int) -> Tensor | None:
        return (0.2 * torch.randn(paths, length, generator=generator)).to(SCALE_DTYPES[dtype]) if there else None

    layout: Layout = SignFactors.encode(
        torch.rand(paths, n, r, generator=generator) < 0.5,
        torch.rand(paths, r, m, generator=generator) < 0.5,
        coefficients(scales[0], n),
        coefficients(scales[1], r),
        coefficients(scales[2], m),
        dtype,
    )
    return layout.with_bias(torch.randn(n, generator=generator)) if correction else layout


def shake(latent: LatentLinear, seed: int = 0) -> LatentLinear:
    """As after some training: everything that is trained has moved."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in latent.latents() + latent.scales():
            noise = torch.randn(parameter.shape, generator=generator)
            parameter.add_(parameter.std(correction=0) * noise)
    return latent


starts = st.fixed_dictionaries(
    {
        "paths": st.integers(1, 3),
        "n": st.integers(1, 9),
        "r": st.integers(1, 40),
        "m": st.integers(1, 70),
        "scales": st.tuples(st.booleans(), st.booleans(), st.booleans()),
        "dtype": st.sampled_from(list(SCALE_DTYPES)),
        "seed": st.integers(0, 2**31),
    }
)


def some_start(**changes: Any) -> Layout:
    return random_start(**{"paths": 2, "n": 6, "r": 33, "m": 40, "scales": (True, True, True), **changes})


@given(starts, st.sampled_from(["learned", "fixed"]), st.sampled_from(["constant", "weights", "margins"]))
@settings(deadline=None, max_examples=60)
def test_packed_untrained_it_is_the_start(start: dict[str, Any], scales: Any, magnitudes: Any) -> None:
    layout = random_start(**start)
    weight = random_weight(*layout.shape)
    weight[:, ::3] = 0
    packed = latent_of(layout, weight, None, TrainingOptions(scales=scales, latent=magnitudes)).pack()
    assert (type(packed), packed.spec) == (SignFactors, layout.spec)
    for name, tensor in layout.state_dict().items():
        assert torch.equal(packed.state_dict()[name], tensor), name


@given(starts, st.sampled_from(["learned", "fixed"]))
@settings(deadline=None, max_examples=60)
def test_what_is_trained_is_what_is_packed(start: dict[str, Any], scales: Any) -> None:
    layout = random_start(**start)
    latent = shake(latent_of(layout, random_weight(*layout.shape), None, TrainingOptions(scales=scales)))
    packed = latent.pack()
    assert torch.equal(latent.weight(), packed.dequantize())
    x = torch.randn(3, layout.shape[1])
    torch.testing.assert_close(latent(x), QuantizedLinear(packed)(x), rtol=1e-4, atol=1e-3)
    torch.testing.assert_close(latent(x), x @ packed.dequantize().T, rtol=1e-4, atol=1e-3)


@given(starts, st.sampled_from(["identity", "tanh", "clip"]))
@settings(deadline=None, max_examples=60)
def test_gradients_are_those_of_the_formula(start: dict[str, Any], estimator: Any) -> None:
    """Products and weight() against the docstring's W in float64 under plain autograd."""
    layout = random_start(**start)
    options = TrainingOptions(straight_through=estimator, latent_scale=1.0)
    latent = shake(latent_of(layout, random_weight(*layout.shape), None, options))
    assert isinstance(latent, LatentSignFactors)
    x, towards = torch.randn(2, 3, start["m"]), torch.randn(2, 3, start["n"])

    leaves: dict[str, Tensor] = {}
    for name, parameter in latent.named_parameters():
        leaves[name] = parameter.detach().double().requires_grad_()
    inputs = x.double().requires_grad_()

    def signs(name: str, *shape: int) -> Tensor:
        w = leaves[name].view(start["paths"], *shape)
        smooth = {"identity": w, "tanh": 0.001 * w + w.tanh(), "clip": w.clamp(-1, 1)}[estimator]
        return smooth + (torch.where(w < 0, -1.0, 1.0) - smooth).detach()

    def scale(name: str, length: int) -> Tensor:
        one = getattr(latent, name)
        if one is None:
            return torch.ones(start["paths"], length).double()
        value = leaves[f"{name}.value"] * one.unit
        return value + (one().detach().double() - value).detach()

    U, V = signs("out_latent", start["n"], start["r"]), signs("in_latent", start["r"], start["m"])
    h, inner, g = scale("out_scale", start["n"]), scale("rank_scale", start["r"]), scale("in_scale", start["m"])
    weight = (h.unsqueeze(2) * (U @ (inner.unsqueeze(2) * V)) * g.unsqueeze(1)).sum(0)
    (inputs @ weight.T * towards).sum().backward()

    def check(y: Tensor) -> None:
        latent.zero_grad()
        (y * towards).sum().backward()
        for name, parameter in latent.named_parameters():
            wanted = leaves[name].grad
            assert parameter.grad is not None and wanted is not None, name
            torch.testing.assert_close(parameter.grad.double(), wanted, rtol=1e-3, atol=1e-3)

    trained = x.clone().requires_grad_()
    check(latent(trained))
    assert trained.grad is not None and inputs.grad is not None
    torch.testing.assert_close(trained.grad.double(), inputs.grad, rtol=1e-3, atol=1e-3)
    check(x @ latent.weight().T)


def test_a_product_keeps_little_and_never_makes_the_matrix() -> None:
    latent = latent_of(random_start(1, 60, 4, 80, (True, True, True)), random_weight(60, 80), None, TrainingOptions())
    kept: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):  # type: ignore[func-returns-value]
        latent(torch.randn(2, 80, requires_grad=True))
    assert max(tensor.numel() for tensor in kept) == 4 * 80


def test_only_what_is_trained_gets_gradients() -> None:
    for scales, trained in (("fixed", 0), ("learned", 4)):
        options = TrainingOptions(scales=scales)
        latent = latent_of(some_start(correction=True), random_weight(6, 40), torch.randn(6), options)
        assert (len(latent.latents()), len(latent.scales())) == (2, trained)
        latent(torch.randn(3, 40)).square().sum().backward()
        assert all((p.grad is not None) == p.requires_grad for p in latent.parameters())
    # Scales by themselves, as when a whole model is tuned.
    for one in latent.latents():
        one.requires_grad_(False).grad = None
    latent(torch.randn(3, 40)).sum().backward()
    assert all(p.grad is None for p in (latent.out_latent, latent.in_latent))


def test_optimal_scales_are_refused() -> None:
    with pytest.raises(SignbitError, match=r"optimal.*sign_factors.*learned or fixed"):
        latent_of(some_start(), torch.randn(6, 40), None, TrainingOptions(scales="optimal"))


def test_margins_are_what_turning_a_sign_costs() -> None:
    weight = random_weight(12, 40)
    layout = quantize(weight, None, SignFactorsOptions(metric="none", rank=20, iterations=20))
    options = TrainingOptions(latent="margins")
    latent = latent_of(layout, weight, None, options)
    assert isinstance(latent, LatentSignFactors)
    error = (weight - layout.dequantize()).square().sum()
    h, inner, g = (layout.get_buffer(name)[0].float() for name in ("out_scales", "rank_scales", "in_scales"))
    for parameter, size in ((latent.out_latent, h[3] ** 2 * inner**2 * g.square().sum()), (latent.in_latent, None)):
        row, costs = 3, []
        for k in range(parameter.shape[1]):
            with torch.no_grad():
                parameter[row, k] *= -1
                costs.append((weight - latent.pack().dequantize()).square().sum() - error)
                parameter[row, k] *= -1
        weights = size if size is not None else g**2 * (inner[row] ** 2 * h.square().sum())
        margins = (torch.stack(costs) / weights / 4).abs()
        assert torch.allclose(parameter[row].abs() / 0.01, margins / margins.mean(), rtol=0.02, atol=2e-3)


def test_what_is_trained_stays_float32_and_products_follow_the_inputs() -> None:
    latent = latent_of(some_start(), random_weight(6, 40), torch.randn(6), TrainingOptions())
    before = {name: tensor.clone() for name, tensor in latent.state_dict().items()}
    latent.bfloat16()
    for name, tensor in latent.state_dict().items():
        assert tensor.dtype == before[name].dtype and torch.equal(tensor, before[name])
    x = torch.randn(3, 40, dtype=torch.bfloat16)
    y = latent(x)
    assert y.dtype == torch.bfloat16
    assert torch.allclose(y.float(), latent(x.float()), rtol=0.05, atol=0.1)
    with torch.autocast("cpu", torch.bfloat16):
        z = latent(x.float())
    assert torch.equal(z, y)
    z.float().sum().backward()
    assert all(p.grad is not None and p.grad.dtype == torch.float32 for p in latent.latents() + latent.scales())


@pytest.mark.parametrize("magnitudes", ["constant", "margins"])
def test_training_lowers_the_loss(magnitudes: Any) -> None:
    """From the closed form, which has most to learn."""
    weight, x = random_weight(40, 60), random_inputs(400, 60) @ torch.linspace(0.1, 2, 60).diag()
    layout = quantize(weight, None, SignFactorsOptions(metric="none", solver="svid", refits=0, bits=2.5))
    latent = latent_of(layout, weight, None, TrainingOptions(latent=magnitudes))
    rates = [{"params": latent.latents(), "lr": 3e-4}, {"params": latent.scales(), "lr": 1e-2}]
    optimizer = torch.optim.AdamW(rates, weight_decay=0)
    losses = []
    for _ in range(150):
        loss = (latent(x) - x @ weight.T).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert min(losses[-10:]) < 0.7 * losses[0]
    start = latent_of(layout, weight, None, TrainingOptions())
    assert not torch.equal(latent.pack().get_buffer("in_signs"), start.pack().get_buffer("in_signs"))


def test_a_model_is_trained_stopped_and_resumed(
    tiny_dir: MakeDir, text_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its loss falls, and it comes out the same whether or not it was interrupted."""
    model = tiny_dir("llama")
    keys = {
        "method": "sign-factors",
        "bits": 3.0,
        "paths": 2,
        "metric": "none",
        "iterations": 5,
        "samples": 0,
        "calib": str(text_file),
        "seqlen": 32,
        "steps": 20,
        "batch": 4,
        "micro_batch": 2,
        "heldout": 2,
        "lr": 3e-5,
        "scale_lr": 1e-2,
        "snapshot_every": 5,
        "evaluate_every": 20,
    }
    trained = signbit.train(model, tmp_path / "whole", Recipe(keys), device="cpu")
    losses = [step["loss"] for step in trained.record.losses]
    assert sum(losses[-5:]) < 0.95 * sum(losses[:5])
    layers = signbit.inspect(tmp_path / "whole")["layers"]
    assert layers and all(layer["layout"] == "sign_factors" for layer in layers)

    calls = 0
    product = LatentSignFactors.product

    def interrupted(self: LatentSignFactors, x: Tensor) -> Tensor:
        nonlocal calls
        calls += 1
        if calls == 14 * 2 * 12:  # linears, micro-batches, steps: beyond the second snapshot
            raise KeyboardInterrupt
        return product(self, x)

    monkeypatch.setattr(LatentSignFactors, "product", interrupted)
    with pytest.raises(KeyboardInterrupt):
        signbit.train(model, tmp_path / "cut", Recipe(keys), device="cpu")
    signbit.train(model, tmp_path / "cut", Recipe(keys), device="cpu", resume=True)
    whole, cut = (load_file(tmp_path / name / "model.safetensors") for name in ("whole", "cut"))
    assert whole.keys() == cut.keys() and all(torch.equal(tensor, cut[name]) for name, tensor in whole.items())
