"""``signbit quantize`` and ``signbit train``: models in, packed checkpoints out."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from signbit import accounting, console
from signbit.cli import options as shared
from signbit.errors import SignbitError
from signbit.frontier import recipe_for
from signbit.pipeline import quantize
from signbit.processes import is_first_process
from signbit.recipe import Recipe, parse_overrides, presets
from signbit.report.quantization import QuantizationReport
from signbit.training.run import export_snapshot, train


def _run_options(command: Any) -> Any:
    """The options of quantize and train."""
    options = [
        click.argument("model"),
        click.option("--out", required=True, type=click.Path(path_type=Path), help="Directory of the new checkpoint."),
        click.option("--recipe", metavar="NAME", help=f"A preset ({', '.join(presets())}) or a YAML file."),
        click.option("--set", "overrides", multiple=True, metavar="KEY=VALUE", help="Override a key of the recipe."),
        click.option("--calib", metavar="SOURCE", help="wikitext2, c4, ptb, a .txt/.raw/.jsonl file, or self."),
        click.option("--samples", type=int, help="Calibration sequences."),
        click.option("--seqlen", type=int, help="Tokens in a sequence."),
        click.option("--seed", type=int),
        shared.device,
        click.option("--resume", is_flag=True, help="Go on with an interrupted run of the same command."),
        click.option("--overwrite", is_flag=True, help="Replace OUT, or what is left of an interrupted run."),
        shared.trust,
    ]
    for option in reversed(options):
        command = option(command)
    return command


@click.command("quantize")
@_run_options
@click.option("--bits", type=float, metavar="B", help="Instead of --recipe: the best known one for B bits a weight.")
def quantize_command(
    model: str, out: Path, recipe: str | None, overrides: tuple[str, ...], bits: float | None, **options: Any
) -> None:
    """Quantize MODEL and write a checkpoint. The default recipe is billm.

    Several processes: torchrun --nproc-per-node N -m signbit quantize ...
    """
    given = {**parse_overrides(overrides), **_shortcuts(options)}
    if bits is not None and recipe is not None:
        raise SignbitError("--bits chooses the recipe: leave out --recipe, or give it its bits by --set bits=B")
    chosen = Recipe.load(recipe or "billm", given) if bits is None else recipe_for(bits, given)
    report = quantize(model, out, chosen, progress=console.ConsoleProgress(), **options)
    if is_first_process():
        _print_report(report, out)


@click.command("train")
@_run_options
@click.option("--export", type=click.Path(path_type=Path), help="Only write the last snapshot of the run as this.")
@click.option("--tensorboard", type=click.Path(path_type=Path), help="Directory for logs of losses.")
def train_command(
    model: str,
    out: Path,
    recipe: str | None,
    overrides: tuple[str, ...],
    export: Path | None,
    tensorboard: Path | None,
    **options: Any,
) -> None:
    """Train the packed weights of MODEL by distillation and write a checkpoint. The default recipe is onebit.

    Several processes: torchrun --nproc-per-node N -m signbit train ...
    """
    given = {**parse_overrides(overrides), **_shortcuts(options)}
    if export is not None:
        _refuse_with_export(tensorboard, options)
    chosen = None if export and recipe is None and not given else Recipe.load(recipe or "onebit", given)
    progress = console.ConsoleProgress()
    if export is not None:
        own = {key: options[key] for key in ("overwrite", "trust_remote_code")}
        trained, out = export_snapshot(model, out, export, chosen, progress=progress, **own), export
    else:
        assert chosen is not None
        trained = train(model, out, chosen, tensorboard=tensorboard, progress=progress, **options)
    if is_first_process():
        _print_report(trained.report, out)
        console.console.print(console.training_table(trained.record))


def _refuse_with_export(tensorboard: Path | None, options: dict[str, Any]) -> None:
    """What says how to train has no say in writing a snapshot out."""
    given = {
        "--resume": options["resume"],
        "--tensorboard": tensorboard is not None,
        "--device": options["device"] != "auto",
    }
    for name, is_given in given.items():
        if is_given:
            raise SignbitError(f"{name} does not go with --export, which trains nothing: leave one of them out")


def _shortcuts(options: dict[str, Any]) -> dict[str, Any]:
    """Take the options that stand for keys of the recipe out of ``options``; those that are given."""
    shortcuts = {key: options.pop(key) for key in ("calib", "samples", "seqlen", "seed")}
    return {key: value for key, value in shortcuts.items() if value is not None}


def _print_report(report: QuantizationReport, out: Path) -> None:
    console.console.print(console.quantization_table(report))
    console.console.print(console.unquantized_table(report.unquantized))
    notes = console.notes_table(report)
    if notes is not None:
        console.console.print(notes)
    if report.seconds:
        console.console.print(console.seconds_table(report.seconds))
    for table in console.inspection_tables(accounting.inspect(out), per_layer=False):
        console.console.print(table)
