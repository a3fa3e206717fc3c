"""CUDA C++ kernels: a few tokens times packed matrices, from the packed bits themselves.

    gemv.cu          how it is done, for all layouts; hardware.cuh, numbers.cuh: what that rests on
    <layout>.cuh     what a layout's bits and coefficients mean
    packing.py       the same of a layout's tensors
    gemv.py          what is compiled for a product, and how it is started
    nvrtc.py         compiling at run time, loading, starting

Layouts and numbers of tokens that are not known here are the Triton kernels' (kernels/triton).
"""

from __future__ import annotations

import torch
from torch import Tensor

from signbit.kernels.cuda.gemv import COLUMNS, Packed, Tiling, multiply, supported
from signbit.kernels.cuda.packing import chains
from signbit.layouts import Layout

__all__ = ["matmul"]

_DTYPES = (torch.float32, torch.float16, torch.bfloat16)


def matmul(x: Tensor, layout: Layout, tiling: Tiling | None = None) -> Tensor | None:
    """``x @ W.T`` for x ``[..., in]`` of at most eight tokens, in x's dtype, sums in float32; None if there is no
    kernel for it.

    tiling: in place of the one that gemv.py chooses.
    """
    m = layout.spec.shape[1]
    if x.shape[-1] != m:
        raise ValueError(f"inputs have {x.shape[-1]} features, the matrix has {m}")
    if not 0 < x.numel() <= COLUMNS * m or x.dtype not in _DTYPES or not supported(x.device.index):
        return None
    found = chains(layout)
    if found is None or found[0][0].device != x.device:
        return None
    if x.device.index != torch.cuda.current_device():
        with torch.cuda.device(x.device):
            return _sum_of_chains(x, found, tiling)
    return _sum_of_chains(x, found, tiling)


def _sum_of_chains(x: Tensor, chains: list[list[Packed]], tiling: Tiling | None) -> Tensor | None:
    if not x.is_contiguous() or x.is_neg():
        x = x.resolve_neg().contiguous()
    *batch, m = x.shape
    tokens = x.numel() // m
    total = None
    for chain in chains:
        inputs = x
        for packed in chain:
            last = len(chains) == 1 and packed is chain[-1]
            dtype = x.dtype if last else torch.float32
            y = torch.empty(*batch, packed.shape[0], dtype=dtype, device=x.device)
            if not multiply(inputs, y, tokens, packed, tiling):
                return None
            inputs = y
        total = y if total is None else total + y
    return total if total is None or total.dtype == x.dtype else total.to(x.dtype)
