"""Quantizing a model: from MODEL to a checkpoint.

What can be refused is refused first; then blockwise.py does the work, into the journal; then checkpoint.py puts the
finished blocks together and publishes the result in one step.
"""

from __future__ import annotations

from contextlib import closing
from pathlib import Path
from typing import Any

import torch

from signbit import checkpoint
from signbit.blockwise import BlockwiseRun
from signbit.calibration.text import text_fingerprint
from signbit.device import choose_device
from signbit.errors import SignbitError
from signbit.journal import Journal, describe_difference, run_failed
from signbit.progress import Progress, Silent
from signbit.recipe import Recipe
from signbit.report.beside import write_checkpoint_page
from signbit.report.quantization import QuantizationReport
from signbit.source import Source, open_source, remove_workspaces, resolve
from signbit.timing import Stopwatch
from signbit.version import __version__


def quantize(
    model: str | Path,
    out: str | Path,
    recipe: Recipe | dict[str, Any] | str | Path = "billm",
    *,
    device: str = "auto",
    resume: bool = False,
    overwrite: bool = False,
    trust_remote_code: bool = False,
    progress: Progress | None = None,
) -> QuantizationReport:
    """Quantize MODEL and write a checkpoint to the directory ``out``.

    model: a hub id, a directory, a .gguf file or ``demo``. recipe: a :class:`Recipe`, a mapping of its keys, a
    preset's name or a YAML file. resume: go on with an interrupted run of the same arguments. overwrite: replace
    ``out``, or what is left of an interrupted run. Returns the report, timings included. Raises SignbitError for
    whatever the caller can put right.
    """
    model, out, chosen = str(model), target_of(out), choose_device(device)
    if not isinstance(recipe, Recipe):
        recipe = Recipe(recipe) if isinstance(recipe, dict) else Recipe.load(str(recipe))
    if recipe.training is not None:
        raise SignbitError("the recipe has training keys, such as steps: use signbit train, or take them out")
    recipe = recipe.for_model(model)
    distilling = recipe.distilling()
    if distilling is not None:
        from signbit.training.run import train  # which quantizes first, by this function

        return train(
            model,
            out,
            distilling,
            device=device,
            resume=resume,
            overwrite=overwrite,
            trust_remote_code=trust_remote_code,
            progress=progress,
        ).report
    journal = Journal(out)
    source_path = resolve(model).resolve()
    if any(source_path.is_relative_to(path) for path in (out, journal.directory)):
        raise SignbitError(f"the model lies in {out}, which is to be written: choose another directory")
    checkpoint.check_target(out, journal, resume=resume, overwrite=overwrite)
    try:
        with journal.locked():
            remove_workspaces(out)
            opened = open_source(model, trust_remote_code=trust_remote_code, beside=out)
            with closing(opened) as source:
                return _quantize(source, recipe, out, journal, chosen, resume, overwrite, progress or Silent())
    except OSError as error:
        raise run_failed(journal.directory, error, "--resume goes on from what is finished") from error


def target_of(out: str | Path) -> Path:
    """``out`` with symbolic links followed, so that what they point to is replaced and not they."""
    if not str(out) or not Path(out).resolve().name:
        raise SignbitError(f"{str(out)!r} is not a directory to write a checkpoint to")
    return Path(out).expanduser().resolve()


def _quantize(
    source: Source,
    recipe: Recipe,
    out: Path,
    journal: Journal,
    device: torch.device,
    resume: bool,
    overwrite: bool,
    progress: Progress,
) -> QuantizationReport:
    identity = {
        "recipe": recipe.to_dict(),
        "fingerprint": source.fingerprint,
        "text": text_fingerprint(str(recipe.common.calib)) if recipe.common.samples else None,
        "device": device.type,
        "signbit": __version__,
    }
    if resume and out.exists() and not overwrite:
        report = already_finished(out, identity)
        journal.discard()
        return report
    resuming = resume and journal.exists
    if resuming:
        journal.check(identity)
        progress.note(f"resuming from {journal.directory}")
    with Stopwatch().running() as stopwatch:
        run = BlockwiseRun(source, recipe, journal, device, progress)
        run.check(resuming=resuming)
        if not resuming:
            journal.start(identity)
        with stopwatch.phase("other"), torch.no_grad():
            report = run.execute()
        checkpoint.assemble(
            source, recipe, journal, report, run.outer_specs, run.outer_modules, run.storage, len(run.blocks)
        )
        write_checkpoint_page(journal.staging)
    checkpoint.publish(journal, out)
    report.seconds = dict(stopwatch.seconds)
    return report


def already_finished(out: Path, identity: dict[str, Any]) -> QuantizationReport:
    """The report of a finished run that is 'resumed' once more; SignbitError if it was another run."""
    report = QuantizationReport.read(out)
    found = checkpoint.read_recipe(out)
    different = describe_difference(found, identity["recipe"]) if report is not None else "by other means"
    if report is None or different or report.fingerprint != identity["fingerprint"]:
        raise SignbitError(
            f"{out} is a finished checkpoint made {different or 'from another model'}: choose another directory or "
            "use --overwrite"
        )
    return report
