"""Up to eight tokens times a packed matrix by gemv.cu: what it is compiled with for a layout, and how it is started.

A layout gives its own file, macros and tensors (``Packed``). For the activations at hand (how many, their dtype) and
the matrix's shape a ``Tiling`` is chosen; each combination is compiled once, and kept (nvrtc.py).
"""

from __future__ import annotations

import ctypes
import threading
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from signbit.errors import SignbitError
from signbit.kernels.cuda.nvrtc import Bound, CudaError, Kernel, can_compile, compiled, enter_context

COLUMNS = 8  # of a tensor core's operand: tokens, in their sets and parts
_KINDS = {torch.float16: 0, torch.bfloat16: 1, torch.float32: 2}
# Shared memory that a block may have: all of a multiprocessor's but 1 KiB; of other architectures what sm_86 has.
_SHARED = {"sm_80": 163 << 10, "sm_87": 163 << 10, "sm_90": 227 << 10, "sm_100": 227 << 10}
_LEAST_SHARED = 99 << 10
# Rows from which on, and words of a row below which, blocks of few warps were faster; rows that are few for the GPU.
_MANY_ROWS, _SHORT_ROW, _FEW_ROWS = 8192, 256, 2048


@dataclass(frozen=True)
class Tiling:
    """16 * row_tiles rows a block, of which each of ``warps`` warps takes steps of 4 * words words."""

    row_tiles: int
    words: int
    warps: int

    @property
    def rows(self) -> int:
        return 16 * self.row_tiles


class Started(threading.local):
    """Kernels bound to a matrix, by what they are compiled for. Of each thread: arguments change before each start."""

    def __init__(self) -> None:
        self.bound: dict[Any, Bound | None] = {}


@dataclass(frozen=True)
class Packed:
    """A packed matrix as gemv.cu is given it.

    name: of the layout's file. bits: of a field. sets, terms: as the file has them. group_size: columns that share
    coefficients, 0 for whole rows. width: words of a row. groups: coefficients of a row. tensors: pointers and numbers,
    in the order of the file's ``Tensors``, kept alive here. macros: what else the file asks for. wide: whether
    activations are multiplied by what makes them wider than 16 bits.
    """

    name: str
    shape: tuple[int, int]
    bits: int
    sets: int
    terms: int
    group_size: int
    width: int
    groups: int
    scales: torch.dtype
    tensors: Sequence[Tensor | int]
    macros: Mapping[str, Any]
    wide: bool = False
    started: Started = field(default_factory=Started, compare=False)

    @property
    def group_words(self) -> int:
        return self.group_size * self.bits // 32

    @property
    def device(self) -> torch.device:
        return next(one.device for one in self.tensors if isinstance(one, Tensor))

    def struct(self) -> Any:
        """``Tensors`` in memory: eight bytes each."""
        values = [one.data_ptr() if isinstance(one, Tensor) else one for one in self.tensors]
        return (ctypes.c_int64 * len(values))(*values)


