"""Compile every kernel for GPUs that need not be there: python compile_all.py [sm ...]; prints JSON, a row a kernel.

Run in a process of its own, where Triton's interpreter is off: products go as far as starting kernels, and are compiled
there instead. This catches what the interpreter lets through.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

sys.path[:0] = [str(Path(__file__).parents[1]), str(Path(__file__).parents[2])]

from choosing import random_rounding  # noqa: E402
from kernels.test_cpu import MAKERS  # noqa: E402
from signbit.kernels import triton as kernels  # noqa: E402
from signbit.kernels.triton import launch, partial, rounding  # noqa: E402

_TYPES = {
    torch.float32: "*fp32", torch.float16: "*fp16", torch.bfloat16: "*bf16", torch.uint8: "*u8", torch.int32: "*i32",
    torch.int64: "*i64",
}  # fmt: skip
NAMES = [
    "sign", "groups of 64", "groups of 7", "two planes", "column scales", "sign factors", "split in groups",
    "split bitmap, column scales", "Haar along rows", "Haar along columns, odd groups", "8 bits", "7 bits", "4 bits",
    "4 of 8", "5 of 8, one region", "2 of 5", "partial", "partial bitmap",
]  # fmt: skip
# The last one is unpacked for torch.
BATCHES = [(1, torch.float16), (8, torch.float32), (64, torch.bfloat16), (17, torch.float32), (200, torch.bfloat16)]


def compile_everything(targets: list[int]) -> list[dict[str, Any]]:
    found: dict[Any, dict[str, Any]] = {}
    made = ""

    def compile_instead(kernel: Any, grid: Any, arguments: Any, constants: dict[str, Any], blocks: Any) -> None:
        names = [name for name in kernel.arg_names if name not in constants]
        signature = {
            name: _TYPES[value.dtype] if isinstance(value, torch.Tensor) else "i32"
            for name, value in zip(names, arguments, strict=True)
        }
        key = (kernel.__module__, kernel.__name__, str(signature), str(constants))
        if key in found:
            return
        signature |= dict.fromkeys(constants, "constexpr")
        row = found[key] = {"layout": made, "kernel": f"{kernel.__module__.split('.')[-1]}.{kernel.__name__}"}
        row["blocks"] = {name: constants[name] for name in constants if name.startswith("BLOCK")}
        row["dot"] = str(constants.get("DOT"))
        for target in targets:
            source = ASTSource(kernel, signature, constants)
            options = {"num_warps": blocks.warps, "num_stages": blocks.stages}
            compiled = triton.compile(source, target=GPUTarget("cuda", target, 32), options=options)
            row[f"sm_{target}"] = resources(compiled)

    launch.start = partial.start = rounding.start = compile_instead  # type: ignore[attr-defined]
    for made in NAMES:
        layout = MAKERS[made](33, 576)
        for tokens, dtype in BATCHES:
            kernels.matmul(torch.zeros(tokens, 576, dtype=dtype), layout)
    made = "columns in turn"
    for even, each_weight, before in [(False, False, False), (False, True, True), (True, True, True)]:
        random_rounding(33, 128, even=even, each_weight=each_weight, before=before).run(kernels.round_in_turn)
    return list(found.values())


def resources(compiled: Any) -> dict[str, int]:
    """Bytes of shared memory; registers and bytes of the stack, to which they spill, as cuobjdump tells them."""
    told = {"shared": compiled.metadata.shared}
    tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    if tool.is_file():
        with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
            Path(file.name).write_bytes(compiled.asm["cubin"])
            text = subprocess.run([str(tool), "-res-usage", file.name], capture_output=True, text=True).stdout
        for name, pattern in (("registers", r"REG:(\d+)"), ("stack", r"STACK:(\d+)")):
            match = re.search(pattern, text)
            if match is not None:
                told[name] = int(match[1])
    return told


if __name__ == "__main__":
    json.dump(compile_everything([int(target) for target in sys.argv[1:]] or [80, 90]), sys.stdout)
