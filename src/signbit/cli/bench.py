"""``signbit bench``."""

from __future__ import annotations

from typing import Any

import click

from signbit import console
from signbit.bench import MAKERS, bench_decode, bench_gpu, bench_kernels, tables
from signbit.cli import options as shared
from signbit.errors import SignbitError


@click.group("bench")
def bench_group() -> None:
    """How fast this machine is with packed weights."""


def _parse_shape(ctx: Any, option: Any, shapes: tuple[str, ...]) -> list[tuple[int, int]]:
    try:
        return [(int(rows), int(columns)) for rows, columns in (shape.split("x") for shape in shapes)]
    except ValueError as error:
        raise click.BadParameter("a shape is ROWSxCOLUMNS, as 11008x4096") from error


@bench_group.command("kernels")
@click.option("--matrix", "names", multiple=True, metavar="NAME", help=f"{', '.join(MAKERS)}; by default all.")
@click.option("--shape", "shapes", multiple=True, callback=_parse_shape, metavar="ROWSxCOLUMNS")
@click.option("--batch", "batches", type=int, multiple=True, help="Tokens at a time; 1 by default.")
@click.option("--switch-over", is_flag=True, help="Also: from which batch on unpacking is faster.")
@click.option("--device", default="cpu", show_default=True, help="cuda: the kernels for GPUs, batches 1, 8 and 2048.")
@click.option("--tune", is_flag=True, help="With --device cuda: find and keep the fastest tiles first.")
@shared.json_option
def bench_kernels_command(json_file: str | None, device: str, tune: bool, **options: Any) -> None:
    """Products with random packed matrices, against the speed of memory and dense products."""
    if device != "cpu":
        if options.pop("switch_over"):
            raise SignbitError("--switch-over is of the CPU kernels: leave it out with --device cuda")
        result = bench_gpu(device=device, tune=tune, progress=console.ConsoleProgress(), **options)
        console.console.print(tables.gpu_table(result))
        shared.write_json(result, json_file)
        return
    if tune:
        raise SignbitError("--tune is of the GPU kernels: add --device cuda")
    result = bench_kernels(progress=console.ConsoleProgress(), **options)
    for table in tables.kernel_tables(result):
        console.console.print(table)
    shared.write_json(result, json_file)


@bench_group.command("decode")
@click.argument("model")
@click.option("--against", metavar="ORIGINAL", help="Another model to take turns with, in bfloat16.")
@shared.activations
@click.option("--tokens", type=int, default=64, show_default=True)
@click.option("--prompt-tokens", type=int, default=32, show_default=True)
@shared.trust
@shared.json_option
def bench_decode_command(model: str, json_file: str | None, **options: Any) -> None:
    """MODEL writing: tokens per second, time to load, memory, and what the kernels take of it."""
    result = bench_decode(model, **options)
    for table in tables.decode_tables(result):
        console.console.print(table)
    shared.write_json(result, json_file)
