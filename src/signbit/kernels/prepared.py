"""What kernels know of a layout's tensors: made once, and again when one of them has moved or changed."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch import Tensor

from signbit.layouts.base import Layout

T = TypeVar("T")


def prepared_chains(layout: Layout, kernels: str, prepare: Callable[[Layout], T | None]) -> list[list[T]] | None:
    """``prepare(part)`` of all parts of ``layout.chains()``; None if it is None of one, or one has no weights.

    kernels: whose it is. It lives as long as ``layout.prepared``, which is neither stored nor copied, and goes with
    the parts, which may have tensors of their own.
    """
    tensors = layout._buffers.values()
    state = [(tensor.data_ptr(), _version(tensor)) for tensor in tensors]  # type: ignore[union-attr, arg-type]
    kept = layout.prepared
    if kept is None or kept[0] != state:
        # With the tensors themselves, so that no other gets an address of theirs.
        kept = (state, {}, list(tensors))
        # What is made while a CUDA graph is captured is there when the graph runs, and not before.
        if layout.device.type != "cuda" or not torch.cuda.is_current_stream_capturing():
            layout.prepared = kept
    known: dict[str, Any] = kept[1]
    if kernels not in known:
        parts = layout.chains()
        made = [[None if 0 in part.shape else prepare(part) for part in chain] for chain in parts]
        complete = all(one is not None for chain in made for one in chain)
        known[kernels] = (made if complete else None, parts)
    found: list[list[T]] | None = known[kernels][0]
    return found


def _version(tensor: Tensor) -> int:
    """How often it was changed in place; tensors of inference mode do not count."""
    return 0 if tensor.is_inference() else tensor._version
