"""Compiling CUDA C++ while the program runs, and starting it: NVIDIA's own libraries, through ctypes.

NVRTC comes with every CUDA build of torch, so nothing has to be compiled when signbit is installed, and there need be
no CUDA toolkit. What was compiled is kept in the user's cache, by a hash of the source, the macros, the architecture
and the compiler's version.
"""

from __future__ import annotations

import ctypes
import hashlib
from collections.abc import Mapping, Sequence
from contextlib import suppress
from functools import cache
from pathlib import Path
from typing import Any

import torch

from signbit.safetensors_file import atomic_file
from signbit.user_cache import cache_directory

_MAX_DYNAMIC_SHARED = 8  # CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES
_PROGRAMMATIC_SERIALIZATION = 6  # CU_LAUNCH_ATTRIBUTE_PROGRAMMATIC_STREAM_SERIALIZATION


class CudaError(RuntimeError):
    """What NVIDIA's libraries say went wrong."""


class _Attribute(ctypes.Structure):
    _fields_ = (("id", ctypes.c_int), ("pad", ctypes.c_char * 4), ("value", ctypes.c_int), ("rest", ctypes.c_char * 60))


class _Launch(ctypes.Structure):
    _fields_ = (
        ("grid", ctypes.c_uint * 3),
        ("block", ctypes.c_uint * 3),
        ("shared", ctypes.c_uint),
        ("stream", ctypes.c_void_p),
        ("attributes", ctypes.POINTER(_Attribute)),
        ("attribute_count", ctypes.c_uint),
    )


@cache
def can_compile(architecture: str) -> bool:
    """Whether NVRTC is here, and knows an architecture such as "sm_90"."""
    try:
        nvrtc = _nvrtc()
    except OSError:
        return False
    count = ctypes.c_int()
    nvrtc.nvrtcGetNumSupportedArchs(ctypes.byref(count))
    known = (ctypes.c_int * count.value)()
    nvrtc.nvrtcGetSupportedArchs(known)
    return int(architecture.removeprefix("sm_")) in list(known)


@cache
def _nvrtc() -> Any:
    name = f"libnvrtc.so.{(torch.version.cuda or '0').partition('.')[0]}"
    try:
        return ctypes.CDLL(name)
    except OSError:
        # Beside torch, where pip puts what it depends on: nvidia/cuda_nvrtc/lib, since CUDA 13 nvidia/cu13/lib.
        return load_nvrtc(next(Path(torch.__file__).parent.parent.glob(f"nvidia/*/lib/{name}"), Path(name)))


def load_nvrtc(library: Path) -> Any:
    """NVRTC from a file. It asks for its builtins by name, and finds them only if they are loaded already."""
    for builtins in library.parent.glob("libnvrtc-builtins.so.*"):
        ctypes.CDLL(str(builtins))
    return ctypes.CDLL(str(library))


@cache
def _driver() -> Any:
    return ctypes.CDLL("libcuda.so.1")


def _check(status: int, what: str) -> None:
    if status:
        message = ctypes.c_char_p()
        _driver().cuGetErrorString(status, ctypes.byref(message))
        raise CudaError(f"{what}: {(message.value or b'unknown error').decode()} ({status})")


def _version() -> str:
    major, minor = ctypes.c_int(), ctypes.c_int()
    _nvrtc().nvrtcVersion(ctypes.byref(major), ctypes.byref(minor))
    return f"{major.value}.{minor.value}"


def compiled(source: str, macros: Mapping[str, Any], architecture: str) -> bytes:
    """The machine code (cubin) of ``source`` for an architecture such as "sm_90", from the cache if it is there."""
    options = [f"--gpu-architecture={architecture}", "--std=c++17"]
    options += [f"-D{name}={value}" for name, value in sorted(macros.items())]
    key = hashlib.sha256("\0".join([_version(), source, *options]).encode()).hexdigest()[:32]
    code = _kept(key)
    if code is None:
        code = _compile(source, options)
        _keep(key, code)
    return code


def _file(key: str) -> Path:
    return cache_directory() / "cuda" / f"{key}.cubin"


def _kept(key: str) -> bytes | None:
    try:
        code = _file(key).read_bytes()
    except (OSError, RuntimeError):  # there is none, or no home directory
        return None
    return code if code.startswith(b"\x7fELF") else None


