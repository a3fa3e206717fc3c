"""The arguments of a training, settled and checked."""

from __future__ import annotations

import hashlib
import importlib.util
from collections.abc import Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from signbit import checkpoint
from signbit.calibration.text import text_fingerprint
from signbit.errors import SignbitError
from signbit.journal import Journal
from signbit.processes import Processes
from signbit.progress import Progress
from signbit.recipe import Recipe
from signbit.report.quantization import QuantizationReport
from signbit.safetensors_file import files_of
from signbit.source import Source, open_source, resolve
from signbit.training.loop import accumulation_of
from signbit.training.options import TrainingOptions
from signbit.version import __version__


@dataclass(frozen=True)
class Run:
    """The arguments of a run, settled."""

    model: str
    out: Path
    recipe: Recipe
    options: TrainingOptions
    journal: Journal
    processes: Processes
    progress: Progress
    trust_remote_code: bool
    tensorboard: Path | None = None

    @property
    def start(self) -> Path:
        return self.journal.start_directory if self.options.start is None else resolve(self.options.start)

    @contextmanager
    def source(self) -> Iterator[Source]:
        with closing(open_source(self.model, trust_remote_code=self.trust_remote_code, beside=self.out)) as opened:
            yield opened


def from_start(recipe: Recipe) -> Recipe:
    """With ``start``, all that says how matrices came about and are stored is what that was made by.

    What the recipe leaves at its default follows the start; what it gives, itself or by its preset, must agree with it.
    Text and seed are the training's own.
    """
    options = recipe.training
    if options is None or options.start is None:
        return recipe
    found = checkpoint.read_recipe(resolve(options.start))
    if found["method"] != recipe.method.name:
        raise SignbitError(
            f"start {options.start} was made by method {found['method']}, the recipe has {recipe.method.name}: "
            f"give a recipe of {found['method']}"
        )
    made_by = {key: value for key, value in found.items() if key not in TrainingOptions.model_fields}
    own = recipe.common.model_dump(mode="json", include={"calib", "seqlen", "seed"})
    settled = Recipe({**made_by, **own, **options.model_dump(mode="json")})
    wanted = recipe.to_dict()
    for key, value in settled.to_dict().items():
        if key in recipe.given and wanted[key] != value:
            raise SignbitError(
                f"start {options.start} was made with {key}={value}, the recipe has {wanted[key]}: "
                f"give the start's {key}, or another start"
            )
    return settled


def check(run: Run) -> None:
    """Refuse what can be seen without opening anything."""
    accumulation_of(run.options, run.processes.count)
    check_losses(run.options)
    if run.tensorboard is not None and importlib.util.find_spec("tensorboard") is None:
        raise SignbitError("the log needs tensorboard: pip install 'signbit[log]', or train without --tensorboard")
    _check_sources(run, run.journal)


def check_export(run: Run, out: Path, written: Journal) -> None:
    """Refuse to export the training of ``out`` to ``run.out``, by the journal ``written``, where that loses something.

    Both places are emptied before they are written to.
    """
    for path in (run.out, written.directory):
        if path.is_relative_to(out) or path.is_relative_to(run.journal.directory):
            raise SignbitError(f"{run.out} belongs to the training of {out}: choose another directory to export to")
    _check_sources(run, written)


def _check_sources(run: Run, written: Journal) -> None:
    """Refuse to write where what is read lies."""
    for given in (run.model, *filter(None, [run.options.start])):
        if any(resolve(given).resolve().is_relative_to(path) for path in (run.out, written.directory)):
            raise SignbitError(f"{given} lies in {run.out}, which is to be written: choose another directory")


def check_losses(options: TrainingOptions, blocks: int | None = None) -> None:
    """Refuse losses that nothing comes of, in a model of so many ``blocks`` if that is known."""
    if options.kl or options.lm:
        return
    if not options.hidden:
        raise SignbitError("there is nothing to train for: give kl, hidden or lm a weight")
    if blocks == 1:
        raise SignbitError(
            "there is nothing to train for: hidden is a sum over all blocks but the last, and the model has one block: "
            "give kl or lm a weight"
        )


def identity_of(run: Run, source: Source) -> dict[str, Any]:
    """What must be the same for a run to go on."""
    start = hashlib.sha256()
    if run.options.start is not None:
        report = QuantizationReport.read(run.start)
        if report is not None and report.fingerprint != source.fingerprint:
            raise SignbitError(f"start {run.options.start} was not made from {run.model}: give one that was")
        for file in [run.start / "config.json", *files_of(run.start)]:
            with file.open("rb") as stream:
                start.update(hashlib.file_digest(stream, "sha256").digest())
    return {
        "recipe": run.recipe.to_dict(),
        "fingerprint": source.fingerprint,
        "text": text_fingerprint(str(run.recipe.common.calib)),
        "start": start.hexdigest(),
        "device": run.processes.device.type,
        "signbit": __version__,
    }
