"""The CUDA kernels equal the reference: on a GPU, and everywhere in plain C++ (emulated.h)."""

from __future__ import annotations

import ctypes
import hashlib
import shutil
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from kernels.test_cpu import MAKERS, check, random
from signbit.kernels import cuda
from signbit.kernels.cuda import gemv, nvrtc
from signbit.kernels.cuda.gemv import Packed, Tiling, grid, macros_of, shared_bytes, source, static_bytes
from signbit.kernels.cuda.packing import chains
from signbit.layouts import Layout

HERE = Path(__file__).parent
HALF = {torch.bfloat16: 1e-2, torch.float16: 1e-3}

needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
needs_compiler = pytest.mark.skipif(shutil.which("g++") is None, reason="needs g++")

KNOWN = [name for name in MAKERS if chains(MAKERS[name](18, 256)) is not None]


class Emulator:
    """gemv.cu compiled for this machine, once for each set of macros."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def library(self, name: str, macros: dict[str, Any]) -> Any:
        text = source(name)
        body = text[text.index("// Numbers in memory") :]  # without hardware.cuh
        body = body.replace("extern __shared__ uint4 shared[];", "").replace("__shared__", "static")
        defines = "".join(f"#define {key} {value}\n" for key, value in sorted(macros.items()))
        program = f'{defines}#include "emulated.h"\n{body}\n#include "emulated_run.h"\n'
        file = self._folder / f"{hashlib.sha256(program.encode()).hexdigest()[:16]}.cpp"
        library = file.with_suffix(".so")
        if not library.exists():
            file.write_text(program)
            command = ["g++", "-std=c++20", "-O1", "-w", "-shared", "-fPIC", f"-I{HERE}", str(file), "-o", str(library)]
            subprocess.run(command, check=True)
        return ctypes.CDLL(str(library))

    def multiply(self, x: Tensor, packed: Packed, dtype: torch.dtype, tiling: Tiling | None) -> Tensor:
        m = packed.shape[1]
        aligned = x.data_ptr() % 16 == 0 and m * x.element_size() % 16 == 0
        macros, tiling = macros_of(packed, x.dtype, dtype, len(x), aligned, tiling)
        assert static_bytes(macros, tiling) + shared_bytes(packed, macros, tiling) <= 227 << 10
        y = torch.full((len(x), packed.shape[0]), torch.nan, dtype=dtype)
        sizes = (len(x), *packed.shape, packed.width, packed.groups, *grid(packed, macros, tiling, len(x)))
        pointers = (ctypes.c_void_p(x.data_ptr()), ctypes.c_void_p(y.data_ptr()), packed.struct())
        self.library(packed.name, macros).run(*pointers, *map(ctypes.c_int, sizes))
        return y

    def matmul(self, x: Tensor, layout: Layout, tiling: Tiling | None = None) -> Tensor:
        found = chains(layout)
        assert found is not None
        total = torch.zeros(())
        for chain in found:
            y = x
            for packed in chain:
                last = packed is chain[-1] and len(found) == 1
                y = self.multiply(y, packed, x.dtype if last else torch.float32, tiling)
            total = total + y
        return total.to(x.dtype)


@pytest.fixture(scope="session")
def emulator(tmp_path_factory: pytest.TempPathFactory) -> Emulator:
    return Emulator(tmp_path_factory.mktemp("emulated"))


@needs_compiler
@pytest.mark.parametrize("name", KNOWN)
def test_emulated(name: str, emulator: Emulator) -> None:
    layout, x = MAKERS[name](18, 256), random(2, 256)
    check(emulator.matmul(x, layout), x, layout)
    layout, x = MAKERS[name](40, 333), random(1, 333).bfloat16()
    check(emulator.matmul(x, layout), x, layout)


@needs_compiler
@pytest.mark.parametrize("tokens", [1, 3, 8])
@pytest.mark.parametrize("dtype", [torch.float32, *HALF])
def test_emulated_tokens_and_dtypes(tokens: int, dtype: torch.dtype, emulator: Emulator) -> None:
    layout, x = MAKERS["sign"](20, 160), random(tokens, 160).to(dtype)
    check(emulator.matmul(x, layout), x, layout)


@needs_compiler
@pytest.mark.parametrize("tiling", [Tiling(1, 1, 4), Tiling(2, 2, 8), Tiling(2, 4, 4), Tiling(1, 4, 16)])
def test_emulated_tilings(tiling: Tiling, emulator: Emulator) -> None:
    layout, x = MAKERS["sign"](50, 640), random(2, 640)
    check(emulator.matmul(x, layout, tiling), x, layout)


@needs_compiler
def test_emulated_activations_of_any_size(emulator: Emulator) -> None:
    layout = MAKERS["sign"](16, 256)
    for scale in (0.0, 1e-30, 1e30):
        x = (random(1, 256) * scale).bfloat16()
        x[0, 7] *= 1000
        check(emulator.matmul(x, layout), x, layout)


def test_what_is_left_to_others(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cuda, "supported", lambda device: True)
    layout = MAKERS["sign"](16, 100)
    assert cuda.matmul(random(9, 100), layout) is None
    assert cuda.matmul(random(0, 100), layout) is None
    assert cuda.matmul(random(1, 100).double(), layout) is None
    assert cuda.matmul(random(1, 64), MAKERS["4 of 8"](16, 64)) is None
    with pytest.raises(ValueError, match="99 features"):
        cuda.matmul(random(1, 99), layout)


def test_a_tiling_that_does_not_fit_is_refused() -> None:
    found = chains(MAKERS["sign"](16, 96))
    assert found is not None
    with pytest.raises(ValueError, match="3 words"):
        macros_of(found[0][0], torch.bfloat16, torch.bfloat16, 1, True, Tiling(1, 2, 4))


def test_a_cache_that_is_no_good_is_gone_without(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made = []

    def compile_once(source: str, options: list[str]) -> bytes:
        made.append(source)
        return b"\x7fELF code"

    monkeypatch.setattr(nvrtc, "_compile", compile_once)
    monkeypatch.setattr(nvrtc, "_version", lambda: "13.0")
    monkeypatch.setenv("SIGNBIT_CACHE", str(tmp_path))
    for _ in range(2):
        assert nvrtc.compiled("source", {}, "sm_90") == b"\x7fELF code"
    assert len(made) == 1
    (kept,) = (tmp_path / "cuda").iterdir()
    kept.write_bytes(b"")  # as a full disk leaves it
    nvrtc.compiled("source", {}, "sm_90")
    assert len(made) == 2
    monkeypatch.setenv("SIGNBIT_CACHE", str(kept))  # not a directory
    assert nvrtc.compiled("source", {}, "sm_90") == b"\x7fELF code"
    assert len(made) == 3


def test_prepared_again_when_changed() -> None:
    layout = MAKERS["4 bits"](16, 256)
    before, again = chains(layout), chains(layout)
    assert before is not None
    assert again is before
    layout.get_buffer("zeros").add_(1)
    assert chains(layout) is not before
    layout._buffers["scales"] = layout.get_buffer("scales").clone()
    after = chains(layout)
    assert after is not None
    assert after[0][0].tensors[1] is layout.get_buffer("scales")


def test_each_thread_has_arguments_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    class Noted:
        arguments = (ctypes.c_void_p(), ctypes.c_void_p())

        def __call__(self, stream: int) -> None:
            pass

    monkeypatch.setattr(gemv, "_bind", lambda *_: Noted())
    monkeypatch.setattr(torch._C, "_cuda_getCurrentRawStream", lambda device: 0, raising=False)
    found = chains(MAKERS["sign"](16, 64))
    assert found is not None
    packed = found[0][0]
    x, y = random(1, 64), torch.empty(1, 16)
    bound = []

    def multiply() -> None:
        for _ in range(2):
            gemv.multiply(x, y, 1, packed)
        bound.append(list(packed.started.bound.values()))

    thread = threading.Thread(target=multiply)
    multiply()
    thread.start()
    thread.join()
    assert [len(of_thread) for of_thread in bound] == [1, 1]
    assert bound[0][0] is not bound[1][0]


def test_a_kernel_that_cannot_be_used_is_gone_without(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(device: int) -> None:
        raise nvrtc.CudaError("no context\nand more")

    monkeypatch.setattr(gemv, "_architecture", lambda device: "sm_90")
    monkeypatch.setattr(gemv, "enter_context", fail)
    found = chains(MAKERS["sign"](16, 64))
    assert found is not None
    with pytest.warns(UserWarning, match="no context$"):
        assert not gemv.multiply(random(1, 64), torch.empty(1, 16), 1, found[0][0])
    assert not gemv.multiply(random(1, 64), torch.empty(1, 16), 1, found[0][0])  # and is not tried again


@pytest.mark.gpu
@needs_gpu
@pytest.mark.parametrize("name", KNOWN)
def test_equals_the_reference(name: str) -> None:
    for n, m in [(5, 128), (18, 256), (100, 1000), (200, 4097), (4099, 2048)]:
        layout = MAKERS[name](n, m)
        for tokens in (1, 2, 5, 8):
            for dtype in (torch.bfloat16, torch.float16, torch.float32):
                x = random(tokens, m).to(dtype)
                y = cuda.matmul(x.cuda(), layout.to("cuda"))
                assert y is not None
                check(y.cpu(), x, layout.to("cpu"))


@pytest.mark.gpu
@needs_gpu
@pytest.mark.parametrize("captured", [False, True])
def test_products_that_wait_for_each_other(captured: bool) -> None:
    """Each begins while the one before it still runs, and must not read what that has not written yet."""
    layouts = [MAKERS["sign"](2048, 2048).to("cuda") for _ in range(20)]
    x = random(1, 2048).cuda()

    def chain() -> Tensor:
        y = x
        for layout in layouts:
            found = cuda.matmul(y, layout)
            assert found is not None
            y = found / found.abs().max() if layout is layouts[7] else found
        return y

    expected = x.double()
    for layout in layouts:
        expected = expected @ layout.dequantize().double().T
        expected = expected / expected.abs().max() if layout is layouts[7] else expected
    y = chain()
    if captured:
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            y = chain()
    for _ in range(50):
        if captured:
            y.zero_()
            graph.replay()
        else:
            y = chain()
        assert (y.double() - expected).norm() <= 1e-4 * expected.norm()


@pytest.mark.gpu
@needs_gpu
def test_results_do_not_depend_on_timing() -> None:
    layout, x = MAKERS["two planes"](1000, 3000).to("cuda"), random(3, 3000).cuda()
    first = cuda.matmul(x, layout)
    assert first is not None
    for _ in range(20):
        again = cuda.matmul(x, layout)
        assert again is not None
        assert torch.equal(again, first)


def nvrtc_anywhere() -> Any:
    """NVRTC as pip installs it, whether torch is built for CUDA or not; it compiles without a GPU."""
    found = (library for folder in sys.path for library in Path(folder).glob("nvidia/*/lib/libnvrtc.so.1?"))
    library = next(found, None)
    return None if library is None else nvrtc.load_nvrtc(library)


@pytest.mark.skipif(nvrtc_anywhere() is None, reason="needs nvidia-cuda-nvrtc")
@pytest.mark.parametrize("name", KNOWN)
def test_compiles_for_gpus_that_are_not_here(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SIGNBIT_CACHE", str(tmp_path))
    monkeypatch.setattr(nvrtc, "_nvrtc", nvrtc_anywhere)
    found = chains(MAKERS[name](18, 256))
    assert found is not None
    for packed in {one.name: one for chain in found for one in chain}.values():
        for tokens, dtype in ((1, torch.bfloat16), (8, torch.float32)):
            macros, _ = macros_of(packed, dtype, dtype, tokens, True)
            code = nvrtc.compiled(source(packed.name), macros, "sm_90")
            assert code.startswith(b"\x7fELF")
            assert nvrtc.compiled(source(packed.name), macros, "sm_90") == code  # from the cache
    assert len(list((tmp_path / "cuda").iterdir())) >= 2


@pytest.mark.skipif(nvrtc_anywhere() is None, reason="needs nvidia-cuda-nvrtc")
def test_what_does_not_compile_says_why(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(nvrtc, "_nvrtc", nvrtc_anywhere)
    with pytest.raises(nvrtc.CudaError, match="undefined"):
        nvrtc._compile("__global__ void f() { nothing(); }", ["--gpu-architecture=sm_90"])
