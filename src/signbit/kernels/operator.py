"""Products with packed weights as operators of torch.

``signbit::matmul(x, tensors, layout, int8)`` is x W^T, where ``tensors`` are those of a layout in the order of its spec
and ``layout`` is its description in JSON. ``signbit::matmul_transposed`` is g W, which is its gradient; each is the
other's. Packed weights have no gradients.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from functools import cache
from typing import Any

import torch
from torch import Tensor

from signbit.kernels import dispatch, reference
from signbit.layouts import Layout, LayoutSpec, parse_spec

# Defined by hand: torch.library.custom_op would add some 100 microseconds a call.
_LIBRARY = torch.library.Library("signbit", "DEF")
for _name in ("matmul", "matmul_transposed"):
    _LIBRARY.define(f"{_name}(Tensor x, Tensor[] tensors, str layout, bool int8) -> Tensor")
matmul = torch.ops.signbit.matmul.default
matmul_transposed = torch.ops.signbit.matmul_transposed.default


def _matmul(x: Tensor, tensors: Sequence[Tensor], layout: str, int8: bool) -> Tensor:
    return dispatch.matmul(x, _layout(layout, tensors), int8)


def _matmul_transposed(x: Tensor, tensors: Sequence[Tensor], layout: str, int8: bool) -> Tensor:
    return reference.matmul_transposed(x, _layout(layout, tensors))


def _fake_matmul(x: Tensor, tensors: Sequence[Tensor], layout: str, int8: bool) -> Tensor:
    return x.new_empty((*x.shape[:-1], _parse(layout)[1].shape[0]))


def _fake_matmul_transposed(x: Tensor, tensors: Sequence[Tensor], layout: str, int8: bool) -> Tensor:
    return x.new_empty((*x.shape[:-1], _parse(layout)[1].shape[1]))


def _keep(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    _, ctx.tensors, ctx.layout, ctx.int8 = inputs


def _matmul_backward(ctx: Any, g: Tensor) -> tuple[Any, ...]:
    return matmul_transposed(g, ctx.tensors, ctx.layout, ctx.int8), [None] * len(ctx.tensors), None, None


def _transposed_backward(ctx: Any, g: Tensor) -> tuple[Any, ...]:
    return matmul(g, ctx.tensors, ctx.layout, ctx.int8), [None] * len(ctx.tensors), None, None


for _name, _kernel, _fake, _backward in (
    ("matmul", _matmul, _fake_matmul, _matmul_backward),
    ("matmul_transposed", _matmul_transposed, _fake_matmul_transposed, _transposed_backward),
):
    _LIBRARY.impl(_name, _kernel, "CompositeExplicitAutograd")
    torch.library.register_fake(f"signbit::{_name}", _fake, lib=_LIBRARY)
    torch.library.register_autograd(f"signbit::{_name}", _backward, setup_context=_keep, lib=_LIBRARY)


@cache
def _parse(layout: str) -> tuple[type[Layout], LayoutSpec]:
    return parse_spec("signbit::matmul", json.loads(layout))


def _layout(layout: str, tensors: Sequence[Tensor]) -> Layout:
    kind, spec = _parse(layout)
    return kind.around(spec, tensors)
