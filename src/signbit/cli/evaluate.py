"""``signbit eval``."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from signbit import console
from signbit.cli import options as shared
from signbit.evaluation import evaluate
from signbit.evaluation.groups import GROUPS


def _parse_names(ctx: Any, option: Any, lists: tuple[str, ...]) -> list[str]:
    names = [name.strip() for names in lists for name in names.split(",")]
    if not all(names):
        raise click.BadParameter("names are separated by commas, as piqa,boolq")
    return list(dict.fromkeys(names))


def evaluation_options(command: Any) -> Any:
    """What eval and compare have in common: what is scored, and how."""
    options = [
        click.option(
            "--perplexity", multiple=True, metavar="SOURCE", help="Text to score; may be given more than once."
        ),
        click.option("--seqlen", type=int, default=2048, show_default=True, help="Tokens in a window."),
        click.option("--windows", type=int, help="Only the first so many windows."),
        click.option(
            "--tasks",
            multiple=True,
            callback=_parse_names,
            metavar="NAME,...",
            help=f"Tasks of lm-evaluation-harness, or a paper's: {', '.join(GROUPS)}.",
        ),
        click.option(
            "--task-data", type=click.Path(path_type=Path), help="Directory with the benchmarks' files, not the hub."
        ),
        click.option("--limit", type=int, help="Only the first so many rows of each task."),
        click.option("--cache", type=click.Path(path_type=Path), help="Where answers to tasks are kept."),
        click.option("--fresh", is_flag=True, help="Ask again what was answered before."),
        shared.device,
        shared.activations,
        shared.trust,
        shared.json_option,
    ]
    for option in reversed(options):
        command = option(command)
    return command


@click.command("eval")
@click.argument("model")
@click.option("--against", metavar="ORIGINAL", help="Also the divergence from this model.")
@evaluation_options
def eval_command(model: str, perplexity: tuple[str, ...], json_file: str | None, **options: Any) -> None:
    """Perplexity of MODEL, its divergence from the original, and its accuracy on tasks.

    Perplexity is on wikitext2 unless a text or a task is named.
    """
    shared.check_json(json_file)
    result = evaluate(model, perplexity=perplexity or None, progress=console.ConsoleProgress(), **options)
    for source, value in result["perplexity"].items():
        line = f"perplexity on {source}: {value:,.4g} ({result['tokens'][source]:,} tokens)"
        if "divergence" in result:
            divergence = result["divergence"][source]
            line += f", the original's {result['original_perplexity'][source]:,.4g}, KL {divergence['kl']:.4f}"
            line += f", same top token {divergence['top1_agreement']:.1%}"
        console.console.print(line)
    if result["tasks"]:
        console.console.print(console.tasks_table(result))
    shared.write_json(result, json_file)
