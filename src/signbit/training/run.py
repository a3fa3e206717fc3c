"""Training a model: from MODEL and a recipe with training keys to a checkpoint.

    start      what ``quantize`` makes by the recipe without its training keys, or the checkpoint that ``start`` names
    text       token windows on disk (data.py)
    student    the start, its packed matrices replaced by latent ones; the teacher is MODEL as it is
    loop       loop.py, from the last snapshot if there is one
    finish     each latent matrix packed again, from the last snapshot, in the layout that it came from

Everything is in ``OUT.partial`` until the finished checkpoint is renamed to ``OUT``, as when quantizing. With several
processes the first does what is done once; the others wait for it. All of them quantize.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import closing, contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from signbit import checkpoint
from signbit.architectures import find_blocks
from signbit.calibration.text import SELF
from signbit.calibration.tokens import check_seqlen
from signbit.errors import SignbitError
from signbit.inference import open_model
from signbit.journal import Journal, run_failed
from signbit.memory import return_free_memory
from signbit.pipeline import already_finished, quantize, target_of
from signbit.precision import autocast, uses_bfloat16
from signbit.processes import Processes
from signbit.progress import Progress, Silent
from signbit.recipe import Recipe
from signbit.report.beside import write_checkpoint_page
from signbit.report.quantization import QuantizationReport
from signbit.safetensors_file import write_text
from signbit.source import Source, remove_workspaces
from signbit.training import data, record, student
from signbit.training.arguments import Run, check, check_export, check_losses, from_start, identity_of
from signbit.training.latent import LatentLinear
from signbit.training.loop import Log, Loop, Trainable
from signbit.training.record import Record
from signbit.training.snapshot import Snapshot
from signbit.training.states import Head, States, StatesOf
from signbit.training.teacher import Cache, Teacher


@dataclass(frozen=True)
class Trained:
    """What :func:`train` returns: the report of the checkpoint, and the record of losses and held-out perplexities."""

    report: QuantizationReport
    record: Record


def train(
    model: str | Path,
    out: str | Path,
    recipe: Recipe | dict[str, Any] | str | Path = "onebit",
    *,
    device: str = "auto",
    resume: bool = False,
    overwrite: bool = False,
    trust_remote_code: bool = False,
    tensorboard: str | Path | None = None,
    progress: Progress | None = None,
) -> Trained:
    """Train MODEL's linears in the form that the recipe's method stores them in, and write a checkpoint to ``out``.

    The arguments are those of :func:`signbit.quantize`; the recipe has training keys (training/options.py).
    tensorboard: a directory for its logs. Started by torchrun or another launcher, the processes share the work.
    Raises SignbitError for whatever the caller can put right, losses that are not finite among it.
    """
    processes = Processes(device)
    if not isinstance(recipe, Recipe):
        recipe = Recipe(recipe) if isinstance(recipe, dict) else Recipe.load(str(recipe))
    recipe = from_start(recipe.for_model(str(model)))
    options = recipe.training
    if options is None:
        raise SignbitError("the recipe has no training keys, such as steps: use signbit quantize, or add them")
    target = target_of(out)
    run = Run(
        model=str(model),
        out=target,
        recipe=recipe,
        options=options,
        journal=Journal(target),
        processes=processes,
        progress=(progress or Silent()) if processes.is_first else Silent(),
        trust_remote_code=trust_remote_code,
        tensorboard=None if tensorboard is None else Path(tensorboard),
    )
    check(run)
    try:
        processes.first(lambda: checkpoint.check_target(target, run.journal, resume=resume, overwrite=overwrite))
        with run.journal.locked() if processes.is_first else nullcontext():
            return _train(run, resume, overwrite)
    except OSError as error:
        raise run_failed(run.journal.directory, error, "--resume goes on from the last snapshot") from error


def export_snapshot(
    model: str | Path,
    out: str | Path,
    target: str | Path,
    recipe: Recipe | None = None,
    *,
    overwrite: bool = False,
    trust_remote_code: bool = False,
    progress: Progress | None = None,
) -> Trained:
    """Write the checkpoint ``target`` from the last snapshot of the unfinished training of ``out``, which may go on.

    model: what is trained. recipe: by default the run's own; another is refused.
    """
    place, journal = target_of(target), Journal(target_of(out))
    written = Journal(place)
    try:
        identity = journal.identity() if journal.exists else {}
        known = Recipe(identity["recipe"]) if "steps" in identity.get("recipe", {}) else None
        with _last_snapshot(journal) as found:
            if found is None or known is None or known.training is None:
                raise SignbitError(f"{journal.directory} holds no snapshot of a training: there is nothing to export")
            if recipe is not None:
                journal.check(identity | {"recipe": from_start(recipe.for_model(str(model))).to_dict()})
            one, shown = Processes("cpu"), progress or Silent()
            run = Run(str(model), place, known, known.training, journal, one, shown, trust_remote_code)
            check_export(run, target_of(out), written)
            checkpoint.check_target(place, written, resume=False, overwrite=overwrite)
            return Trained(_export(run, found, written, identity["fingerprint"]), found.record)
    except OSError as error:
        raise run_failed(written.directory, error, "the training is as it was") from error


def _export(run: Run, found: Snapshot, written: Journal, fingerprint: str) -> QuantizationReport:
    with written.locked(), run.source() as source:
        if source.fingerprint != fingerprint:
            raise SignbitError(f"{run.journal.directory} was begun from another model than {run.model}")
        written.start({"export": str(run.journal.directory)})
        try:
            report = _assemble(run, source, found, written)
        except (SignbitError, OSError) as error:
            # Nothing of an export is worth keeping.
            written.discard()
            if not run.journal.exists:
                raise SignbitError("the training has ended meanwhile: take the checkpoint that it made") from error
            raise
        checkpoint.publish(written, run.out)
    return report


def _train(run: Run, resume: bool, overwrite: bool) -> Trained:
    processes, journal = run.processes, run.journal
    finished = processes.first(lambda: _begin(run, resume, overwrite))
    if finished is not None:
        return finished
    if run.options.start is None:
        quantize(
            run.model,
            journal.start_directory,
            run.recipe.without_training(),
            device=processes.device.type,
            resume=True,
            trust_remote_code=run.trust_remote_code,
            progress=run.progress,
        )
    processes.first(lambda: _write_text(run))
    with _last_snapshot(journal) as found:
        if found is None or found.record.steps < run.options.steps:
            _learn(run, found)
            return_free_memory()
    return processes.first(lambda: _finish(run))


def _begin(run: Run, resume: bool, overwrite: bool) -> Trained | None:
    """The journal, and the text that is read, by the first process; what there is if nothing is left to be done."""
    journal = run.journal
    remove_workspaces(run.out)
    with run.source() as source:
        check_seqlen(source.config, run.recipe.common.seqlen)
        check_losses(run.options, len(find_blocks(source.skeleton)[1]))
        identity = identity_of(run, source)
        if resume and run.out.exists() and not overwrite:
            report = already_finished(run.out, identity)
            journal.discard()
            return Trained(report, _read(run.out).record)
        if resume and journal.exists:
            journal.check(identity)
            run.progress.note(f"resuming from {journal.directory}")
        else:
            journal.start(identity)
        if run.recipe.common.calib != SELF:
            data.store_text(
                journal.directory, str(run.recipe.common.calib), source.tokenizer, source.config, run.recipe
            )
    return None


def _write_text(run: Run) -> None:
    """The text that the model writes, by the first process, if none was read."""
    if not (run.journal.directory / data.FILE).exists():
        writer, _ = open_model(run.model, device=run.processes.device.type, trust_remote_code=run.trust_remote_code)
        data.write_text(run.journal.directory, writer, run.recipe, run.progress)


def _learn(run: Run, found: Snapshot | None) -> None:
    """Train, from a snapshot or the start, to the last snapshot."""
    options, processes, common = run.options, run.processes, run.recipe.common
    device = processes.device
    windows = data.Windows(run.journal.directory, common.seqlen, options.heldout, common.seed)
    with run.source() as source:
        model = student.make_student(run.start, source, options, device, run.trust_remote_code)
        blocks = find_blocks(source.skeleton)[0]
    if found is not None:
        found.restore("", model)
    dtype = torch.bfloat16 if uses_bfloat16(options.precision, device) else torch.float32
    states = StatesOf(
        model,
        blocks,
        hidden=options.hidden > 0,
        learning=bool(options.kl or options.lm),
        checkpointing=options.gradient_checkpointing,
    )
    probe = windows.ids([0])[:, :8].to(device)
    Head(model, torch.float32).check(states, probe)
    parameters = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    latent = {name: module for name, module in model.named_modules() if isinstance(module, LatentLinear)}
    scales = {id(one) for module in latent.values() for one in module.scales()}
    trainable = Trainable(
        states,
        Head(model, dtype),
        parameters,
        scales={name for name, one in parameters.items() if id(one) in scales},
        limits={f"{at}.{name}": limit for at, module in latent.items() for name, limit in module.limits().items()},
    )
    teacher = _teacher(run, windows, blocks, dtype) if options.kl or options.hidden else None
    with _logging(run.tensorboard if processes.is_first else None) as log:
        loop = Loop(trainable, teacher, windows, options, processes, run.journal.directory, run.progress, log)
        loop.run(found)


def _teacher(run: Run, windows: data.Windows, blocks: str, dtype: torch.dtype) -> Teacher:
    device, options = run.processes.device, run.options
    model, _ = open_model(run.model, device=device.type, dtype=dtype, trust_remote_code=run.trust_remote_code)
    model.requires_grad_(False)
    states = StatesOf(model, blocks, hidden=options.hidden > 0)
    cache = None
    if options.teacher_cache:
        with torch.no_grad():
            hidden, last = states(windows.ids([0])[:, :2].to(device))
        cache = Cache(
            run.journal.directory, windows.count, States(hidden, last if options.kl else None), windows.seqlen
        )
    return Teacher(states, Head(model, dtype), autocast(options.precision, device), cache)


@contextmanager
def _logging(directory: Path | None) -> Iterator[Log | None]:
    if directory is None:
        yield None
        return
    from torch.utils.tensorboard import SummaryWriter

    with closing(SummaryWriter(str(directory))) as writer:
        yield writer.add_scalar


# Packing -------------------------------------------------------------------------------------------------------------


def _finish(run: Run) -> Trained:
    with _last_snapshot(run.journal) as found, run.source() as source:
        assert found is not None
        report = _assemble(run, source, found, run.journal)
    checkpoint.publish(run.journal, run.out)
    return Trained(report, found.record)


@contextmanager
def _last_snapshot(journal: Journal) -> Iterator[Snapshot | None]:
    """Held open, whatever becomes of the file."""
    found = Snapshot.of(journal.directory)
    with nullcontext() if found is None else closing(found):
        yield found


def _assemble(run: Run, source: Source, found: Snapshot, journal: Journal) -> QuantizationReport:
    """Put the checkpoint of a snapshot together in the staging directory of ``journal``."""
    packed, errors = {}, {}
    for name, layout, error in student.pack_trained(run.start, source, run.options, found):
        packed[name], errors[name] = layout, error
    report = student.retrained_report(run.start, source, packed, errors)
    checkpoint.assemble_retrained(run.start, packed, run.recipe, journal, report)
    write_text(journal.staging / record.FILE, found.record.to_json() + "\n")
    write_checkpoint_page(journal.staging)
    return report


def _read(out: Path) -> Trained:
    """What is known of a finished checkpoint."""
    report, file = QuantizationReport.read(out), out / record.FILE
    if report is None or not file.is_file():
        raise SignbitError(f"{out} is a finished checkpoint that was not trained here: use --overwrite")
    return Trained(report, Record.from_json(file.read_text(encoding="utf-8"), file))
