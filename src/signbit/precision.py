"""In what precision, and how fast, dense products run.

**bfloat16** where the processor multiplies it: on GPUs, and on CPUs with AVX-512 BF16 or AMX, where it is several times
as fast as float32. Only training and tuning use it, for activations: what calibrates, evaluates or is stored does not.

**float32 at full speed.** torch's float32 products on x86 are MKL's, which on AMD's processors runs at less than half
of what they can do; oneDNN, which torch has as well, does not. torch takes oneDNN for float32 only where bfloat16 is
allowed inside of products (``fp32_precision``), and oneDNN makes use of that on processors with AMX alone. So on AMD's,
which have none, and once a product has been seen to be exact to float32, :func:`fast_float32` allows it. Small products
are slower that way, so this is for passes through models and for solvers, not for sweeps over columns.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import cache
from pathlib import Path
from typing import Any, Literal

import torch

Precision = Literal["auto", "float32", "bfloat16"]

_lock = threading.Lock()
_inside, _before = 0, "none"


def has_bfloat16(device: torch.device) -> bool:
    """Whether products in bfloat16 are the fast ones there."""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported()
    return _cpu_has("avx512_bf16") or _cpu_has("amx_tile")


def uses_bfloat16(precision: Precision, device: torch.device) -> bool:
    return has_bfloat16(device) if precision == "auto" else precision == "bfloat16"


def autocast(precision: Precision, device: torch.device) -> AbstractContextManager[None]:
    """What a model is run in to be trained; may be entered again and again."""
    if uses_bfloat16(precision, device):
        return torch.autocast(device.type, torch.bfloat16)
    return nullcontext()


@contextmanager
def fast_float32() -> Iterator[None]:
    """Let large float32 products on the CPU run at full speed; for the whole process, as long as any is inside."""
    if not _onednn_is_better():
        yield
        return
    global _inside, _before
    with _lock:
        if not _inside:
            _before = _allow("bf16")
        _inside += 1
    try:
        yield
    finally:
        with _lock:
            _inside -= 1
            if not _inside:
                _allow(_before)


@cache
def _onednn_is_better() -> bool:
    there = hasattr(getattr(torch.backends.mkldnn, "matmul", None), "fp32_precision")
    if not there or not _cpu_has("avx512") or _cpu_has("amx_tile") or not _made_by_amd():
        return False
    # bfloat16 cannot tell these from one, and the sum of 128 is a float32.
    inputs = torch.full((128, 128), 1 + 2.0**-12)
    before = _allow("bf16")
    try:
        found = inputs @ torch.ones(128, 128)
    finally:
        _allow(before)
    return bool((found == 128 + 2.0**-5).all())


def _allow(precision: str) -> str:
    """Set torch's switch; what it was."""
    settings: Any = torch.backends.mkldnn
    before: str = settings.matmul.fp32_precision
    settings.matmul.fp32_precision = precision
    return before


def _cpu_has(feature: str) -> bool:
    asked = getattr(torch.cpu, f"_is_{feature}_supported", None)
    return bool(asked is not None and asked())


def _made_by_amd() -> bool:
    """As far as Linux tells; elsewhere no."""
    try:
        return "AuthenticAMD" in Path("/proc/cpuinfo").read_text(encoding="utf-8")
    except OSError:
        return False