def _keep(key: str, code: bytes) -> None:
    """If the cache can be written; the next process compiles again if it cannot."""
    with suppress(OSError, RuntimeError):
        file = _file(key)
        file.parent.mkdir(parents=True, exist_ok=True)
        with atomic_file(file) as temporary:
            temporary.write_bytes(code)


def _compile(source: str, options: Sequence[str]) -> bytes:
    nvrtc, program, size = _nvrtc(), ctypes.c_void_p(), ctypes.c_size_t()
    nvrtc.nvrtcCreateProgram(ctypes.byref(program), source.encode(), b"signbit.cu", 0, None, None)
    try:
        array = (ctypes.c_char_p * len(options))(*(option.encode() for option in options))
        if nvrtc.nvrtcCompileProgram(program, len(options), array):
            nvrtc.nvrtcGetProgramLogSize(program, ctypes.byref(size))
            log = ctypes.create_string_buffer(size.value)
            nvrtc.nvrtcGetProgramLog(program, log)
            raise CudaError(f"the kernel does not compile with {' '.join(options)}:\n{log.value.decode()}")
        nvrtc.nvrtcGetCUBINSize(program, ctypes.byref(size))
        code = ctypes.create_string_buffer(size.value)
        nvrtc.nvrtcGetCUBIN(program, code)
        return code.raw
    finally:
        nvrtc.nvrtcDestroyProgram(ctypes.byref(program))


def enter_context(device: int) -> None:
    """Have this thread use the context that torch has on a device. The driver takes what is current; torch's own calls,
    which would see to it, may all have been answered from caches in a thread that is new."""
    driver, context = _driver(), ctypes.c_void_p()
    _check(driver.cuCtxGetCurrent(ctypes.byref(context)), "looking for a context")
    if not context:
        handle = ctypes.c_int()
        _check(driver.cuDeviceGet(ctypes.byref(handle), device), f"finding device {device}")
        _check(driver.cuDevicePrimaryCtxRetain(ctypes.byref(context), handle), "keeping a context")
        _check(driver.cuCtxSetCurrent(context), "entering a context")


class Kernel:
    """A compiled kernel, loaded into the current device's context."""

    def __init__(self, code: bytes, name: str, shared: int, programmatic: bool) -> None:
        """shared: the bytes of shared memory that it is started with. programmatic: it may be started before the kernel
        ahead of it on the stream has ended, for which it waits by itself (sm_90 and later)."""
        driver, module = _driver(), ctypes.c_void_p()
        self._shared, self._programmatic = shared, programmatic
        self._function = ctypes.c_void_p()
        _check(driver.cuModuleLoadData(ctypes.byref(module), code), "loading a kernel")
        _check(driver.cuModuleGetFunction(ctypes.byref(self._function), module, name.encode()), f"finding {name}")
        _check(driver.cuFuncSetAttribute(self._function, _MAX_DYNAMIC_SHARED, shared), f"{shared} bytes shared")

    def bound(self, grid: tuple[int, int], threads: int, arguments: Sequence[Any]) -> Bound:
        return Bound(self._function, grid, threads, self._shared, self._programmatic, arguments)


class Bound:
    """A kernel with its grid and its arguments, ctypes objects whose values may be changed between calls."""

    def __init__(
        self,
        function: Any,
        grid: tuple[int, int],
        threads: int,
        shared: int,
        programmatic: bool,
        arguments: Sequence[Any],
    ) -> None:
        self.arguments = tuple(arguments)
        self._attribute = _Attribute(_PROGRAMMATIC_SERIALIZATION, b"", 1)
        attributes = ctypes.pointer(self._attribute)
        self._launch = _Launch((*grid, 1), (threads, 1, 1), shared, None, attributes, int(programmatic))
        self._at = (ctypes.c_void_p * len(arguments))(*(ctypes.addressof(argument) for argument in arguments))
        self._function, self._call, self._config = function, _driver().cuLaunchKernelEx, ctypes.byref(self._launch)

    def __call__(self, stream: int) -> None:
        """Start it on a stream of the current device."""
        self._launch.stream = stream
        _check(self._call(self._config, self._function, self._at, None), "starting a kernel")
