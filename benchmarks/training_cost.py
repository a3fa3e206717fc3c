"""What training latent weights costs beside distilling the same model without quantization, in time and in memory.

    python benchmarks/training_cost.py MODEL START [--seqlen 512] [--micro-batch 4] [--steps 3] [--rounds 3]

START is a checkpoint of MODEL that can be trained (docs/training.md). Both students go through the same loop, losses
and optimizer, with the same teacher; the dense one trains the same matrices as they are. Rounds alternate, so that
both see the same machine: the ratio is that of the medians of the steps. Memory is the peak of a process of its own.
"""

from __future__ import annotations

import argparse
import math
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch

from signbit.architectures import find_blocks, linears_of
from signbit.inference import open_model
from signbit.precision import autocast, uses_bfloat16
from signbit.processes import Processes
from signbit.progress import Silent
from signbit.source import open_source
from signbit.training.data import FILE, Windows
from signbit.training.latent import LatentLinear
from signbit.training.loop import Loop, Trainable
from signbit.training.options import TrainingOptions
from signbit.training.states import Head, StatesOf
from signbit.training.student import make_student
from signbit.training.teacher import Teacher

KINDS = ("dense", "latent")


def loop_of(kind: str, arguments: argparse.Namespace, directory: Path, seconds: list[float]) -> Loop:
    """A loop that appends each step's time to ``seconds``."""
    options = TrainingOptions(
        steps=arguments.steps, batch=arguments.micro_batch, micro_batch=arguments.micro_batch, heldout=0
    )
    processes = Processes("cpu" if not torch.cuda.is_available() else "cuda")
    device = processes.device
    dtype = torch.bfloat16 if uses_bfloat16(options.precision, device) else torch.float32
    source = open_source(arguments.model)
    blocks = find_blocks(source.skeleton)[0]
    if kind == "latent":
        model = make_student(Path(arguments.start), source, options, device, False)
    else:
        model = open_model(arguments.model, device=device.type, dtype=torch.float32)[0].requires_grad_(False)
        for block in find_blocks(model)[1]:
            for linear in linears_of(block).values():
                linear.weight.requires_grad_()
    scales = {id(one) for module in model.modules() if isinstance(module, LatentLinear) for one in module.scales()}
    trained = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    original, _ = open_model(arguments.model, device=device.type, dtype=dtype)
    teacher = Teacher(
        StatesOf(original.requires_grad_(False), blocks, hidden=True),
        Head(original, dtype),
        autocast(options.precision, device),
        None,
    )
    states = StatesOf(model, blocks, hidden=True)
    of_scales = {name for name, parameter in trained.items() if id(parameter) in scales}
    student = Trainable(states, Head(model, dtype), trained, of_scales, dict.fromkeys(trained, math.inf))
    last = time.perf_counter()

    def note(name: str, value: float, step: int) -> None:
        nonlocal last
        now = time.perf_counter()
        if name == "loss" and step > 1:  # from step to step: the first has none before it
            seconds.append(now - last)
        if name == "loss":
            last = now

    windows = Windows(directory, arguments.seqlen, 0, 0)
    return Loop(student, teacher, windows, options, processes, directory, Silent(), note)


def measure_memory(arguments: argparse.Namespace) -> None:
    with tempfile.TemporaryDirectory() as folder:
        write_text(Path(folder), arguments)
        loop_of(arguments.only, arguments, Path(folder), []).run(None)
    print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024)


def write_text(directory: Path, arguments: argparse.Namespace) -> None:
    """Random ids: what is computed does not depend on them."""
    count = arguments.steps * arguments.micro_batch * arguments.seqlen
    ids = torch.randint(0, 1000, (count,), generator=torch.Generator().manual_seed(0), dtype=torch.int32)
    (directory / FILE).write_bytes(ids.numpy().tobytes())


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("model")
    parser.add_argument("start")
    parser.add_argument("--seqlen", type=int, default=512)
    parser.add_argument("--micro-batch", type=int, default=4)
    parser.add_argument("--steps", type=int, default=3, help="in a round")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--only", choices=KINDS, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.only:
        measure_memory(arguments)
        return
    seconds: dict[str, list[float]] = {kind: [] for kind in KINDS}
    with tempfile.TemporaryDirectory() as folder:
        write_text(Path(folder), arguments)
        for _ in range(arguments.rounds):
            for kind in KINDS:
                loop_of(kind, arguments, Path(folder), seconds[kind]).run(None)
    tokens = arguments.micro_batch * arguments.seqlen
    peaks = {}
    for kind in KINDS:
        command = [sys.executable, *sys.argv, "--only", kind]
        peaks[kind] = int(subprocess.run(command, check=True, capture_output=True, text=True).stdout.split()[-1])
    print(f"{'':8}{'seconds a step':>16}{'tokens/s':>12}{'ratio':>8}{'peak GiB':>12}{'ratio':>8}")
    medians = {kind: statistics.median(values) for kind, values in seconds.items()}
    for kind, median in medians.items():
        time_ratio, memory_ratio = median / medians["dense"], peaks[kind] / peaks["dense"]
        print(
            f"{kind:8}{median:16.2f}{tokens / median:12.0f}{time_ratio:8.3f}"
            f"{peaks[kind] / 2**30:12.2f}{memory_ratio:8.3f}"
        )


if __name__ == "__main__":
    main()
