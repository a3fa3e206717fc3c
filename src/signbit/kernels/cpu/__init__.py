"""The C++ kernels for CPUs: what they know of layouts, and calling them.

``_native`` is built from the C++ files beside this one when signbit is installed (cmake/CMakeLists.txt). It takes
addresses; whose memory they are is looked after here. A kernel is prepared once for each layout: its ``Matrix`` is made
of the addresses of the layout's tensors, and is made again when one of them has moved.

Adding a layout is a function here that turns it into a ``Matrix``, and its name in :data:`_PREPARE`.
"""

from __future__ import annotations

import importlib
import os
import warnings
from collections.abc import Callable
from functools import cache, partial
from typing import Any

import torch
from torch import Tensor

from signbit.errors import SignbitError
from signbit.kernels.prepared import prepared_chains
from signbit.kernels.turns import Turns
from signbit.layouts.base import Layout
from signbit.layouts.haar_planes import HaarPlanes
from signbit.layouts.integers import Integers
from signbit.layouts.partial import Partial
from signbit.layouts.sign_planes import SignPlanes
from signbit.layouts.split_planes import SplitPlanes
from signbit.layouts.structured import Structured

try:
    native: Any = importlib.import_module("signbit.kernels.cpu._native")
except ImportError:
    native = None

_FLOATS = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 2}


def instruction_sets() -> list[str]:
    """Those that this machine has kernels for, the best first; none if the extension is missing."""
    return native.instruction_sets() if _available() else []


def instruction_set() -> str | None:
    """The one in use: the best, or what SIGNBIT_ISA names."""
    return native.instruction_set() if _available() else None


def use(name: str) -> None:
    """Compute with this instruction set from now on."""
    known = instruction_sets()
    if name not in known:
        raise SignbitError(f"no kernels for {name!r} here: SIGNBIT_ISA can be {' or '.join(known) or 'left out only'}")
    native.choose(name)


def thread_pool() -> str | None:
    """Whose threads do the work: torch's, or our own."""
    return native.thread_pool() if _available() else None


def stream(tensor: Tensor) -> int:
    """Read all of a tensor, as fast as memory gives it; returns nothing of use."""
    found: int = native.stream(tensor.data_ptr(), tensor.nbytes, torch.get_num_threads())
    return found


@cache
def _available() -> bool:
    """Whether there are C++ kernels; the first to ask is told if not."""
    if native is None:
        warnings.warn(
            "signbit was installed without its C++ kernels, since there was no C++ compiler: packed weights are "
            "multiplied in torch, many times slower. Install g++ or clang (and Python's headers, python3-dev), then "
            "reinstall signbit",
            stacklevel=2,
        )
        return False
    forced = os.environ.get("SIGNBIT_ISA")
    if forced:
        if forced not in native.instruction_sets():
            known = ", ".join(native.instruction_sets())
            raise SignbitError(f"SIGNBIT_ISA={forced}: this machine has kernels for {known}; set one of them or none")
        native.choose(forced)
    return True


def has_kernel(layout: Layout) -> bool:
    """Whether products with this layout run in C++."""
    return chains_of(layout) is not None


def matmul(x: Tensor, layout: Layout, int8: bool) -> Tensor | None:
    """``x @ W.T`` for x ``[..., in]``, in x's dtype; None if there is no kernel for it."""
    if x.dtype not in _FLOATS or not x.is_cpu or (chains := chains_of(layout)) is None:
        return None
    if x.shape[-1] != layout.spec.shape[1]:
        raise ValueError(f"inputs have {x.shape[-1]} features, the matrix has {layout.spec.shape[1]}")
    x = x.resolve_neg().contiguous()
    if len(chains) == len(chains[0]) == 1:
        return _multiply(x, *chains[0][0], int8)
    total = None
    for chain in chains:
        y = x.float()
        for matrix, n in chain:
            y = _multiply(y, matrix, n, int8)
        total = y if total is None else total + y
    assert total is not None
    return total.to(x.dtype)


def dense_product(x: Tensor, weight: Tensor) -> Tensor:
    """``x @ W.T`` for one token or two and plain floats; all float32 and contiguous, of W [out, in]."""
    return _multiply(x.contiguous(), dense(weight), weight.shape[0], False)


def dense(weight: Tensor) -> Any:
    """The ``Matrix`` of plain floats, float32 [out, in], contiguous."""
    return native.dense(*weight.shape, weight.data_ptr())


def round_in_turn(turns: Turns) -> bool:
    """Columns in turn, as methods/rounding.py has it; whether it was done, which it is not without kernels."""
    if not turns.targets.is_cpu or not _available():
        return False
    k, n = turns.targets.shape
    read = turns.targets, turns.shares, turns.before, turns.tables, turns.counts
    native.round_in_turn(
        n,
        k,
        *(0 if tensor is None else tensor.data_ptr() for tensor in read),
        turns.tables.shape[1],
        turns.even,
        turns.which.data_ptr(),
        *turns.which_strides,
        turns.places.data_ptr(),
        turns.changes.data_ptr(),
        torch.get_num_threads(),
    )
    return True


