"""Each linear's options, settled once a run: by the recipe's budget, or by what the method makes of a survey.

All processes look at the original model together. Hessians are those of all sequences, in each of them; the values of a
budget are tried by one process for each linear.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch

from signbit.architectures import dense_shape, dense_weight
from signbit.blockwise.calibrate import Activations, original_model
from signbit.blockwise.job import Job
from signbit.blockwise.loading import BlockLoader
from signbit.budget.sensitivity import sensitivities
from signbit.budget.shares import Candidates, Tried, share_out
from signbit.calibration.capture import HessianCapture
from signbit.memory import return_free_memory
from signbit.methods.options import LinearSurvey, MethodOptions, Survey
from signbit.processes import deal
from signbit.source import release
from signbit.timing import phase


def settle_options(job: Job, loader: BlockLoader, activations: Activations | None) -> dict[str, MethodOptions]:
    """The options of each linear, by its full name: the journal's if it has any."""
    names = job.names()
    kept = job.processes.first(job.journal.read_options)
    if kept is not None:
        return _checked(job, names, kept)
    with phase("allocation"):
        survey = _survey(job, loader, activations)
        if job.recipe.common.budget is not None:
            settled = _within_budget(job, survey)
        else:
            blocks = job.recipe.method.allocate(survey, job.recipe.options)
            if blocks is None:
                return dict.fromkeys(names, job.recipe.options)
            settled = {f"{job.prefix}.{i}.{name}": one for i, one in enumerate(blocks) for name in job.linears(i)}

    def write() -> dict[str, dict[str, Any]]:
        fields = {name: one.model_dump(mode="json") for name, one in settled.items()}
        job.journal.write_options(fields)
        return fields

    # The first one's, so that all go by the same whatever the last digits of a sum were elsewhere.
    return _checked(job, names, job.processes.first(write))


def _checked(job: Job, names: list[str], kept: dict[str, dict[str, Any]]) -> dict[str, MethodOptions]:
    try:
        options = {name: type(job.recipe.options)(**fields) for name, fields in kept.items()}
    except (AttributeError, TypeError, ValueError) as error:
        raise job.journal.damaged_options() from error
    if options.keys() != set(names):
        raise job.journal.damaged_options()
    return options


def _within_budget(job: Job, survey: Survey) -> dict[str, MethodOptions]:
    budget, common, processes = job.recipe.common.budget, job.recipe.common, job.processes
    assert budget is not None  # the caller has looked
    candidates = Candidates(job.recipe.method, job.recipe.options, budget, common.damping)
    sensitive = processes.first(lambda: _sensitivities(job, budget.samples))
    tried: dict[str, Tried] = {}
    with job.progress.task("trying values in blocks", len(job.blocks)) as task:
        for index, block in enumerate(survey(inputs=True)):
            owners = deal([linear.weight.numel() for linear in block.values()], processes.count)
            mine = {
                f"{job.prefix}.{index}.{name}": candidates.try_on(linear)
                for (name, linear), owner in zip(block.items(), owners, strict=True)
                if owner == processes.rank
            }
            for told in processes.tell(mine):
                tried |= told
            task.advance()
    return share_out({name: tried[name] for name in job.names()}, sensitive, candidates)


def _sensitivities(job: Job, samples: int) -> dict[str, float]:
    tokens = job.journal.read("tokens")["tokens"][:samples].long()
    job.progress.note("measuring how sensitive predictions are to each linear: this loads the whole model once")
    original = original_model(job)
    linears = {name: original.get_submodule(name) for name in job.names()}
    try:
        return sensitivities(original, linears, tokens, job.recipe.common.seed)
    finally:
        del original, linears
        return_free_memory()


def _survey(job: Job, loader: BlockLoader, activations: Activations | None) -> Survey:
    def survey(*, inputs: bool) -> Iterator[dict[str, LinearSurvey]]:
        original = activations.inputs if activations is not None and inputs else None
        # Blocks run here are the original ones: afterwards all begins again with what goes into the first.
        hidden = [] if original is None else list(original.hidden)
        for index, block in enumerate(job.blocks):
            linears = job.linears(index)
            loader.load(index)
            loader.expect(index + 1)
            capture = HessianCapture(dict(linears))
            if original is not None:
                with capture.watching(block):
                    original.run(index, keep=True)
                capture.agree(job.processes)
                for accumulator in capture.hessians.values():
                    accumulator.collect(job.processes)
            yield {
                name: LinearSurvey(
                    weight=dense_weight(linear, linear.weight).float(),
                    hessian=None if original is None else _hessian(job, capture, name, dense_shape(linear)[1]),
                )
                for name, linear in linears.items()
            }
            release(block)
            return_free_memory()
        if original is not None:
            original.hidden = hidden

    return survey


def _hessian(job: Job, capture: HessianCapture, name: str, width: int) -> torch.Tensor:
    accumulator = capture.hessians.get(capture.leader.get(name, name))
    return torch.eye(width, device=job.device) if accumulator is None else accumulator.hessian()
