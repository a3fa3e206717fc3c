"""One prompt and what is to be written after it, once or several times."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from signbit.serving.detokenize import Detokenizer, StopStrings
from signbit.serving.sampling import Sampler, Sampling


@dataclass(frozen=True)
class Entry:
    """A token, the logarithm of its probability, and the likeliest tokens there. The first token has no probability.

    Probabilities are the model's own: before temperature, penalties and biases.
    """

    token: int
    logprob: float | None
    top: tuple[tuple[int, float], ...] = ()


@dataclass(frozen=True)
class Piece:
    """What a choice has to tell since the last piece. finish: why there is no more ("stop", "length"), or None."""

    text: str = ""
    entries: tuple[Entry, ...] = ()
    finish: str | None = None


@dataclass(frozen=True)
class Failure:
    """Instead of a piece, for all choices of a job: it cannot be finished."""

    message: str
    code: str


Tell = Callable[[int, Piece | Failure], None]


@dataclass(eq=False)
class Job:
    """A request as the engine sees it.

    logprobs: how many likeliest tokens to list beside each token; None: no log-probabilities at all.
    prompt_logprobs: those of the prompt's tokens are told, too, in a first piece of each choice.
    max_tokens: 0 reads the prompt and writes nothing.
    continues: the new text goes on where the prompt ends, in mid-sentence maybe; otherwise it begins something.
    tell: called with (choice, piece) on the engine's thread; must not block.
    cancelled: set by whoever no longer wants it; looked at between steps.
    """

    prompt: Sequence[int]
    max_tokens: int
    tell: Tell
    sampling: Sampling = field(default_factory=Sampling)
    choices: int = 1
    stops: Sequence[str] = ()
    logprobs: int | None = None
    prompt_logprobs: bool = False
    continues: bool = True
    cancelled: bool = False
    written: int = 0  # tokens so far, of all choices
    created: float = field(default_factory=time.monotonic)
    first_token: float | None = None


class Choice:
    """One of the texts that a job asks for, as it is written."""

    def __init__(self, job: Job, index: int, tokenizer: Any) -> None:
        self.job, self.index = job, index
        self.token = -1  # the last one, which the model has not read yet
        self._sampler = Sampler(job.sampling, index)
        self._text = Detokenizer(tokenizer, job.prompt if job.continues else ())
        self._stops = StopStrings(job.stops)
        self._tokens = 0
        self._decoded = self._told = 0  # characters
        self._entries: list[tuple[int, Entry]] = []  # where their text starts, and they

    def take(self, logits: Tensor, ends: frozenset[int]) -> bool:
        """Choose the token after ``logits`` and tell what follows from it; whether that was the last."""
        job = self.job
        self.token = token = self._sampler.choose(logits)
        if job.first_token is None:
            job.first_token = time.monotonic()
        self._tokens += 1
        job.written += 1
        finish = "stop" if token in ends else "length" if self._tokens == job.max_tokens else None
        if token in ends:
            shown = ""
        else:
            if job.logprobs is not None:
                self._entries.append((self._decoded, entry(logits, token, job.logprobs)))
            piece = self._text.push(token)
            if finish:
                piece += self._text.finish()
            self._decoded += len(piece)
            shown = self._stops.push(piece)
        if finish and not self._stops.stopped:
            if token in ends:
                shown += self._stops.push(self._text.finish())
            if not self._stops.stopped:
                shown += self._stops.finish()
        if self._stops.stopped:
            finish = "stop"
        self._told += len(shown)
        entries = self._release(finish)
        if shown or entries or finish:
            job.tell(self.index, Piece(shown, entries, finish))
        return finish is not None

    def _release(self, finish: str | None) -> tuple[Entry, ...]:
        """The tokens whose text begins in what was told; at the end all but those after a stop string's beginning."""
        everything = finish is not None and not self._stops.stopped
        count = 0
        while count < len(self._entries) and (everything or self._entries[count][0] < self._told):
            count += 1
        released = tuple(one for _, one in self._entries[:count])
        del self._entries[:count]
        return released


def entry(logits: Tensor, token: int, top: int) -> Entry:
    logprobs = logits.log_softmax(-1)
    best, tokens = logprobs.topk(min(top, len(logprobs)))
    return Entry(token, float(logprobs[token]), tuple(zip(tokens.tolist(), best.tolist(), strict=True)))


def prompt_entries(logits: Tensor, tokens: Sequence[int], top: int) -> list[Entry]:
    """Of ``tokens``, by the logits [tokens, vocabulary] before each."""
    logprobs = logits.log_softmax(-1)
    best, ids = logprobs.topk(min(top, logprobs.shape[-1]))
    own = logprobs.gather(1, torch.tensor(tokens)[:, None])[:, 0]
    return [
        Entry(token, logprob, tuple(zip(row_ids, row_best, strict=True)))
        for token, logprob, row_ids, row_best in zip(tokens, own.tolist(), ids.tolist(), best.tolist(), strict=True)
    ]