def bound_products(layout: Layout, int8: bool) -> list[Callable[[], None]]:
    """Functions that multiply each matrix of a layout with a random token, no more than that; none without kernels."""
    bound: list[Callable[[], None]] = []
    for chain in chains_of(layout) or []:
        m = layout.shape[1]
        for matrix, n in chain:
            bound.append(partial(_multiply_into, torch.randn(m), torch.empty(n), matrix, int8))
            m = n
    return bound


def _multiply(x: Tensor, matrix: Any, n: int, int8: bool) -> Tensor:
    *batch, m = x.shape
    y = x.new_empty(*batch, n)
    _multiply_into(x, y, matrix, int8, x.numel() // m)
    return y


def _multiply_into(x: Tensor, y: Tensor, matrix: Any, int8: bool, tokens: int = 1) -> None:
    matrix.multiply(x.data_ptr(), y.data_ptr(), _FLOATS[x.dtype], tokens, int8, torch.get_num_threads())


def chains_of(layout: Layout) -> list[list[tuple[Any, int]]] | None:
    """Each ``Matrix`` and how many rows it has, as Layout.chains has them; None if one has no kernel.

    They live as long as ``layout.prepared``.
    """
    return prepared_chains(layout, "cpu", _prepare)


def _prepare(layout: Layout) -> tuple[Any, int] | None:
    prepare = _PREPARE.get(type(layout))
    if prepare is None or layout.device.type != "cpu" or not _available():
        return None
    matrix = prepare(layout)
    return None if matrix is None else (matrix, layout.shape[0])


def _plane(tensor: Tensor | None) -> Any:
    """A plane of bits, uint8 [n, bytes]; None stands for one that a layout does not have."""
    if tensor is None:
        return native.Plane()
    return native.Plane(tensor.data_ptr(), tensor.shape[-1])


def coefficients(tensor: Tensor | None) -> Any:
    """Floats [n, per row]; None stands for those that a layout does not have."""
    if tensor is None:
        return native.Coefficients()
    return native.Coefficients(tensor.data_ptr(), tensor.shape[-1], _FLOATS[tensor.dtype])


def _sign_planes(layout: SignPlanes) -> Any:
    spec = layout.spec
    if not 1 <= spec.planes <= native.MAX_PLANES:
        return None
    return native.sign_planes(
        *spec.shape,
        spec.group_size,
        [_plane(plane) for plane in layout.signs],
        [coefficients(scales) for scales in layout.scales],
        coefficients(layout.get_buffer("means") if spec.mean else None),
        coefficients(layout.get_buffer("column_scales") if spec.column_scales else None),
    )


def _buffer(layout: Layout, name: str) -> Tensor | None:
    """Each row of W as one row; None if the layout does not have it."""
    tensor = dict(layout.named_buffers()).get(name)
    return None if tensor is None else tensor.flatten(1) if tensor.dim() > 1 else tensor


def _integers(layout: Integers) -> Any:
    spec = layout.spec
    return native.integers(
        *spec.shape,
        spec.group_size,
        spec.bits,
        _plane(layout.codes),
        coefficients(layout.scales),
        _plane(_buffer(layout, "zeros")),
    )


def _partial(layout: Partial) -> Any:
    spec = layout.spec
    return native.partial(
        *spec.shape,
        spec.group_size,
        spec.gap_bits,
        spec.code_bits,
        *(_plane(_buffer(layout, name)) for name in ("signs", "positions", "codes")),
        layout.ends.data_ptr(),
        *(coefficients(_buffer(layout, name)) for name in ("scales", "means", "code_scales", "code_offsets")),
    )


def _structured(layout: Structured) -> Any:
    spec = layout.spec
    return native.structured(
        *spec.shape,
        spec.group_size,
        spec.keep,
        spec.of,
        spec.regions,
        *(_plane(_buffer(layout, name)) for name in ("signs", "ranks", "regions", "salient")),
        *(coefficients(_buffer(layout, name)) for name in ("scales", "means", "salient_scales", "salient_means")),
    )


def _split_planes(layout: SplitPlanes) -> Any:
    spec = layout.spec
    names = "scales", "means", "salient_scales", "salient_means", "column_scales", "salient_column_scales"
    return native.split_planes(
        *spec.shape,
        spec.group_size,
        *(_plane(_buffer(layout, name)) for name in ("signs", "second", "residual", "salient")),
        *(coefficients(_buffer(layout, name)) for name in names),
    )


def _haar_planes(layout: HaarPlanes) -> Any:
    spec = layout.spec
    planes = "signs", "second", "salient", "salient_signs", "salient_second"
    return native.haar_planes(
        *spec.shape,
        spec.group_size,
        spec.axis == "row",
        spec.means,
        *(_plane(_buffer(layout, name)) for name in planes),
        *(coefficients(_buffer(layout, name)) for name in ("scales", "means", "salient_scales", "salient_means")),
    )


_PREPARE: dict[type[Layout], Callable[[Any], Any]] = {
    HaarPlanes: _haar_planes,
    Integers: _integers,
    Partial: _partial,
    SignPlanes: _sign_planes,
    SplitPlanes: _split_planes,
    Structured: _structured,
}
