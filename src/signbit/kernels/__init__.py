"""Multiplying with packed weights. The torch reference is the truth that every faster kernel is tested against.

reference.py   torch: any layout, device and dtype
cpu/           C++, for CPUs
cuda/          CUDA C++, for a few tokens on NVIDIA's GPUs
triton/        Triton, for all else there; imported by the first product that needs it
dispatch.py    which of them
operator.py    the same as an operator of torch, for compiled and exported models, and for gradients
turns.py       what rounding the columns of a matrix in turn is given: cpu/ and triton/ do that too
"""

from __future__ import annotations

import torch
from torch import Tensor

from signbit.kernels import cpu, cuda, dispatch, operator, reference
from signbit.layouts.base import Layout

__all__ = ["cpu", "cuda", "is_traced", "matmul", "reference"]


def is_traced(x: Tensor) -> bool:
    """Whether it is looked at what is computed with x, so that nothing may be computed behind torch's back."""
    return (
        type(x) is not Tensor
        or torch.compiler.is_compiling()
        or torch._C._get_tracing_state() is not None
        or torch._C._len_torch_dispatch_stack() > 0  # modes: fake tensors, make_fx, counters of operations
        or torch._C._functorch.peek_interpreter_stack() is not None  # vmap and the like
    )


def matmul(x: Tensor, layout: Layout, int8: bool = False) -> Tensor:
    """``x @ W.T`` for x ``[..., in]`` and a packed W ``[out, in]``; the result has x's dtype, sums are in float32.

    int8: kernels may round x to 8 bits, 128 columns at a time. The reference never does.

    A compiled or exported model, and whoever wants gradients, meets one operator. Everybody else skips torch's
    dispatcher, which would take longer than the product with a small matrix.
    """
    if is_traced(x) or (x.requires_grad and torch.is_grad_enabled()):
        return operator.matmul(x, list(layout.buffers()), layout.description, int8)
    return dispatch.matmul(x, layout, int8)
