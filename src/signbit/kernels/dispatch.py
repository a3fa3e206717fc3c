"""Which way a product goes: a kernel, or unpacking tiles of rows for torch's dense product."""

from __future__ import annotations

from torch import Tensor

from signbit.kernels import cpu, reference
from signbit.layouts import Integers, Layout, Partial

# Tokens from which on unpacking is faster, between batches that were timed (16, 128, 512, 1024; AVX-512, 2 threads).
# The other layouts' kernels were ahead or level at all of them; signbit bench kernels --switch-over looks again.
_SWITCH_OVER: dict[type[Layout], int] = {Integers: 96, Partial: 160}


def matmul(x: Tensor, layout: Layout, int8: bool) -> Tensor:
    """``x @ W.T`` for x ``[..., in]``, in x's dtype.

    With activations in 8 bits a kernel is taken however many tokens there are: results do not depend on how many come
    together, but for the rounding of sums.
    """
    most = _SWITCH_OVER.get(type(layout))
    if most is None or int8 or x.shape[:-1].numel() < most:
        y = cpu.matmul(x, layout, int8)
        if y is not None:
            return y
    return reference.matmul(x, layout)
