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

from signbit.kernels.cuda.gemv import COLUMNS, Packed, Tiling, multiply
from signbit.kernels.cuda.nvrtc import CudaError, available
from signbit.kernels.cuda.packing import chains
from signbit.layouts import Layout

__all__ = ["CudaError", "matmul"]

_DTYPES = (torch.float32, torch.float16, torch.bfloat16)


def matmul(x: Tensor, layout: Layout, tiling: Tiling | None = None) -> Tensor | None:
    """``x @ W.T`` for x ``[..., in]`` of at most eight tokens, in x's dtype, sums in float32; None if there is no kernel
    for it.

    tiling: in place of the one that gemv.py chooses.
    """
    m = layout.spec.shape[1]
    if x.shape[-1] != m:
        raise ValueError(f"inputs have {x.shape[-1]} features, the matrix has {m}")
    if not 0 < x.numel() <= COLUMNS * m or x.dtype not in _DTYPES or not available():
        return None
    found = chains(layout)
    if found is None:
        return None
    x = x.resolve_neg()
    flat = x.reshape(-1, m).contiguous()
    with torch.cuda.device(x.device):
        total = None
        for chain in found:
            y: Tensor | None = flat
            for packed in chain:
                last = packed is chain[-1] and len(found) == 1
                y = _multiply(y, packed, x.dtype if last else torch.float32, tiling)
                if y is None:
                    return None
            total = y if total is None else total + y
    assert total is not None
    return total.to(x.dtype).view(*x.shape[:-1], -1)


def _multiply(x: Tensor, packed: Packed, dtype: torch.dtype, tiling: Tiling | None) -> Tensor | None:
    y = torch.empty(len(x), packed.shape[0], dtype=dtype, device=x.device)
    return y if multiply(x, y, packed, tiling) else None
