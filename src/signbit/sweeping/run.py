"""A sweep: every trial of a grid that is not finished, and all results side by side.

DIR/trials/NAME/           one trial each (trial.py)
DIR/results.csv, .json     a row for each trial: bits, perplexities, divergences, tasks; or why it failed
DIR/MODEL.html             signbit compare's page of a model and all that was made of it
DIR/answers/               what models answered, so that the page asks nothing again
"""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from signbit.errors import SignbitError
from signbit.progress import Progress, Silent
from signbit.report.compare import compare
from signbit.report.measure import labels_of
from signbit.safetensors_file import write_text
from signbit.sweeping.executors import Executor, LocalExecutor, RayExecutor
from signbit.sweeping.grid import Grid, read_grid, trials_of
from signbit.sweeping.trial import Outcome, Trial


def sweep(
    grid: str | Path,
    out: str | Path,
    *,
    jobs: int = 1,
    ray: str | None = None,
    progress: Progress | None = None,
) -> list[dict[str, Any]]:
    """Quantize and evaluate all that the YAML file ``grid`` stands for, into the directory ``out``.

    jobs: trials at a time. ray: the address of a Ray cluster to run them on, "auto" for the one that this machine is
    part of, "here" for one of its own; None: this machine. What ``out`` holds from an earlier sweep is not done again.
    Returns the rows of results.json. Raises SignbitError for a grid that makes no sense, and after all else is done if
    trials have failed.
    """
    progress = progress or Silent()
    directory = Path(out).expanduser().resolve()
    chosen = read_grid(Path(grid))
    if jobs < 1:
        raise SignbitError(f"{jobs} trials at a time: give at least 1")
    if not directory.parent.is_dir() or (directory.exists() and not directory.is_dir()):
        raise SignbitError(f"{directory} is no directory and cannot become one: choose another")
    trials = trials_of(chosen, directory)
    missing = [trial for trial in trials if trial.result() is None]
    failures: dict[str, Outcome] = {}
    if missing:
        executor = LocalExecutor(jobs) if ray is None else RayExecutor(ray, jobs, chosen.gpus)
        directory.mkdir(exist_ok=True)
        failures = _run(executor, missing, chosen.retries, progress)
    rows = [_row(trial, failures.get(trial.name)) for trial in trials]
    write_text(directory / "results.json", json.dumps(rows, indent=1) + "\n")
    write_text(directory / "results.csv", _csv(rows))
    _write_pages(chosen, [trial for trial in trials if trial.name not in failures], directory, progress)
    if failures:
        for name, outcome in failures.items():
            progress.note(f"{name} failed: {outcome.failure}")
        raise SignbitError(
            f"{len(failures)} of {len(trials)} trials failed, the first: {next(iter(failures.values())).failure}. "
            "The others are kept; the same command tries again what is missing"
        )
    return rows


def _run(executor: Executor, trials: Sequence[Trial], retries: int, progress: Progress) -> dict[str, Outcome]:
    """Perform all, those that fail again; what failed for good, by name."""
    failures: dict[str, Outcome] = {}
    with progress.task("trials", len(trials)) as task:
        left = list(trials)
        for more in range(retries, -1, -1):
            again = []
            for trial, outcome in executor.run(left):
                if outcome.failure is None:
                    task.advance()
                elif more and not outcome.final:
                    progress.note(f"{trial.name}: {outcome.failure}; it is tried again")
                    again.append(trial)
                else:
                    failures[trial.name] = outcome
                    task.advance()
            left = again
    return failures


def _row(trial: Trial, failed: Outcome | None) -> dict[str, Any]:
    """One line of the results; the same first keys for all."""
    row: dict[str, Any] = {"trial": trial.name, "model": trial.model, "recipe": trial.label, "seed": trial.seed}
    found = trial.result()
    row["failure"] = failed.failure if failed is not None else None
    if found is None:
        return row
    row |= {key: found[key] for key in ("bits_per_weight", "nominal_bits_per_weight", "file_bytes", "seconds")}
    evaluation = found["evaluation"]
    row |= {f"perplexity {text}": value for text, value in evaluation.get("perplexity", {}).items()}
    row |= {f"kl {text}": value["kl"] for text, value in evaluation.get("divergence", {}).items()}
    for task, metrics in evaluation.get("tasks", {}).items():
        row |= {f"{task} {metric}": value for metric, value in metrics.items() if metric != "n"}
    return row


def _csv(rows: list[dict[str, Any]]) -> str:
    text = io.StringIO()
    writer = csv.DictWriter(text, list(dict.fromkeys(key for row in rows for key in row)), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()


def _write_pages(grid: Grid, trials: Sequence[Trial], directory: Path, progress: Progress) -> None:
    """A page for each model, since divergence is from it. All has been measured but the originals."""
    models = list(dict.fromkeys(trial.model for trial in trials))
    for model, label in zip(models, labels_of(models), strict=True):
        checkpoints = [trial.checkpoint for trial in trials if trial.model == model]
        wanted = grid.evaluate.absolute()
        compare(
            [model, *checkpoints],
            directory / f"{label.replace('/', '-')}.html",
            perplexity=wanted.perplexity or None,
            seqlen=wanted.seqlen,
            windows=wanted.windows,
            tasks=wanted.tasks,
            task_data=wanted.task_data,
            limit=wanted.limit,
            cache=directory / "answers",
            against=model,
            speed=False,
            progress=progress,
        )
