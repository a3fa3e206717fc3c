"""Layouts as gemv.cu reads them: the tensors are those of the checkpoint, in place."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from signbit.kernels.cuda.gemv import Packed, group_fits
from signbit.kernels.prepared import prepared_chains
from signbit.layouts import Integers, Layout, SignPlanes, SplitPlanes
from signbit.layouts.bits import unpack_bits, words
from signbit.layouts.fields import unpack_fields
from signbit.layouts.integers import middle

_MOST_PLANES = 2


def chains(layout: Layout) -> list[list[Packed]] | None:
    """Products, as Layout.chains has them; None if one has no kernel."""
    return prepared_chains(layout, "cuda", _packed)


def _packed(layout: Layout) -> Packed | None:
    make = _MAKERS.get(type(layout))
    return None if make is None else make(layout)


def _sign_planes(layout: SignPlanes) -> Packed | None:
    spec = layout.spec
    if spec.planes > _MOST_PLANES or not group_fits(spec.group_size, 1):
        return None
    signs, scales = words(layout.signs), layout.scales
    means = layout.get_buffer("means") if spec.mean else scales
    columns = layout.get_buffer("column_scales") if spec.column_scales else scales
    return Packed(
        name="sign_planes",
        shape=spec.shape,
        bits=1,
        sets=1,
        terms=spec.planes,
        group_size=spec.group_size,
        width=signs.shape[-1],
        groups=scales.shape[-1],
        scales=scales.dtype,
        tensors=(signs, scales, means, columns),
        macros={"PLANES": spec.planes, "MEAN": int(spec.mean), "COLUMN_SCALES": int(spec.column_scales)},
        wide=spec.column_scales,
    )


def _integers(layout: Integers) -> Packed | None:
    spec = layout.spec
    if spec.bits not in (2, 4, 8) or not group_fits(spec.group_size, spec.bits):
        return None
    codes, groups = words(layout.codes), layout.scales.shape[1]
    # A byte each: zero points are few, and their packed form is not worth a kernel's time.
    zeros = unpack_fields(layout.get_buffer("zeros"), groups, spec.bits).contiguous() if spec.zeros else layout.codes
    return Packed(
        name="integers",
        shape=spec.shape,
        bits=spec.bits,
        sets=1,
        terms=1,
        group_size=spec.group_size,
        width=codes.shape[1],
        groups=groups,
        scales=layout.scales.dtype,
        tensors=(codes, layout.scales, zeros),
        macros={
            "BITS": spec.bits,
            "ZEROS": int(spec.zeros),
            "MIDDLE": f"{float(middle(spec.bits))}f",
            "COLUMN_SCALES": 0,
        },
    )


def _split_planes(layout: SplitPlanes) -> Packed | None:
    spec = layout.spec
    if spec.bitmap or spec.column_scales or not group_fits(spec.group_size, 1):
        return None
    named = dict(layout.named_buffers())
    signs, scales = words(layout.signs), layout.scales
    return Packed(
        name="split_planes",
        shape=spec.shape,
        bits=1,
        sets=2,
        terms=3,
        group_size=spec.group_size,
        width=signs.shape[1],
        groups=scales.shape[1],
        scales=scales.dtype,
        tensors=(
            signs,
            words(layout.second),
            words(layout.salient),
            scales,
            named.get("means", scales),
            layout.salient_scales,
            named.get("salient_means", scales),
            _slots(layout.salient, spec.shape[1], spec.group_size),
            spec.salient_groups,
        ),
        macros={"MEAN": int(spec.mean), "COLUMN_SCALES": 0},
    )


def _slots(salient: Tensor, m: int, group_size: int) -> Tensor:
    """Of each group, its place among those that have salient columns, or -1: int32 [groups]."""
    size = group_size or m
    marks = unpack_bits(salient, m)
    some = torch.nn.functional.pad(marks, (0, -m % size)).view(-1, size).any(1)
    return torch.where(some, some.cumsum(0) - 1, -1).int()


_MAKERS: dict[type[Layout], Callable[[Any], Packed | None]] = {
    Integers: _integers,
    SignPlanes: _sign_planes,
    SplitPlanes: _split_planes,
}
