"""Layouts: how a compressed matrix is stored. One file a layout; :data:`LAYOUTS` finds them by name."""

from __future__ import annotations

from typing import Any

from signbit.errors import SignbitError
from signbit.layouts.base import Layout, LayoutSpec, TensorSpec, count_items
from signbit.layouts.haar_planes import HaarPlanes
from signbit.layouts.integers import Integers
from signbit.layouts.partial import Partial
from signbit.layouts.sign_factors import SignFactors
from signbit.layouts.sign_planes import SignPlanes
from signbit.layouts.split_planes import SplitPlanes
from signbit.layouts.structured import Structured

LAYOUTS: dict[str, type[Layout]] = {
    layout.kind: layout for layout in (SignPlanes, SplitPlanes, HaarPlanes, Partial, Structured, SignFactors, Integers)
}

__all__ = [
    "LAYOUTS",
    "HaarPlanes",
    "Integers",
    "Layout",
    "LayoutSpec",
    "Partial",
    "SignFactors",
    "SignPlanes",
    "SplitPlanes",
    "Structured",
    "TensorSpec",
    "count_items",
    "describe",
    "parse_spec",
]


def describe(layout: Layout) -> dict[str, Any]:
    """The JSON that config.json keeps for a layout."""
    return {"layout": layout.kind, **layout.spec.to_dict()}


def parse_spec(name: str, description: dict[str, Any]) -> tuple[type[Layout], LayoutSpec]:
    """The inverse of :func:`describe`; ``name`` is the module, for the error."""
    fields = dict(description)
    kind = fields.pop("layout", None)
    if not isinstance(kind, str) or kind not in LAYOUTS:
        raise SignbitError(
            f"{name}: unknown layout {kind!r} (known: {', '.join(LAYOUTS)}): upgrade signbit to read this checkpoint"
        )
    layout = LAYOUTS[kind]
    try:
        return layout, layout.Spec.from_dict(fields)
    except (TypeError, KeyError, ValueError, ZeroDivisionError) as error:
        raise SignbitError(f"{name}: damaged layout description {fields!r} in config.json: {error}") from error
