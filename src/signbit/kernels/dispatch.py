"""Which way a product goes: a kernel, or unpacking tiles of rows for torch's dense product."""

from __future__ import annotations

import importlib
import warnings
from functools import cache
from typing import Any

from torch import Tensor

from signbit.kernels import cpu, cuda, reference
from signbit.layouts import Integers, Layout, Partial

# Tokens from which on unpacking is faster, between batches that were timed (16, 128, 512, 1024; AVX-512, 2 threads).
# The other layouts' kernels were ahead or level at all of them; signbit bench kernels --switch-over looks again.
_SWITCH_OVER: dict[type[Layout], int] = {Integers: 96, Partial: 160}


def matmul(x: Tensor, layout: Layout, int8: bool) -> Tensor:
    """``x @ W.T`` for x ``[..., in]``, in x's dtype.

    With activations in 8 bits a kernel is taken however many tokens there are: results do not depend on how many come
    together, but for the rounding of sums and, in layouts with salient columns, of these columns' activations, which
    one or two tokens share a step for otherwise than more do. The kernels for GPUs take activations as they are.
    """
    if x.is_cuda:
        return _matmul_on_gpu(x, layout)
    most = _SWITCH_OVER.get(type(layout))
    if most is None or int8 or x.shape[:-1].numel() < most:
        y = cpu.matmul(x, layout, int8)
        if y is not None:
            return y
    return reference.matmul(x, layout)


def _matmul_on_gpu(x: Tensor, layout: Layout) -> Tensor:
    y = cuda.matmul(x, layout)
    if y is None and (others := triton_kernels()) is not None:
        y = others.matmul(x, layout)
    return reference.matmul(x, layout) if y is None else y


@cache
def triton_kernels() -> Any:
    """The module of kernels for GPUs; None without Triton, and the first to ask is told."""
    try:
        return importlib.import_module("signbit.kernels.triton")
    except ImportError:
        warnings.warn(
            "Triton is not installed: on this GPU packed weights are unpacked for every product, many times slower. "
            "Install it: pip install 'signbit[gpu]'",
            stacklevel=2,
        )
        return None
