"""The same quantization by one process and by several: do they make the same checkpoint, up to the order of sums?

    python benchmarks/processes.py [--model 4x256x704] [--processes 2] [--recipes billm stbllm] [--samples 8]

A random model of LAYERSxHIDDENxINTERMEDIATE is written to disk. Each recipe is run on it by one process, by torchrun,
and, to compare with, by one process whose calibration text goes through the blocks in smaller batches, which is nothing
but another order of sums. CPU, one thread a process. The table has |Q' - Q| / |Q| of the first block's linears and of
all, Q being the matrices that the one process made, and the mean output errors. Now and then another sum turns a sign
or moves a salient column, and what comes after, later blocks above all, goes by it.
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from unittest import mock

import torch

import signbit
from scaling import random_text, write_model
from signbit.blockwise import calibrate
from signbit.modules import QuantizedLinear
from signbit.report.quantization import QuantizationReport

SEQLEN = 256


def quantize(model: Path, recipe: signbit.Recipe, out: Path, tokens_per_call: int) -> None:
    torch.set_num_threads(1)
    with mock.patch.dict(calibrate._TOKENS_PER_CALL, cpu=tokens_per_call):
        signbit.quantize(model, out, recipe, device="cpu")


def quantize_together(model: Path, name: str, out: Path, samples: int, processes: int) -> None:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)]
    command += ["-m", "signbit", "quantize", str(model), "--out", str(out), "--recipe", name, "--device", "cpu"]
    command += ["--calib", str(model / "text.txt"), "--samples", str(samples), "--seqlen", str(SEQLEN)]
    subprocess.run(command, check=True, env={**os.environ, "OMP_NUM_THREADS": "1"})


def differences(wanted: Path, found: Path) -> str:
    """|Q' - Q| / |Q| of the first block and of all."""
    models = [signbit.load(path)[0] for path in (wanted, found)]
    error, power = [0.0, 0.0], [0.0, 0.0]
    for (name, a), (_, b) in zip(models[0].named_modules(), models[1].named_modules(), strict=True):
        if isinstance(a, QuantizedLinear):
            matrix = a.packed.dequantize()
            for i in (0, 1) if ".layers.0." in name else (1,):
                error[i] += float((b.packed.dequantize() - matrix).square().sum())
                power[i] += float(matrix.square().sum())
    return ", ".join(f"{(e / p) ** 0.5:.1e}" for e, p in zip(error, power, strict=True))


def output_error(checkpoint: Path) -> str:
    report = QuantizationReport.read(checkpoint)
    assert report is not None
    return f"{statistics.fmean(layer.output_error for layer in report.layers if layer.output_error is not None):.5f}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="4x256x704")
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--recipes", nargs="+", default=["billm", "stbllm"])
    parser.add_argument("--samples", type=int, default=8)
    arguments = parser.parse_args()
    print(f"| recipe | {arguments.processes} processes: first block, all | smaller batches | output errors |")
    print("|---|---|---|---|", flush=True)
    with tempfile.TemporaryDirectory() as folder:
        model = Path(folder, "model")
        model.mkdir()
        write_model(model, *map(int, arguments.model.split("x")))
        (model / "text.txt").write_text(random_text())
        given = {"calib": str(model / "text.txt"), "samples": arguments.samples, "seqlen": SEQLEN}
        for name in arguments.recipes:
            recipe = signbit.Recipe.load(name, given)
            one, several, control = (
                Path(folder, f"{Path(name).stem}-{kind}") for kind in ("one", "several", "control")
            )
            quantize(model, recipe, one, tokens_per_call=4096)
            quantize_together(model, name, several, arguments.samples, arguments.processes)
            quantize(model, recipe, control, tokens_per_call=3 * SEQLEN)
            errors = ", ".join(map(output_error, (one, several, control)))
            cells = [Path(name).stem, differences(one, several), differences(one, control), errors]
            print(f"| {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    main()
