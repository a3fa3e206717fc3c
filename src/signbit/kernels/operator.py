"""Products with packed weights as operators of torch.

``signbit::matmul(x, tensors, layout, int8)`` is x W^T, where ``tensors`` are those of a layout in the order of its spec
and ``layout`` is its description in JSON. ``signbit::matmul_transposed`` is g W, which is its gradient; each is the
other's. Packed weights have no gradients.

A call comes with tensors only, and what kernels know of them would have to be found out each time. So on a CPU the
layout around tensors that were met before is kept, for as long as somebody else keeps the first of them. On a GPU it is
not: what is made of them while a CUDA graph is prepared may lie in that graph's own memory.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any
from weakref import ReferenceType, ref

import torch
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

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


@dataclass
class _Known:
    """The layout of tensors that were met. It holds views of them, so that they are not what keeps them alive."""

    description: str
    tensors: list[ReferenceType[Tensor]]
    layout: Layout

    def is_of(self, description: str, tensors: Sequence[Tensor]) -> bool:
        """Whether these are the same, with the same memory; what has changed in it kernels look at themselves."""
        return self.description == description and all(
            one() is tensor and view.is_set_to(tensor)
            for one, tensor, view in zip(self.tensors, tensors, self.layout.buffers(), strict=True)
        )


# By the first tensor of each.
_KNOWN: Any = WeakTensorKeyDictionary()


def _layout(description: str, tensors: Sequence[Tensor]) -> Layout:
    (kind, spec), first = _parse(description), tensors[0]
    if not first.is_cpu:
        return kind.around(spec, tensors)
    known = _KNOWN.get(first)
    if known is None or not known.is_of(description, tensors):
        layout = kind.around(spec, [tensor.detach() for tensor in tensors])
        known = _KNOWN[first] = _Known(description, [ref(tensor) for tensor in tensors], layout)
    found: Layout = known.layout
    return found
