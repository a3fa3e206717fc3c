"""The calibration text, and what the blocks make of it: each process has its own sequences of it.

The text is cut into sequences by the first process and kept in the journal. Sequence i is process i mod n's. Where
blocks are tuned, all processes work on each batch together, each on its sequences of it, so that a step is what it
would be in one process.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel

from signbit.blockwise.job import Job
from signbit.calibration.capture import BlockInputs
from signbit.calibration.self_text import write_tokens
from signbit.calibration.text import SELF, read_text
from signbit.calibration.tokens import check_seqlen, random_windows, tokenize
from signbit.errors import SignbitError
from signbit.timing import phase
from signbit.tuning.block import Step

# Tokens that go through a block at once: enough for full matrix speed, few enough that activations inside a block stay
# small beside its weights.
_TOKENS_PER_CALL = {"cpu": 4096, "cuda": 16384}


@dataclass
class Activations:
    """What this process has of the calibration set. inputs: of the next block, as the quantized blocks make them;
    original: as the original blocks do, if blocks are tuned; steps: all batches, and what is here of each."""

    inputs: BlockInputs
    original: list[Tensor]
    steps: list[Step]


def read_windows(job: Job, *, resuming: bool) -> Tensor | None:
    """The calibration sequences [samples, seqlen], as far as they can be had without running the model; refuses a text
    that is no good."""
    common = job.recipe.common
    if not common.samples:
        return None
    check_seqlen(job.source.config, common.seqlen)
    if common.calib == SELF or (resuming and job.journal.has("tokens")):
        return None
    with phase("calibration text"):
        text = read_text(str(common.calib), "train")
        tokens = tokenize(job.source.tokenizer, text, job.source.config)
        return random_windows(tokens, common.samples, common.seqlen, common.seed)


def calibration_tokens(job: Job, windows: Tensor | None) -> Tensor:
    """The calibration sequences, from the journal if they are in it, else ``windows``, else written by the model."""

    def settled() -> Tensor:
        if not job.journal.has("tokens"):
            with phase("calibration text"):
                job.journal.write("tokens", {"tokens": _written(job) if windows is None else windows})
        return job.journal.read("tokens")["tokens"]

    return job.processes.first(settled)


def record_inputs(job: Job, tokens: Tensor) -> Activations:
    """What goes into the first block. What is outside the blocks, and the first block, must be loaded."""
    common, processes = job.recipe.common, job.processes
    steps: list[Step] = []
    if common.tune is not None:
        batches, steps = share_steps(tokens, common.tune.batch, processes.rank, processes.count)
    else:
        size = max(1, _TOKENS_PER_CALL[job.device.type] // common.seqlen)
        batches = list(tokens[processes.rank :: processes.count].split(size))
    inputs = BlockInputs(job.blocks)
    with phase("forward"):
        inputs.record(job.model, batches, job.device)
    return Activations(inputs, list(inputs.hidden) if common.tune else [], steps)


def share_steps(tokens: Tensor, size: int, rank: int, count: int) -> tuple[list[Tensor], list[Step]]:
    """The sequences of process ``rank`` in each batch of ``size``, those batches only of which it has any; all batches,
    and what this process has of each."""
    batches: list[Tensor] = []
    steps: list[Step] = []
    for start, batch in zip(range(0, len(tokens), size), tokens.split(size), strict=True):
        own = batch[(torch.arange(start, start + len(batch)) % count) == rank]
        steps.append(Step(len(batches) if len(own) else None, len(own) / len(batch)))
        batches += [own] if len(own) else []
    return batches, steps


def original_model(job: Job) -> PreTrainedModel:
    """All of the original model, to be run as a whole."""
    model = AutoModelForCausalLM.from_config(job.source.config, dtype=job.compute)
    state = {name: job.source.weights[name] for name in model.state_dict() if name in job.source.weights}
    missing = set(model.load_state_dict(state, strict=False).missing_keys) - model.all_tied_weights_keys.keys()
    if missing:
        raise SignbitError(
            f"{job.source.name} cannot be run as a whole: its weights lack {min(missing)}; calibrate on a text "
            "file, and without budget"
        )
    model.tie_weights()
    return model.eval().to(job.device)


def _written(job: Job) -> Tensor:
    common = job.recipe.common
    job.progress.note(f"{job.source.name} writes its own calibration text: this loads the whole model once")
    return write_tokens(original_model(job), common.samples, common.seqlen, common.seed, job.progress)
