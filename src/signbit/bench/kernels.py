"""``signbit bench kernels``: products with packed weights against what memory allows, and against dense products.

At batch 1 a product reads every byte of its matrix once and does little with it, so the measure is the streaming read:
how many bytes a second this machine delivers, to as many threads, in the same turn. Matrices are gone through in a
circle that is larger than any cache, as the layers of a model are.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from signbit import kernels
from signbit.bench.random_layouts import MAKERS
from signbit.bench.timing import Contestant, take_turns, times_faster
from signbit.errors import SignbitError
from signbit.kernels import cpu, reference
from signbit.layouts import Layout
from signbit.progress import Progress, Silent

SHAPES = [(4096, 4096), (11008, 4096), (4096, 11008)]
SWITCH_BATCHES = [1, 2, 4, 8, 16, 32, 64, 128, 256, 512]
# More than the last-level caches of current servers, of which a guest may have more than its share.
FOOTPRINT = 600 << 20
# The packed products that are checked against the reference are of so many rows.
_CHECKED_ROWS = 256


@torch.inference_mode()
def bench_kernels(
    *,
    names: Sequence[str] = (),
    shapes: Sequence[tuple[int, int]] = (),
    batches: Sequence[int] = (),
    switch_over: bool = False,
    turns: int = 9,
    seconds: float = 0.02,
    footprint: int = FOOTPRINT,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Time random matrices of each kind (``MAKERS``) and shape (rows, columns), batch by batch.

    switch_over: also look for the batch from which unpacking a tile of rows and a dense product is faster. turns,
    seconds: how often each contestant has its turn, and for how long. footprint: bytes that each goes through.
    """
    for name in names:
        if name not in MAKERS:
            raise SignbitError(f"no kind of matrix is called {name!r}: known are {', '.join(MAKERS)}")
    if any(min(shape) < 1 for shape in shapes) or any(batch < 1 for batch in batches):
        raise SignbitError("shapes and batches are at least 1")
    chosen, shapes, batches = names or list(MAKERS), shapes or SHAPES, batches or [1]
    timed = partial(take_turns, turns=turns, at_least=seconds)
    torch.manual_seed(0)
    rows, crossings = [], []
    with (progress or Silent()).task("bench kernels", len(chosen) * len(shapes)) as bar:
        for shape in shapes:
            rivals = _dense(shape, footprint)
            for name in chosen:
                layout = MAKERS[name](*shape)
                layouts = _copies(layout, footprint)
                for batch in batches:
                    rows += _bench(name, layouts, rivals, batch, timed, footprint)
                if switch_over and cpu.has_kernel(layout):
                    crossings.append(_find_switch(name, layouts, timed))
                bar.advance()
    return {**environment(), "footprint": footprint, "products": rows, "switch_over": crossings}


def environment() -> dict[str, Any]:
    """What does the work."""
    return {
        "instruction_set": cpu.instruction_set(),
        "thread_pool": cpu.thread_pool(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
    }


def _bench(
    name: str,
    layouts: list[Layout],
    rivals: dict[str, list[Tensor]],
    batch: int,
    timed: Callable[[Sequence[Contestant]], None],
    footprint: int,
) -> list[dict[str, Any]]:
    """Rows of the table: the matrix with exact and with 8-bit activations."""
    n, m = layouts[0].shape
    packed = sum(tensor.nbytes for tensor in layouts[0].buffers())
    x = torch.randn(batch, m)
    exact, int8 = (
        Contestant(mode, [partial(kernels.matmul, x, layout, int8=mode == "int8") for layout in layouts])
        for mode in ("exact", "int8")
    )
    dense = {
        kind: Contestant(kind, [partial(F.linear, x.to(weights[0].dtype), weight) for weight in weights])
        for kind, weights in rivals.items()
    }
    stream, read = _stream(footprint)
    timed([stream, exact, int8, *dense.values()])
    return [
        {
            "matrix": name,
            "layout": layouts[0].kind,
            "shape": [n, m],
            "batch": batch,
            "activations": one.name,
            "kernel": cpu.has_kernel(layouts[0]),
            "bits_per_weight": 8 * packed / (n * m),
            "microseconds": one.median * 1e6,
            "weights_per_second": batch * n * m / one.median,
            "gigabytes_per_second": packed / one.median / 1e9,
            "stream_gigabytes_per_second": read / stream.median / 1e9,
            "share_of_stream": times_faster(one, stream) * packed / read,
            **{f"times_faster_than_{kind}": times_faster(one, rival) for kind, rival in dense.items()},
            "error": _error(layouts[0], x, one.name == "int8"),
        }
        for one in (exact, int8)
    ]


def _error(layout: Layout, x: Tensor, int8: bool) -> float:
    """Of the first rows of a product, against sums in float64, relative to the product."""
    rows = slice(0, min(_CHECKED_ROWS, layout.shape[0]))
    truth = x.double() @ layout.dequantize(rows).double().T
    difference = kernels.matmul(x, layout, int8=int8)[:, rows].double() - truth
    return float(difference.norm() / truth.norm())


def _find_switch(name: str, layouts: list[Layout], timed: Callable[[Sequence[Contestant]], None]) -> dict[str, Any]:
    """Microseconds of both ways at each batch, and the first batch at which unpacking is faster."""
    tried: list[dict[str, Any]] = []
    for batch in SWITCH_BATCHES:
        x = torch.randn(batch, layouts[0].shape[1])
        packed = Contestant("packed", [partial(cpu.matmul, x, layout, False) for layout in layouts])
        unpacked = Contestant("unpacked", [partial(reference.matmul, x, layout) for layout in layouts])
        timed([packed, unpacked])
        ratio = times_faster(packed, unpacked)
        tried.append({"batch": batch, "packed": packed.median * 1e6, "unpacked": unpacked.median * 1e6, "ratio": ratio})
    first = next((one["batch"] for one in tried if one["ratio"] < 1), None)
    return {"matrix": name, "shape": list(layouts[0].shape), "unpacked_is_faster_from": first, "batches": tried}


def _copies(layout: Layout, footprint: int) -> list[Layout]:
    nbytes = sum(tensor.nbytes for tensor in layout.buffers())
    return [
        layout,
        *(
            type(layout).around(layout.spec, [tensor.clone() for tensor in layout.buffers()])
            for _ in range(math.ceil(footprint / nbytes) - 1)
        ),
    ]


def _dense(shape: tuple[int, int], footprint: int) -> dict[str, list[Tensor]]:
    dense = {}
    for kind, dtype in (("bf16", torch.bfloat16), ("fp32", torch.float32)):
        count = math.ceil(footprint / (math.prod(shape) * dtype.itemsize))
        dense[kind] = [torch.randn(shape).to(dtype) for _ in range(count)]
    return dense


def _stream(footprint: int) -> tuple[Contestant, int]:
    """The streaming read, and how many bytes one call reads."""
    pieces = torch.ones(footprint // 4).split(4 << 20)
    whole = [piece for piece in pieces if len(piece) == len(pieces[0])]
    read = cpu.stream if cpu.instruction_set() else torch.sum
    return Contestant("stream", [partial(read, piece) for piece in whole]), pieces[0].nbytes
