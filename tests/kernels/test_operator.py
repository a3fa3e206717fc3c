"""Packed products as operators of torch: traced, compiled, differentiated."""

from __future__ import annotations

import gc
import weakref

import pytest
import torch
from torch import Tensor

from signbit import kernels
from signbit.kernels import operator, reference
from signbit.layouts import Integers, Layout, SignPlanes
from signbit.modules import QuantizedLinear


def random(*size: int) -> Tensor:
    return torch.randn(*size, generator=torch.Generator().manual_seed(sum(size)))


def sign_planes(n: int, m: int) -> Layout:
    groups = -(-m // 64)
    return SignPlanes.encode(random(2, n, m) < 0, random(2, n, groups).abs().half(), random(n, groups).half(), 64)


def integers(n: int, m: int) -> Layout:
    codes = torch.arange(n * m).view(n, m) * 7 % 8
    return Integers.encode(codes.byte(), random(n, 1).abs().half(), codes[:, :1].byte(), 3, 0)


MAKERS = [sign_planes, integers]
OPERATORS = ["matmul", "matmul_transposed"]


@pytest.mark.parametrize("make", MAKERS)
@pytest.mark.parametrize("name", OPERATORS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_opcheck(make: type, name: str, dtype: torch.dtype) -> None:
    layout = make(20, 72)
    x = random(3, 72 if name == "matmul" else 20).to(dtype)
    product = getattr(torch.ops.signbit, name).default
    arguments = (list(layout.buffers()), layout.description, False)
    torch.library.opcheck(product, (x, *arguments))
    torch.library.opcheck(product, (x.requires_grad_(), *arguments))


@pytest.mark.parametrize("make", MAKERS)
def test_the_operators_are_the_products(make: type) -> None:
    layout, x, g = make(20, 72), random(2, 3, 72), random(2, 3, 20)
    arguments = (list(layout.buffers()), layout.description, False)
    assert torch.equal(torch.ops.signbit.matmul(x, *arguments), kernels.matmul(x, layout))
    transposed = torch.ops.signbit.matmul_transposed(g, *arguments)
    torch.testing.assert_close(transposed, g @ layout.dequantize())


@pytest.mark.parametrize("make", MAKERS)
def test_gradients(make: type) -> None:
    layout = make(20, 72)
    x, g = random(2, 3, 72).requires_grad_(), random(2, 3, 20)
    kernels.matmul(x, layout).backward(g)
    expected = random(2, 3, 72).requires_grad_()
    (expected @ layout.dequantize().T).backward(g)
    torch.testing.assert_close(x.grad, expected.grad)


def test_second_derivatives() -> None:
    layout = sign_planes(20, 72)
    x, v = random(3, 72).requires_grad_(), random(3, 72)
    y = kernels.matmul(x, layout).square().sum()
    (gradient,) = torch.autograd.grad(y, x, create_graph=True)
    (curvature,) = torch.autograd.grad(gradient, x, v)
    W = layout.dequantize()
    torch.testing.assert_close(curvature, 2 * v @ W.T @ W, rtol=1e-4, atol=1e-3)


@pytest.mark.slow
@pytest.mark.parametrize("make", MAKERS)
def test_compiled_without_breaks(make: type) -> None:
    linear = QuantizedLinear(make(20, 72), random(20))
    compiled = torch.compile(linear, fullgraph=True, backend="aot_eager", dynamic=True)
    for tokens in (1, 5):
        x = random(tokens, 72)
        torch.testing.assert_close(compiled(x), linear(x))
    x = random(2, 72).requires_grad_()
    (found,) = torch.autograd.grad(compiled(x).sum(), x)
    (expected,) = torch.autograd.grad(linear(x).sum(), x)
    torch.testing.assert_close(found, expected)


def test_exported() -> None:
    linear = QuantizedLinear(sign_planes(20, 72), random(20))
    x = random(2, 72)
    program = torch.export.export(linear, (x,))
    assert "signbit.matmul" in str(program.graph)
    torch.testing.assert_close(program.module()(x), linear(x))


def test_tensors_that_do_not_fit_the_description_are_refused() -> None:
    layout = sign_planes(20, 72)
    signs, *others = layout.buffers()
    for wrong in ([signs[:, 1:], *others], [signs.float(), *others], others):
        with pytest.raises(ValueError):
            torch.ops.signbit.matmul(random(1, 72), wrong, layout.description, False)


def test_the_transposed_reference_adds_up_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    layout, g = sign_planes(100, 72), random(3, 100)
    monkeypatch.setattr(reference, "TILE_WEIGHTS", 1000)
    torch.testing.assert_close(reference.matmul_transposed(g, layout), g @ layout.dequantize())


@pytest.mark.filterwarnings("ignore")  # torch.jit is deprecated
def test_traced_by_torch_jit() -> None:
    linear, x = QuantizedLinear(sign_planes(20, 72)), random(3, 72)
    traced = torch.jit.trace(linear, x)
    torch.testing.assert_close(traced(2 * x), linear(2 * x))


def test_what_is_known_of_tensors_follows_them() -> None:
    """Changes in place, tensors swapped for others, and another reading of the same ones."""
    layout, other, x = sign_planes(20, 72), sign_planes(20, 72), random(3, 72)
    tensors = list(layout.buffers())
    assert torch.equal(operator.matmul(x, tensors, layout.description, False), kernels.matmul(x, layout))
    tensors[0].bitwise_not_()
    changed = operator.matmul(x, tensors, layout.description, False)
    torch.testing.assert_close(changed, x @ layout.dequantize().T, rtol=1e-4, atol=1e-4)
    scales = tensors[1]
    scales.data = 2 * scales
    doubled = operator.matmul(x, tensors, layout.description, False)
    torch.testing.assert_close(doubled, x @ layout.dequantize().T, rtol=1e-4, atol=1e-4)
    first, *others = other.buffers()
    first.copy_(tensors[0])
    mixed = operator.matmul(x, [tensors[0], *others], layout.description, False)
    torch.testing.assert_close(mixed, x @ other.dequantize().T, rtol=1e-4, atol=1e-4)


def test_nothing_is_kept_of_tensors_that_nobody_has() -> None:
    layout = sign_planes(20, 72)
    tensors, description = [one.clone() for one in layout.buffers()], layout.description
    operator.matmul(random(3, 72), tensors, description, False)
    operator.matmul(random(3, 72), tensors, description, False)
    known = operator._KNOWN[tensors[0]].layout
    alive = [weakref.ref(view) for view in known.buffers()]
    del known, tensors
    gc.collect()
    assert all(one() is None for one in alive)
