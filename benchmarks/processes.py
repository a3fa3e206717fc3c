"""The same quantization by one process and by several: do they make the same checkpoint?

    python benchmarks/processes.py [--model 6x256x704] [--processes 2] [--recipes billm stbllm] [--samples 8]

A random model of LAYERSxHIDDENxINTERMEDIATE is written to disk. Each recipe is run on it once by one process and once
by torchrun, on CPU, one thread a process. The table has the part of all weights that differ by more than a hundredth of
their size, and the mean output error of the linears, of one process and of several. Sums in another order turn a sign
now and then, and what comes after follows it.
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

import torch

import signbit
from scaling import random_text, write_model
from signbit.modules import QuantizedLinear
from signbit.report.quantization import QuantizationReport


def quantize(model: Path, recipe: str, out: Path, processes: int, samples: int) -> None:
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)]
    command = [sys.executable, *(launcher if processes > 1 else []), "-m", "signbit", "quantize", str(model)]
    command += ["--out", str(out), "--recipe", recipe, "--calib", str(model / "text.txt"), "--device", "cpu"]
    command += ["--samples", str(samples), "--seqlen", "256"]
    subprocess.run(command, check=True, env={**os.environ, "OMP_NUM_THREADS": "1"})


def different(one: Path, several: Path) -> float:
    """The part of the weights of the packed linears that are not the same."""
    models = [signbit.load(path)[0] for path in (one, several)]
    count = total = 0
    for a, b in zip(models[0].modules(), models[1].modules(), strict=True):
        if isinstance(a, QuantizedLinear):
            wanted = a.packed.dequantize()
            same = torch.isclose(b.packed.dequantize(), wanted, rtol=1e-2, atol=1e-6)
            count, total = count + int((~same).sum()), total + wanted.numel()
    return count / total


def output_error(checkpoint: Path) -> float:
    report = QuantizationReport.read(checkpoint)
    assert report is not None
    return statistics.fmean(layer.output_error for layer in report.layers if layer.output_error is not None)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="6x256x704")
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--recipes", nargs="+", default=["billm", "stbllm"])
    parser.add_argument("--samples", type=int, default=8)
    arguments = parser.parse_args()
    print(f"| recipe | weights that differ | output error, one process | {arguments.processes} processes |")
    print("|---|---|---|---|", flush=True)
    with tempfile.TemporaryDirectory() as folder:
        model = Path(folder, "model")
        model.mkdir()
        write_model(model, *map(int, arguments.model.split("x")))
        (model / "text.txt").write_text(random_text())
        for recipe in arguments.recipes:
            name = Path(recipe).stem
            made = {count: Path(folder, f"{name}-{count}") for count in (1, arguments.processes)}
            for count, out in made.items():
                quantize(model, recipe, out, count, arguments.samples)
            errors = [f"{output_error(out):.6f}" for out in made.values()]
            print(f"| {name} | {different(*made.values()):.4%} | {' | '.join(errors)} |", flush=True)


if __name__ == "__main__":
    main()
