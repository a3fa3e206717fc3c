"""The command line: parses, calls the API, prints.

Output for people goes to stderr; ``--json FILE`` writes one JSON object, to stdout when FILE is ``-``. Exit status: 0
done; 2 bad usage or bad input, with one line that says what and what to do; 1 an internal failure.
"""

from __future__ import annotations

import json
import sys
import traceback
from pathlib import Path
from typing import Any

import click
import huggingface_hub
import transformers

from signbit import accounting, console, inference
from signbit.bench import MAKERS, bench_decode, bench_kernels, tables
from signbit.errors import SignbitError
from signbit.evaluation import evaluate
from signbit.methods import METHODS
from signbit.modules import ACTIVATIONS
from signbit.pipeline import quantize
from signbit.recipe import CommonOptions, Recipe, parse_overrides, presets
from signbit.report.quantization import QuantizationReport
from signbit.safetensors_file import write_text
from signbit.training.options import TrainingOptions
from signbit.training.processes import is_first_process
from signbit.training.run import export_snapshot, train
from signbit.version import __version__

_device = click.option("--device", type=click.Choice(["auto", "cpu", "cuda"]), default="auto", show_default=True)
_trust = click.option("--trust-remote-code", is_flag=True, help="Run model code that comes with the model.")
_activations = click.option(
    "--activations",
    type=click.Choice(ACTIVATIONS),
    default="exact",
    show_default=True,
    help="int8 rounds what packed matrices are multiplied with, for speed (CPU kernels).",
)
_json = click.option("--json", "json_file", metavar="FILE", help="Write the result as JSON; - is stdout.")


@click.group(context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100})
@click.version_option(__version__, prog_name="signbit")
def app() -> None:
    """Large language models with about one bit a weight: quantized, stored and run that way.

    MODEL is a hub id, a directory, a signbit checkpoint, a .gguf file, or 'demo'.
    """


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
        _device,
        click.option("--resume", is_flag=True, help="Go on with an interrupted run of the same command."),
        click.option("--overwrite", is_flag=True, help="Replace OUT, or what is left of an interrupted run."),
        _trust,
    ]
    for option in reversed(options):
        command = option(command)
    return command


@app.command("quantize")
@_run_options
def quantize_command(model: str, out: Path, recipe: str | None, overrides: tuple[str, ...], **options: Any) -> None:
    """Quantize MODEL and write a checkpoint. The default recipe is billm."""
    chosen = Recipe.load(recipe or "billm", {**parse_overrides(overrides), **_shortcuts(options)})
    report = quantize(model, out, chosen, progress=console.ConsoleProgress(), **options)
    _print_report(report, out)


@app.command("train")
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


@app.command("eval")
@click.argument("model")
@click.option("--perplexity", multiple=True, metavar="SOURCE", help="Text to score; may be given more than once.")
@click.option("--seqlen", type=int, default=2048, show_default=True, help="Tokens in a window.")
@click.option("--windows", type=int, help="Only the first so many windows.")
@click.option("--against", metavar="ORIGINAL", help="Also the divergence from this model.")
@_device
@_activations
@_trust
@_json
def eval_command(model: str, perplexity: tuple[str, ...], json_file: str | None, **options: Any) -> None:
    """Perplexity of MODEL, and its divergence from the original."""
    if json_file is not None and not Path(json_file).parent.is_dir():
        raise SignbitError(f"{json_file} cannot be written: {Path(json_file).parent} does not exist")
    result = evaluate(model, perplexity=perplexity or ("wikitext2",), progress=console.ConsoleProgress(), **options)
    for source, value in result["perplexity"].items():
        line = f"perplexity on {source}: {value:,.4g} ({result['tokens'][source]:,} tokens)"
        if "divergence" in result:
            divergence = result["divergence"][source]
            line += f", the original's {result['original_perplexity'][source]:,.4g}, KL {divergence['kl']:.4f}"
            line += f", same top token {divergence['top1_agreement']:.1%}"
        console.console.print(line)
    _write_json(result, json_file)


@app.command("inspect")
@click.argument("model")
@_json
def inspect_command(model: str, json_file: str | None) -> None:
    """Bits per weight, itemised, counted from the files of MODEL."""
    result = accounting.inspect(model)
    for table in console.inspection_tables(result):
        console.console.print(table)
    if result["unquantized"]:
        console.console.print(console.unquantized_table(result["unquantized"]))
    _write_json(result, json_file)


