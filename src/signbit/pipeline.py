"""Quantizing a model: from MODEL to a checkpoint.

What can be refused is refused first; then blockwise/ does the work, into the journal; then checkpoint.py puts the
finished blocks together and publishes the result in one step. Several processes work together; the first does what is
done once.
"""

from __future__ import annotations

from contextlib import closing, nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import torch

from signbit import checkpoint
from signbit.blockwise.job import Job
from signbit.blockwise.run import BlockwiseRun
from signbit.calibration.text import text_fingerprint
from signbit.errors import SignbitError
from signbit.journal import Journal, describe_difference, run_failed
from signbit.processes import Processes
from signbit.progress import Progress, Silent
from signbit.recipe import Recipe
from signbit.report.beside import write_checkpoint_page
from signbit.report.quantization import QuantizationReport
from signbit.source import open_source, remove_workspaces, resolve
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
    ``out``, or what is left of an interrupted run. Started by torchrun or another launcher, the processes share the
    work. Returns the report, timings included. Raises SignbitError for whatever the caller can put right.
    """
    model, out, processes = str(model), target_of(out), Processes(device)
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
    processes.first(lambda: checkpoint.check_target(out, journal, resume=resume, overwrite=overwrite))
    shown = (progress or Silent()) if processes.is_first else Silent()
    try:
        with journal.locked() if processes.is_first else nullcontext():
            processes.first(lambda: remove_workspaces(out))
            opened = open_source(model, trust_remote_code=trust_remote_code, beside=out)
            with closing(opened) as source:
                return _quantize(Job(source, recipe, journal, processes, shown), out, resume, overwrite)
    except OSError as error:
        raise run_failed(journal.directory, error, "--resume goes on from what is finished") from error


def target_of(out: str | Path) -> Path:
    """``out`` with symbolic links followed, so that what they point to is replaced and not they."""
    try:
        str(out).encode()  # the libraries that write into it take nothing else
        target = Path(out).expanduser().resolve()
        target.parent.is_dir()
    except UnicodeEncodeError as error:
        raise SignbitError(f"{str(out)!r} is not UTF-8: choose another name") from error
    except (OSError, RuntimeError, ValueError) as error:  # a name too long, a circle of links, an unknown ~user
        raise SignbitError(f"{str(out)!r} cannot be written to: {error}") from error
    if not str(out) or not target.name:
        raise SignbitError(f"{str(out)!r} is no place to write to: give it a name")
    return target


def _quantize(job: Job, out: Path, resume: bool, overwrite: bool) -> QuantizationReport:
    common, journal, processes = job.recipe.common, job.journal, job.processes
    identity = {
        "recipe": job.recipe.to_dict(),
        "fingerprint": job.source.fingerprint,
        "text": text_fingerprint(str(common.calib)) if common.samples else None,
        "device": job.device.type,
        "signbit": __version__,
    }

    def finished() -> QuantizationReport | None:
        if not (resume and out.exists() and not overwrite):
            return None
        report = already_finished(out, identity)
        journal.discard()
        return report

    def begin() -> bool:
        resuming = resume and journal.exists
        if resuming:
            journal.check(identity)
            job.progress.note(f"resuming from {journal.directory}")
        return resuming

    def publish(report: QuantizationReport, run: BlockwiseRun) -> None:
        checkpoint.assemble(
            job.source, job.recipe, journal, report, run.outer.specs, run.outer.modules, job.storage, len(job.blocks)
        )
        write_checkpoint_page(journal.staging)
        checkpoint.publish(journal, out)

    report = processes.first(finished)
    if report is not None:
        return report
    with Stopwatch().running() as stopwatch:
        resuming = processes.first(begin)
        run = BlockwiseRun(job)
        run.check(resuming=resuming)
        if not resuming:
            processes.first(lambda: journal.start(identity))
        with stopwatch.phase("other"), torch.no_grad():
            report = run.execute()
        processes.first(partial(publish, report, run))
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
