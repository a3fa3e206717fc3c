"""Sign planes in training: the start, the matrix, its gradients."""

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from matrices import random_inputs, random_weight
from signbit.errors import SignbitError
from signbit.layouts import Layout, SignPlanes
from signbit.layouts.base import SCALE_DTYPES
from signbit.methods import sign
from signbit.methods.sign import SignOptions
from signbit.modules import QuantizedLinear
from signbit.training import product
from signbit.training.latent import LatentLinear, latent_of
from signbit.training.options import TrainingOptions
from signbit.training.straight_through import Estimator


def random_start(
    planes: int,
    n: int,
    m: int,
    group_size: int,
    mean: bool,
    columns: bool,
    norm: bool = False,
    correction: bool = False,
    dtype: str = "float16",
    seed: int = 0,
) -> Layout:
    generator = torch.Generator().manual_seed(seed)
    groups = 1 if group_size == 0 else -(-m // group_size)

    def coefficients(*shape: int) -> Tensor:
        return (0.1 * torch.randn(shape, generator=generator)).to(SCALE_DTYPES[dtype])

    layout: Layout = SignPlanes.encode(
        negative=torch.rand(planes, n, m, generator=generator) < 0.5,
        scales=coefficients(planes, n, groups),
        means=coefficients(n, groups) if mean else None,
        group_size=group_size,
        column_scales=coefficients(m) if columns else None,
    )
    if correction:
        layout = layout.with_bias(torch.randn(n, generator=generator))
    return layout.with_norm() if norm else layout


def shake(latent: LatentLinear, seed: int = 0) -> LatentLinear:
    """As after some training: everything that is trained has moved."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in latent.latents() + latent.scales():
            noise = torch.randn(parameter.shape, generator=generator)
            parameter.add_(parameter.std(correction=0) * noise)
    return latent


def options_of(**options: Any) -> TrainingOptions:
    return TrainingOptions(**options)


starts = st.fixed_dictionaries(
    {
        "planes": st.integers(1, 3),
        "n": st.integers(1, 5),
        "m": st.integers(1, 70),
        "group_size": st.sampled_from([0, 1, 7, 32, 33, 64]),
        "mean": st.booleans(),
        "columns": st.booleans(),
        "norm": st.booleans(),
        "dtype": st.sampled_from(list(SCALE_DTYPES)),
        "seed": st.integers(0, 2**31),
    }
)


# --- the start, and what is packed ------------------------------------------------------------------------------------


@given(starts, st.sampled_from(["learned", "fixed"]), st.sampled_from(["constant", "weights", "margins"]))
@settings(deadline=None, max_examples=60)
def test_packed_untrained_it_is_the_start(start: dict[str, Any], scales: str, magnitudes: str) -> None:
    layout = random_start(**start)
    weight = random_weight(*layout.shape)
    weight[:, ::3] = 0
    packed = latent_of(layout, weight, None, options_of(scales=scales, latent=magnitudes)).pack()
    assert (type(packed), packed.spec) == (SignPlanes, layout.spec)
    for name, tensor in layout.state_dict().items():
        assert torch.equal(packed.state_dict()[name], tensor), name


@given(starts, st.sampled_from(["learned", "fixed"]))
@settings(deadline=None, max_examples=60)
def test_what_is_trained_is_what_is_packed(start: dict[str, Any], scales: str) -> None:
    layout = random_start(**start)
    latent = shake(latent_of(layout, random_weight(*layout.shape), None, options_of(scales=scales)))
    packed = latent.pack()
    assert torch.equal(latent.weight(), packed.dequantize())
    x = torch.randn(3, layout.shape[1])
    assert torch.allclose(latent(x), QuantizedLinear(packed)(x), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("dtype", SCALE_DTYPES)
@pytest.mark.parametrize("size", [0, 32, 7])
@pytest.mark.parametrize("magnitudes", ["constant", "weights", "margins"])
@pytest.mark.parametrize("mean", [False, True])
def test_optimal_scales_start_as_the_packed_ones_and_are_mean_magnitudes(
    dtype: str, size: int, magnitudes: str, mean: bool
) -> None:
    layout = random_start(1, 6, 70, size, mean, False, dtype=dtype)
    latent = latent_of(layout, random_weight(6, 70), None, options_of(scales="optimal", latent=magnitudes))
    packed = latent.pack()
    step = 2 * torch.finfo(SCALE_DTYPES[dtype]).eps
    # Negative scales, which no method makes, have gone to the signs.
    assert torch.allclose(packed.dequantize(), layout.dequantize(), rtol=step, atol=step)
    shake(latent)
    packed = latent.pack()
    assert torch.equal(latent.weight(), packed.dequantize())
    groups = latent.latents()[0].split(size or 70, dim=1)
    wanted = torch.stack([group.abs().mean(1) for group in groups], dim=1)
    assert torch.allclose(packed.get_buffer("scales")[0].float(), wanted, rtol=step)


@pytest.mark.parametrize("scales", ["learned", "fixed", "optimal"])
def test_rows_and_weights_of_zeros_keep_their_signs(scales: str) -> None:
    layout = SignPlanes.encode(torch.rand(1, 4, 40) < 0.5, torch.zeros(1, 4, 1).half(), None, 0)
    for magnitudes in ("constant", "weights", "margins"):
        packed = latent_of(layout, torch.zeros(4, 40), None, options_of(scales=scales, latent=magnitudes)).pack()
        assert all(torch.equal(packed.state_dict()[name], tensor) for name, tensor in layout.state_dict().items())


def test_magnitudes_at_the_start() -> None:
    weight = random_weight(5, 60)
    weight[2] *= 100
    layout = sign.quantize(weight, None, SignOptions(planes=2))
    constant = latent_of(layout, weight, None, options_of(latent_scale=0.03)).latents()[0]
    assert torch.allclose(constant.abs(), torch.tensor(0.03))
    of_weights = (
        latent_of(layout, weight, None, options_of(latent="weights", latent_scale=0.03)).latents()[0].view(2, 5, 60)
    )
    assert torch.allclose(of_weights[0].abs().mean(1), torch.full((5,), 0.03), rtol=0.01)
    assert torch.allclose(of_weights[0] / of_weights[0, :, :1], weight / weight[:, :1], rtol=0.01, atol=0.01)
    assert torch.allclose(of_weights[1].abs(), torch.tensor(0.03))


@pytest.mark.parametrize(("planes", "columns"), [(2, False), (1, True)])
def test_optimal_scales_are_refused_where_there_is_no_formula(planes: int, columns: bool) -> None:
    with pytest.raises(SignbitError, match=r"one sign plane without column scales.*learned or fixed"):
        latent_of(
            random_start(planes, 3, 40, 0, False, columns), torch.randn(3, 40), None, options_of(scales="optimal")
        )


# --- gradients --------------------------------------------------------------------------------------------------------


def naive(latent: Any, estimator: Estimator) -> tuple[Tensor, list[Tensor]]:
    """The docstring's formula in float64 under plain autograd: W, and its leaves: latents, scales, means, columns."""
    leaves = [x.detach().double().requires_grad_() for x in latent.operands() if x is not None]
    size, m = latent.start.spec.group_size, latent.in_features
    group = torch.arange(m) // (size or m)
    w, scales, *rest = leaves
    # What has the estimator's derivative: a smooth stand-in, plus a constant that makes its value the sign.
    smooth = {"identity": w, "tanh": 0.001 * w + w.tanh(), "clip": w.clamp(-1, 1)}[estimator]
    signs = smooth + (torch.where(w < 0, -1.0, 1.0) - smooth).detach()
    weight = (scales[:, :, group] * signs).sum(0)
    if latent.start.spec.mean:
        weight = weight + rest.pop(0)[:, group]
    return weight * rest.pop(0) if latent.start.spec.column_scales else weight, leaves


def gradients(latent: Any, tensors: tuple[Any, ...]) -> list[Tensor]:
    return [tensor.grad for tensor in tensors if tensor is not None and tensor.grad is not None]


@given(starts, st.sampled_from(["identity", "tanh", "clip"]))
@settings(deadline=None, max_examples=60)
def test_gradients_are_those_of_the_formula(start: dict[str, Any], estimator: Estimator) -> None:
    layout = random_start(**start)
    # Latents around 1, where the estimators differ.
    options = options_of(straight_through=estimator, latent_scale=1.0)
    latent = shake(latent_of(layout, random_weight(*layout.shape), None, options))
    operands = tuple(None if x is None else x.detach().clone().requires_grad_() for x in latent.operands())
    wanted, leaves = naive(latent, estimator)
    towards = torch.randn(layout.shape, dtype=torch.float64)
    (wanted * towards).sum().backward()
    found = product.whole(latent.matrix, operands)
    assert torch.allclose(found.double(), wanted, rtol=1e-5, atol=1e-6)
    (found * towards.float()).sum().backward()
    for got, leaf in zip(gradients(latent, operands), leaves, strict=True):
        assert leaf.grad is not None
        assert torch.allclose(got.double(), leaf.grad, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("tile", [1, 100, 1 << 17])
def test_products_are_those_of_plain_autograd_whatever_the_tiles(tile: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(product, "_TILE_WEIGHTS", tile)
    latent = shake(latent_of(random_start(2, 9, 50, 16, True, True), random_weight(9, 50), None, options_of()))
    x, towards = torch.randn(2, 3, 50), torch.randn(2, 3, 9)

    def run(linear: Any) -> list[Tensor]:
        latent.zero_grad()
        inputs = x.clone().requires_grad_()
        y = linear(inputs)
        (y * towards).sum().backward()
        parameters = latent.latents() + latent.scales()
        return [y.detach(), inputs.grad, *[p.grad.clone() for p in parameters]]  # type: ignore[list-item, union-attr]

    plain = run(lambda inputs: nn.functional.linear(inputs, latent.weight()))
    for got, wanted in zip(run(latent), plain, strict=True):
        assert torch.allclose(got, wanted, rtol=1e-4, atol=1e-6)


def test_a_product_keeps_nothing_of_the_matrixs_size() -> None:
    latent = latent_of(random_start(1, 30, 40, 0, False, True), random_weight(30, 40), None, options_of())
    kept: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):  # type: ignore[func-returns-value]
        latent(torch.randn(2, 40, requires_grad=True))
    large = [tensor for tensor in kept if tensor.numel() >= 30 * 40]
    assert [tensor.data_ptr() for tensor in large] == [latent.latents()[0].data_ptr()]


def test_only_what_is_trained_gets_gradients() -> None:
    layout = random_start(1, 6, 40, 0, True, False, correction=True)
    x = torch.randn(3, 40)
    for scales, trained in (("fixed", 0), ("optimal", 2), ("learned", 3)):
        latent = latent_of(layout, random_weight(6, 40), torch.randn(6), options_of(scales=scales))
        assert (len(latent.latents()), len(latent.scales())) == (1, trained)
        assert {id(p) for p in latent.latents() + latent.scales()} == {
            id(p) for p in latent.parameters() if p.requires_grad
        }
        latent(x).square().sum().backward()
        assert all((p.grad is not None) == p.requires_grad for p in latent.parameters())


# --- as a module ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("norm", [False, True])
def test_norm_correction_and_bias_are_as_in_the_packed_linear(norm: bool) -> None:
    layout = random_start(1, 6, 40, 0, False, True, norm=norm, correction=not norm)
    bias = torch.randn(6)
    latent = shake(latent_of(layout, random_weight(6, 40), bias, options_of()))
    x = torch.randn(2, 3, 40)
    packed = latent.pack()
    assert packed.spec == layout.spec
    assert torch.allclose(latent(x), QuantizedLinear(packed, bias)(x), rtol=1e-4, atol=1e-5)
    assert not any(torch.equal(packed.state_dict()[name], tensor) for name, tensor in layout.state_dict().items())


def test_what_is_trained_stays_float32_and_products_follow_the_inputs() -> None:
    latent = latent_of(random_start(1, 6, 40, 0, False, True), random_weight(6, 40), torch.randn(6), options_of())
    before = {name: tensor.clone() for name, tensor in latent.state_dict().items()}
    latent.bfloat16()
    for name, tensor in latent.state_dict().items():
        assert tensor.dtype == before[name].dtype and torch.equal(tensor, before[name])
    x = torch.randn(3, 40, dtype=torch.bfloat16)
    y = latent(x)
    assert y.dtype == torch.bfloat16
    assert torch.allclose(y.float(), latent(x.float()), rtol=0.05, atol=0.05)
    with torch.autocast("cpu", torch.bfloat16):
        z = latent(x.float())
    assert torch.equal(z, y)
    z.float().sum().backward()
    assert all(p.grad is not None and p.grad.dtype == torch.float32 for p in latent.latents() + latent.scales())


def test_one_learning_rate_is_the_same_relative_step_for_all_coefficients() -> None:
    layout = sign.quantize(1e-3 * random_weight(6, 70), None, SignOptions(mean=True, group_size=32))
    latent = latent_of(layout, random_weight(6, 70), None, options_of())
    for parameter in latent.scales():
        assert 0.7 < float(parameter.detach().square().mean().sqrt()) < 1.5


def test_training_lowers_the_loss() -> None:
    weight, x = random_weight(20, 40), random_inputs(400, 40) @ torch.linspace(0.1, 2, 40).diag() + 0.5
    latent = latent_of(sign.quantize(weight, None, SignOptions()), weight, None, options_of(latent="weights"))
    optimizer = torch.optim.AdamW(latent.latents() + latent.scales(), lr=1e-3, weight_decay=0)
    losses = []
    for _ in range(150):
        loss = (latent(x) - x @ weight.T).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert min(losses[-10:]) < 0.85 * losses[0]