@app.command("generate")
@click.argument("model")
@click.argument("prompt")
@click.option("--max-tokens", type=int, default=64, show_default=True)
@click.option("--temperature", type=float, default=0.0, show_default=True, help="0 is greedy.")
@click.option("--seed", type=click.IntRange(0, 2**63 - 1), default=0, show_default=True)
@_device
@_activations
@_trust
def generate_command(model: str, prompt: str, **options: Any) -> None:
    """Continue PROMPT with MODEL; the new text goes to stdout."""
    click.echo(inference.generate(model, prompt, **options))


@app.group("bench")
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
@_json
def bench_kernels_command(json_file: str | None, **options: Any) -> None:
    """Products with random packed matrices, against the speed of memory and dense products."""
    result = bench_kernels(progress=console.ConsoleProgress(), **options)
    for table in tables.kernel_tables(result):
        console.console.print(table)
    _write_json(result, json_file)


@bench_group.command("decode")
@click.argument("model")
@click.option("--against", metavar="ORIGINAL", help="Another model to take turns with, in bfloat16.")
@_activations
@click.option("--tokens", type=int, default=64, show_default=True)
@click.option("--prompt-tokens", type=int, default=32, show_default=True)
@_trust
@_json
def bench_decode_command(model: str, json_file: str | None, **options: Any) -> None:
    """MODEL writing: tokens per second, time to load, memory, and what the kernels take of it."""
    result = bench_decode(model, **options)
    for table in tables.decode_tables(result):
        console.console.print(table)
    _write_json(result, json_file)


@app.command("methods")
@_json
def methods_command(json_file: str | None) -> None:
    """Every method: its paper, its layout, its options with their defaults."""
    described = [
        {
            "name": method.name,
            "summary": method.summary,
            "paper": method.paper,
            "layout": method.layout.kind,
            "calibrated": method.calibrated,
            "options": _describe_options(method.options),
        }
        for method in METHODS.values()
    ]
    common, training = _describe_options(CommonOptions), _describe_options(TrainingOptions)
    for method in METHODS.values():
        console.console.print(f"{method.name}: {method.summary}\n  {method.paper}; layout {method.layout.kind}")
        _print_options(_describe_options(method.options))
    console.console.print("every recipe", style="bold")
    _print_options(common)
    console.console.print("training", style="bold")
    _print_options(training)
    console.console.print(f"presets: {', '.join(presets())}")
    result = {"methods": described, "common_options": common, "training_options": training, "presets": presets()}
    _write_json(result, json_file)


def _describe_options(model: Any) -> dict[str, dict[str, Any]]:
    return {
        name: {"default": model.model_fields[name].default, "description": model.model_fields[name].description}
        for name in model.model_fields
    }


def _print_options(options: dict[str, dict[str, Any]]) -> None:
    for name, option in options.items():
        console.console.print(f"    {name}={option['default']}  {option['description']}")


def _write_json(result: dict[str, Any], file: str | None) -> None:
    if file is None:
        return
    text = json.dumps(result, indent=2, allow_nan=False) + "\n"
    if file == "-":
        click.echo(text, nl=False)
        return
    path = Path(file)
    try:
        if path.exists() and not path.is_file():
            path.write_text(text, encoding="utf-8")  # a pipe or device is written to, never replaced
        else:
            write_text(path.resolve(), text)
    except OSError as error:
        raise SignbitError(f"{file} cannot be written: {error.strerror}") from error


def main(arguments: list[str] | None = None) -> int:
    """Run the command line; returns the exit status."""
    # Their progress bars and warnings are about things that signbit reports itself.
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    huggingface_hub.logging.set_verbosity_error()
    try:
        result = app.main(arguments, prog_name="signbit", standalone_mode=False)
        return result if isinstance(result, int) else 0
    except SignbitError as error:
        return _fail(str(error), 2)
    except click.exceptions.NoArgsIsHelpError as error:
        click.echo(error.format_message(), err=True)
        return 2
    except click.UsageError as error:
        return _fail(f"{error.format_message()} (signbit {_command(error)}--help shows the usage)", 2)
    except (click.Abort, KeyboardInterrupt):
        return _fail("interrupted", 130)
    except BrokenPipeError:
        return 1
    except Exception:
        traceback.print_exc()
        return _fail("internal error; please report it with the lines above", 1)


def _command(error: click.UsageError) -> str:
    name = error.ctx.info_name if error.ctx is not None and error.ctx.parent is not None else None
    return f"{name} " if name else ""


def _fail(message: str, status: int) -> int:
    click.echo(f"signbit: {' '.join(message.split())}", err=True)
    return status


if __name__ == "__main__":
    sys.exit(main())