def group_fits(group_size: int, bits: int) -> bool:
    """Whether a warp's shortest step, four words, has coefficients of one group."""
    return group_size % (4 * 32 // bits) == 0


def multiply(x: Tensor, y: Tensor, tokens: int, packed: Packed, tiling: Tiling | None = None) -> bool:
    """y = x W^T for contiguous x [.., m] and y [.., n]; False if the activations need too much memory.

    Both on the current device, to whose current stream this goes.
    """
    aligned = x.data_ptr() % 16 == 0 and packed.shape[1] * x.element_size() % 16 == 0
    key = (x.dtype, y.dtype, tokens, aligned, x.device.index, tiling)
    started = packed.started.bound
    if key not in started:
        started[key] = _bind(packed, x, y, tokens, aligned, tiling)
    bound = started[key]
    if bound is None:
        return False
    bound.arguments[0].value = x.data_ptr()
    bound.arguments[1].value = y.data_ptr()
    bound(torch._C._cuda_getCurrentRawStream(x.device.index))
    return True


def _bind(packed: Packed, x: Tensor, y: Tensor, tokens: int, aligned: bool, tiling: Tiling | None) -> Bound | None:
    """A kernel with this matrix; None if there can be none, which is said unless it is for want of memory."""
    architecture = _architecture(x.device.index)
    macros, tiling = macros_of(packed, x.dtype, y.dtype, tokens, aligned, tiling)
    most = _SHARED.get(architecture, _LEAST_SHARED)
    while static_bytes(macros, tiling) + shared_bytes(packed, macros, tiling) > most:
        if macros["TOKENS"] == 1:
            return None
        macros["TOKENS"] //= 2
    shared = shared_bytes(packed, macros, tiling)
    try:
        enter_context(x.device.index)
        kernel = _kernel(packed.name, tuple(sorted(macros.items())), architecture, shared, x.device.index)
    except CudaError as error:
        text = str(error).partition("\n")[0]
        warnings.warn(f"a CUDA kernel cannot be used, and products take Triton's: {text}", stacklevel=2)
        return None
    sizes = (tokens, *packed.shape, packed.width, packed.groups)
    arguments = (ctypes.c_void_p(), ctypes.c_void_p(), packed.struct(), *map(ctypes.c_int, sizes))
    return kernel.bound(grid(packed, macros, tiling, tokens), 32 * tiling.warps, arguments)


def macros_of(
    packed: Packed,
    x: torch.dtype,
    y: torch.dtype,
    tokens: int,
    aligned: bool,
    tiling: Tiling | None = None,
) -> tuple[dict[str, Any], Tiling]:
    """What gemv.cu is compiled with."""
    parts = 2 if packed.wide or x == torch.float32 else 1
    tiling = tiling or choose_tiling(packed)
    if packed.width % tiling.words or packed.group_words % (4 * tiling.words):
        raise ValueError(f"{tiling} does not divide rows of {packed.width} words in groups of {packed.group_size}")
    together = min(1 << (tokens - 1).bit_length(), COLUMNS // (packed.sets * parts))
    macros = {
        "KIND_OF_X": _KINDS[x],
        "KIND_OF_Y": _KINDS[y],
        "KIND_OF_SCALES": _KINDS[packed.scales],
        "TOKENS": together,
        "PARTS": parts,
        "ALIGNED": int(aligned and packed.shape[1] % (32 // packed.bits) == 0),
        "GROUP_WORDS": packed.group_words,
        "ROW_TILES": tiling.row_tiles,
        "WORDS": tiling.words,
        "WARPS": tiling.warps,
        # What registers are rationed for: two blocks of sixteen warps, so that one may begin while another ends.
        "RESIDENT_THREADS": 1024 if packed.terms < 3 else 768,
        **packed.macros,
    }
    return macros, tiling


def choose_tiling(packed: Packed) -> Tiling:
    """What was fastest on an H200 (docs/kernels.md), of what the groups allow."""
    sizes = (2, 1) if packed.bits == 1 else (4, 2, 1)
    words = next(size for size in sizes if packed.width % size == 0 and packed.group_words % (4 * size) == 0)
    few_rows, many_rows = packed.shape[0] < _FEW_ROWS, packed.shape[0] >= _MANY_ROWS
    short = packed.group_words == 0 and packed.width < _SHORT_ROW
    return Tiling(1 if few_rows or packed.bits == 4 else 2, words, 4 if many_rows and short else 16)


def shared_bytes(packed: Packed, macros: Mapping[str, Any], tiling: Tiling) -> int:
    """As gemv.cu lays its shared memory out: operands, sums of activations, sums of warps."""
    columns = macros["TOKENS"] * packed.sets * macros["PARTS"]
    steps = -(-packed.width // (4 * tiling.words))
    operands = 8 // packed.bits * columns * (steps * 4 * tiling.words + 4) * 8
    return operands + 4 * (macros["TOKENS"] * packed.sets * steps + tiling.warps * columns * tiling.rows)


def static_bytes(macros: Mapping[str, Any], tiling: Tiling) -> int:
    """What it has besides: ``found`` and ``inverse``."""
    return 4 * (tiling.warps + macros["TOKENS"])


def grid(packed: Packed, macros: Mapping[str, Any], tiling: Tiling, tokens: int) -> tuple[int, int]:
    return -(-packed.shape[0] // tiling.rows), -(-tokens // macros["TOKENS"])


@cache
def source(name: str) -> str:
    """All that is compiled for a layout, in one text."""
    here = Path(__file__).parent
    files = ("hardware.cuh", "numbers.cuh", f"{name}.cuh", "gemv.cu")
    return "\n".join((here / file).read_text(encoding="utf-8") for file in files)


@cache
def supported(device: int) -> bool:
    """Whether gemv.cu can be compiled for a device: it needs NVRTC, and tensor cores as of sm_80."""
    return torch.cuda.get_device_capability(device) >= (8, 0) and can_compile(_architecture(device))


@cache
def _architecture(device: int) -> str:
    """Such as "sm_90"."""
    major, minor = torch.cuda.get_device_capability(device)
    return f"sm_{major}{minor}"


_kernels: dict[Any, Kernel] = {}


def _kernel(name: str, macros: tuple[tuple[str, Any], ...], architecture: str, shared: int, device: int) -> Kernel:
    """Loaded once for each device."""
    key = (name, macros, shared, device)
    if key not in _kernels:
        if torch.cuda.is_current_stream_capturing():
            raise SignbitError(
                "a product with packed weights was captured in a CUDA graph before it had run: run the model once, "
                "with as many tokens, before capturing it"
            )
        code = compiled(source(name), dict(macros), architecture)
        programmatic = int(architecture.removeprefix("sm_")) >= 90
        _kernels[key] = Kernel(code, "gemv", shared, programmatic)
    return _kernels[key]
