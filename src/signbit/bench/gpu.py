"""``signbit bench kernels --device cuda``: kernels for GPUs against a GPU's own copy, and bfloat16 in cuBLAS.

Everything is timed in one run, on matrices that are gone through in a circle larger than the caches, as CUDA graphs:
what is timed is the GPU, not Python. A decoding product (up to 8 tokens) is measured by the bytes of the matrix
against the bytes that a copy moves in the same time; a prefill by the time of the dense product.

With ``tune`` every Triton kernel that a product goes to first tries its candidates, and the fastest are kept in the
user's cache (kernels/triton).
"""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch.nn import functional as F

from signbit import kernels
from signbit.bench.random_layouts import MAKERS
from signbit.errors import SignbitError
from signbit.kernels import dispatch
from signbit.layouts import Layout
from signbit.progress import Progress, Silent

SHAPES = [(4096, 4096), (4096, 11008), (11008, 4096), (8192, 28672)]
BATCHES = [1, 8, 2048]
FOOTPRINT = 512 << 20  # ten times the second-level cache of an H100

Calls = Sequence[Callable[[], object]]


@torch.inference_mode()
def bench_gpu(
    *,
    device: str = "cuda",
    names: Sequence[str] = (),
    shapes: Sequence[tuple[int, int]] = (),
    batches: Sequence[int] = (),
    tune: bool = False,
    turns: int = 9,
    footprint: int = FOOTPRINT,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Time random matrices of each kind (``MAKERS``), shape and batch; activations are bfloat16."""
    for name in names:
        if name not in MAKERS:
            raise SignbitError(f"no kind of matrix is called {name!r}: known are {', '.join(MAKERS)}")
    place = torch.device(device)
    if place.type == "cuda" and not torch.cuda.is_available():
        raise SignbitError(f"--device {device}: torch sees no CUDA device here")
    chosen, shapes, batches = names or list(MAKERS), shapes or SHAPES, batches or BATCHES
    torch.manual_seed(0)
    copied = _copy_rate(place, footprint, turns)
    rows: list[dict[str, Any]] = []
    found: dict[str, Any] = {}
    with (progress or Silent()).task("bench kernels", len(chosen) * len(shapes)) as bar:
        for shape in shapes:
            dense = _circle(partial(torch.randn, shape, dtype=torch.bfloat16, device=place), footprint)
            for name in chosen:
                layout = MAKERS[name](*shape).to(place)
                layouts = _copies(layout, footprint)
                for batch in batches:
                    x = torch.randn(batch, shape[1], dtype=torch.bfloat16, device=place)
                    if tune:
                        found |= _tune(x, layouts, turns)
                    rows.append(_row(name, x, layouts, dense, copied, turns))
                bar.advance()
    return {
        "device": torch.cuda.get_device_name(place) if place.type == "cuda" else "cpu",
        "torch": torch.__version__,
        "copy_gigabytes_per_second": copied / 1e9,
        "footprint": footprint,
        "products": rows,
        "tuned": found,
    }


def seconds(calls: Calls, device: torch.device, turns: int) -> float:
    """The median time of one call."""
    for call in calls:
        call()  # compiles, and allocates
    if device.type != "cuda":
        taken = []
        for _ in range(turns):
            started = time.perf_counter()
            for call in calls:
                call()
            taken.append(time.perf_counter() - started)
        return statistics.median(taken) / len(calls)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for call in calls:
            call()
    events = [(torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)) for _ in range(turns)]
    graph.replay()
    for begin, end in events:
        begin.record()
        graph.replay()
        end.record()
    torch.cuda.synchronize(device)
    return statistics.median(begin.elapsed_time(end) for begin, end in events) / 1e3 / len(calls)


def _copy_rate(device: torch.device, footprint: int, turns: int) -> float:
    """Bytes a second that a copy reads and writes."""
    source = torch.ones(footprint // 8, device=device)
    target = torch.empty_like(source)
    return 2 * source.nbytes / seconds([partial(target.copy_, source)], device, turns)


def _row(
    name: str, x: torch.Tensor, layouts: list[Layout], dense: list[torch.Tensor], copied: float, turns: int
) -> dict[str, Any]:
    layout, (n, m), batch = layouts[0], layouts[0].shape, len(x)
    packed = sum(tensor.nbytes for tensor in layout.buffers())
    own = seconds([partial(kernels.matmul, x, one) for one in layouts], x.device, turns)
    rival = seconds([partial(F.linear, x, W) for W in dense], x.device, turns)
    truth = x.double() @ layout.dequantize().double().T
    return {
        "matrix": name,
        "layout": layout.kind,
        "shape": [n, m],
        "batch": batch,
        "bits_per_weight": 8 * packed / (n * m),
        "microseconds": own * 1e6,
        "gigabytes_per_second": packed / own / 1e9,
        "share_of_copy": packed / own / copied,
        "teraflops": 2 * batch * n * m / own / 1e12,
        "times_faster_than_bf16": rival / own,
        "error": float((kernels.matmul(x, layout).double() - truth).norm() / truth.norm()),
    }


def _tune(x: torch.Tensor, layouts: list[Layout], turns: int) -> dict[str, Any]:
    """The fastest blocks for this layout, kept; nothing where other kernels do the product, or two matrices make it."""
    gpu = dispatch.triton_kernels()
    if gpu is None or len(layouts[0].chains()[0]) > 1 or kernels.cuda.matmul(x, layouts[0]) is not None:
        return {}
    from signbit.kernels.triton import tuning

    def taken(blocks: tuning.Blocks) -> float | None:
        try:
            return seconds([partial(gpu.matmul, x, layout, blocks) for layout in layouts], x.device, turns)
        except gpu.OutOfResources:
            return None

    found = tuning.tune(layouts[0].kind, layouts[0].shape, len(x), tuning.architecture(x.device), taken)
    tuning.remember(found)
    return found


def _copies(layout: Layout, footprint: int) -> list[Layout]:
    nbytes = sum(tensor.nbytes for tensor in layout.buffers())
    return [
        layout,
        *(
            type(layout).around(layout.spec, [tensor.clone() for tensor in layout.buffers()])
            for _ in range(math.ceil(footprint / nbytes) - 1)
        ),
    ]


def _circle(make: Callable[[], torch.Tensor], footprint: int) -> list[torch.Tensor]:
    first = make()
    return [first, *(make() for _ in range(math.ceil(footprint / first.nbytes) - 1))]
