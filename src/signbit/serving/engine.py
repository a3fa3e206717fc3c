"""Who reads a piece of prompt and who writes a token, step by step.

A step reads at most a few hundred tokens of the prompts that are still to be read, in turns, and then writes one token
for every sequence that is past its prompt, all in one forward. So a long prompt delays the others by a piece of it at a
time, and a sequence joins and leaves between any two tokens. A prompt whose text is wanted n times is read once.

There is no thread here: ``step`` is called by the scheduler's, and by tests.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel

from signbit.serving.job import Choice, Entry, Failure, Job, Piece, prompt_entries
from signbit.serving.rows import AloneRows, BatchedRows, Forward, open_rows
from signbit.serving.sampling import NotFiniteError

# Tokens of prompts between two steps: what those who are being written to wait for, or nobody does.
_SHARED, _UNDISTURBED = 128, 512
_NAN = Failure("the model computed no finite probabilities for this prompt", "model_error")


@dataclass(eq=False)
class _Reading:
    job: Job
    cache: DynamicCache
    length: int = 0
    logits: Tensor | None = None  # after the last token read
    entries: list[Entry] = field(default_factory=list)


class Engine:
    """All sequences of one model. slots: how many are written at once."""

    def __init__(self, model: PreTrainedModel, tokenizer: Any, slots: int) -> None:
        self.forward = Forward(model)
        self.tokenizer = tokenizer
        self.slots = slots
        self.rows = open_rows(self.forward, slots)
        self.ends = end_tokens(model, tokenizer)
        self._reading: deque[_Reading] = deque()
        self._writing: list[Choice] = []
        self.read = 0  # prompt tokens, ever

    @property
    def batched(self) -> bool:
        return isinstance(self.rows, BatchedRows)

    @property
    def busy(self) -> bool:
        return bool(self._reading or self._writing)

    @property
    def active(self) -> int:
        """Slots that are taken."""
        return len(self._writing) + sum(reading.job.choices for reading in self._reading)

    def fits(self, job: Job) -> bool:
        return self.active + job.choices <= self.slots

    def add(self, job: Job) -> None:
        """Start on a job that fits."""
        self._reading.append(_Reading(job, self.forward.new_cache()))

    def abandon(self, failure: Failure) -> None:
        """End all that is under way."""
        jobs = dict.fromkeys([*(one.job for one in self._reading), *(choice.job for choice in self._writing)])
        self._reading.clear()
        self._writing.clear()
        self.rows = BatchedRows(self.forward, self.slots) if self.batched else AloneRows(self.forward)
        for job in jobs:
            job.tell(0, failure)

    @torch.inference_mode()
    def step(self) -> None:
        """Read some, write one token each."""
        self._drop_cancelled()
        self._read()
        self._write()

    def _drop_cancelled(self) -> None:
        self._reading = deque(one for one in self._reading if not one.job.cancelled)
        for row in reversed(range(len(self._writing))):
            if self._writing[row].job.cancelled:
                self._remove(row)

    def _read(self) -> None:
        budget = _SHARED if self._writing else _UNDISTURBED
        while budget > 0 and self._reading:
            reading = self._reading[0]  # it stays there while it is read, to be found by abandon if that fails
            budget -= self._read_some(reading, budget)
            self._reading.popleft()
            if reading.length == len(reading.job.prompt):
                self._start_writing(reading)
            else:
                self._reading.append(reading)

    def _read_some(self, reading: _Reading, most: int) -> int:
        """Read on; returns how many tokens."""
        job, start = reading.job, reading.length
        tokens = job.prompt[start : start + most]
        every = job.prompt_logprobs
        logits = self.forward.read(tokens, reading.cache, start, every=every)
        if every:
            top = job.logprobs or 0
            before = logits[:-1]
            if reading.logits is None:
                reading.entries.append(Entry(tokens[0], None))
                reading.entries += prompt_entries(before, tokens[1:], top) if len(tokens) > 1 else []
            else:
                reading.entries += prompt_entries(torch.cat([reading.logits, before]), tokens, top)
        reading.logits = logits[-1:].clone()
        reading.length += len(tokens)
        self.read += len(tokens)
        return len(tokens)

    def _start_writing(self, reading: _Reading) -> None:
        job, logits = reading.job, reading.logits
        assert logits is not None
        for index in range(job.choices if job.prompt_logprobs or not job.max_tokens else 0):
            job.tell(index, Piece(entries=tuple(reading.entries), finish=None if job.max_tokens else "length"))
        if not job.max_tokens:
            return
        choices = [Choice(job, index, self.tokenizer) for index in range(job.choices)]
        first = len(self._writing)
        self._writing += choices
        self.rows.join(reading.cache, reading.length, job.choices)
        self._take(logits.expand(job.choices, -1), first)

    def _write(self) -> None:
        if self._writing:
            self._take(self.rows.step([choice.token for choice in self._writing]), 0)

    def _take(self, logits: Tensor, first: int) -> None:
        """The rows from ``first`` on choose their tokens; those that are finished leave."""
        finished = []
        for row, choice in enumerate(self._writing[first:], first):
            try:
                if choice.job.cancelled or choice.take(logits[row - first], self.ends):
                    finished.append(row)
            except NotFiniteError:
                choice.job.cancelled = True
                choice.job.tell(choice.index, _NAN)
                finished.append(row)
        for row in reversed(finished):
            self._remove(row)

    def _remove(self, row: int) -> None:
        self.rows.leave(row)
        last = self._writing.pop()
        if row < len(self._writing):
            self._writing[row] = last


def end_tokens(model: PreTrainedModel, tokenizer: Any) -> frozenset[int]:
    """The tokens that end a text: the generation config's, which may be several, and the tokenizer's."""
    configured = getattr(model.generation_config, "eos_token_id", None)
    ends = set(configured if isinstance(configured, list) else [configured])
    return frozenset(one for one in ends | {tokenizer.eos_token_id} if one is not None)
