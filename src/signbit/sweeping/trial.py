"""One trial: a model quantized by a recipe, and measured. Two commands that could be typed as well,

    signbit quantize MODEL --recipe recipe.yaml --out checkpoint --resume         (or train)
    signbit compare checkpoint --against MODEL --json ... --cache ../../answers

each in a process of its own: what one trial does to its process, be it to die, is nothing to the others. In its
directory:

    recipe.yaml     all of the recipe
    checkpoint/     what it made of the model
    report.html     what was measured, as a page
    result.json     the same for programs; while it is there, for the same evaluation, the trial is finished
    log.txt         what both commands said
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from signbit.errors import SignbitError
from signbit.safetensors_file import write_text

_BAD_INPUT = 2


@dataclass(frozen=True)
class Trial:
    """name: also its directory's; label: the recipe's; recipe: in full; command: quantize or train; evaluation: the
    keys of the grid's ``evaluate``; answers: where what models answered is kept, for all trials; cpus: threads."""

    name: str
    model: str
    label: str
    seed: int
    recipe: dict[str, Any]
    command: str
    evaluation: dict[str, Any]
    directory: Path
    answers: Path
    cpus: int

    @property
    def checkpoint(self) -> Path:
        return self.directory / "checkpoint"

    def result(self) -> dict[str, Any] | None:
        """What was measured, as ``signbit compare --json`` has it of one model, and ``seconds``; None before that."""
        try:
            kept = json.loads((self.directory / "result.json").read_text(encoding="utf-8"))
        except FileNotFoundError:
            return None
        except ValueError as error:
            raise SignbitError(f"{self.directory / 'result.json'} is damaged: remove it") from error
        result: dict[str, Any] = kept["result"]
        return result if kept["evaluation"] == self.evaluation else None


@dataclass(frozen=True)
class Outcome:
    """What came of trying: ``failure`` is None, or why it failed, in one line; ``final``: it would fail again."""

    failure: str | None = None
    final: bool = False


def perform(trial: Trial) -> Outcome:
    """Run a trial to its end, going on from what an earlier try has left."""
    try:
        trial.directory.mkdir(parents=True, exist_ok=True)
        trial.answers.mkdir(exist_ok=True)
        write_text(trial.directory / "recipe.yaml", yaml.safe_dump(trial.recipe, sort_keys=False))
        started = time.monotonic()
        failed = _run(trial, _making(trial))
        seconds = time.monotonic() - started
        failed = failed or _run(trial, _measuring(trial))
        if failed is None:
            found = json.loads((trial.directory / "compare.json").read_text(encoding="utf-8"))
            result = {**found["models"][0], "seconds": round(seconds, 1)}
            write_text(trial.directory / "result.json", json.dumps({"evaluation": trial.evaluation, "result": result}))
            (trial.directory / "compare.json").unlink()
    except OSError as error:
        return Outcome(f"{error.filename or trial.directory}: {error.strerror or error}")
    return failed or Outcome()


def _making(trial: Trial) -> list[str]:
    recipe = str(trial.directory / "recipe.yaml")
    return [trial.command, "--recipe", recipe, "--out", str(trial.checkpoint), "--resume", "--", trial.model]


def _measuring(trial: Trial) -> list[str]:
    wanted = trial.evaluation
    arguments = ["compare", "--out", str(trial.directory / "report.html"), "--against", trial.model, "--no-speed"]
    arguments += ["--json", str(trial.directory / "compare.json"), "--cache", str(trial.answers)]
    for key in ("seqlen", "windows", "limit", "task_data"):
        if wanted[key] is not None:
            arguments += [f"--{key.replace('_', '-')}", str(wanted[key])]
    for text in wanted["perplexity"]:
        arguments += ["--perplexity", text]
    for task in wanted["tasks"]:
        arguments += ["--tasks", task]
    return [*arguments, "--", str(trial.checkpoint)]


def _run(trial: Trial, arguments: list[str]) -> Outcome | None:
    """Run one command; None if all went well."""
    environment = {**os.environ, "OMP_NUM_THREADS": str(trial.cpus)}
    with (trial.directory / "log.txt").open("a+", encoding="utf-8", errors="replace") as log:
        begun = log.seek(0, os.SEEK_END)
        command = [sys.executable, "-m", "signbit", *arguments]
        status = subprocess.run(
            command, stdin=subprocess.DEVNULL, stdout=log, stderr=log, env=environment, check=False
        ).returncode
        log.seek(begun)
        said = [line.removeprefix("signbit: ").strip() for line in log if line.startswith("signbit: ")]
    if status == 0:
        return None
    if status < 0:
        return Outcome(f"{arguments[0]} was ended by {signal.Signals(-status).name}")
    reason = said[-1] if said else f"status {status}, see log.txt"
    return Outcome(f"{arguments[0]}: {reason}", final=status == _BAD_INPUT)
