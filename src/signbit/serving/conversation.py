"""One conversation, its keys and values kept between turns.

A turn's prompt is the whole conversation again, and nearly all of it was read before: only what differs from the tokens
in the cache is read. Templates may rewrite earlier turns (some leave out an answer's thoughts), so the tokens are
compared and not counted. When the context is full the oldest turns are left out, two at a time, the system prompt kept.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from signbit.serving.detokenize import Detokenizer, StopStrings
from signbit.serving.engine import end_tokens
from signbit.serving.prompts import Prompts, PromptTooLongError
from signbit.serving.rows import Forward
from signbit.serving.sampling import Sampler, Sampling

_PIECE = 512


@dataclass
class Turn:
    """How an answer went. dropped: messages that no longer fit."""

    tokens: int = 0
    seconds: float = 0.0
    finish: str | None = None  # None: it was stopped from outside
    reused: int = 0
    dropped: int = 0


@dataclass
class Conversation:
    """Messages, and answers to them by ``model``. max_tokens: of an answer; None: what the context has room for."""

    model: PreTrainedModel
    tokenizer: Any
    prompts: Prompts
    sampling: Sampling
    max_tokens: int | None = None
    system: str | None = None
    messages: list[dict[str, str]] = field(default_factory=list)

    def __post_init__(self) -> None:
        self._forward = Forward(self.model)
        self._ends = end_tokens(self.model, self.tokenizer)
        self._sampler = Sampler(self.sampling)
        self._cache, self._cached = self._forward.new_cache(), []  # type: ignore[var-annotated]
        # Whether all layers hold the keys of all that is cached, and no more: ctrl-C comes between two of them.
        self._whole = True
        self.last = Turn()

    def reset(self) -> None:
        """Forget the conversation; the system prompt stays."""
        self.messages.clear()

    def ask(self, text: str) -> Iterator[str]:
        """The answer to ``text``, in pieces. Whoever closes the iterator stops the answer; what was said by then stays.

        SignbitError, and nothing is changed, if the message alone is too long for the context.
        """
        turn = self.last = Turn()
        said: list[str] = []
        messages, prompt = self._fit([*self.messages, {"role": "user", "content": text}])
        turn.dropped = len(self.messages) + 1 - len(messages)
        self.messages[:] = messages
        try:
            for piece in self._write(prompt, turn):
                said.append(piece)
                yield piece
        finally:
            answer = "".join(said).strip()
            if answer:
                self.messages.append({"role": "assistant", "content": answer})
            else:
                self.messages.pop()

    def _fit(self, messages: list[dict[str, str]]) -> tuple[list[dict[str, str]], list[int]]:
        """The last messages that fit, and their tokens."""
        system = [{"role": "system", "content": self.system}] if self.system else []
        reserve = min(self.max_tokens or 256, self.prompts.context // 4)
        while True:
            try:
                prompt = self.prompts.chat([*system, *messages])
                if len(messages) <= 2 or len(prompt) + reserve <= self.prompts.context:
                    return messages, prompt
            except PromptTooLongError:
                if len(messages) <= 2:
                    raise
            messages = messages[2:]

    def _write(self, prompt: list[int], turn: Turn) -> Iterator[str]:
        logits = self._read(prompt, turn)
        text, stops = Detokenizer(self.tokenizer), StopStrings(self.prompts.stops)
        room = min(self.max_tokens or self.prompts.context, self.prompts.context - len(prompt))
        started = time.monotonic()
        while turn.finish is None:
            token = self._sampler.choose(logits)
            turn.tokens += 1
            if token in self._ends:
                turn.finish = "stop"
            else:
                shown = stops.push(text.push(token))
                if stops.stopped:
                    turn.finish = "stop"
                elif turn.tokens >= room:
                    turn.finish = "length"
                if shown:
                    yield shown
            turn.seconds = time.monotonic() - started
            if turn.finish is None:
                logits = self._extend([token])
        rest = "" if stops.stopped else stops.push(text.finish()) + stops.finish()
        if rest:
            yield rest

    @torch.inference_mode()
    def _read(self, prompt: list[int], turn: Turn) -> Tensor:
        """The logits after ``prompt``, of which what the cache begins with is not read again."""
        same = 0
        most = min(len(self._cached), len(prompt) - 1)
        while same < most and self._cached[same] == prompt[same]:
            same += 1
        if same < len(self._cached) or not self._whole:
            same = self._cut(same)
        turn.reused = same
        for start in range(same, len(prompt), _PIECE):
            logits = self._extend(prompt[start : start + _PIECE])
        return logits

    @torch.inference_mode()
    def _extend(self, tokens: list[int]) -> Tensor:
        self._whole = False
        logits = self._forward.read(tokens, self._cache, len(self._cached))[0]
        self._cached += tokens
        self._whole = True
        return logits

    def _cut(self, length: int) -> int:
        """Forget all but the first ``length`` tokens, or more where there is no other way; how many are left."""
        self._whole = False
        del self._cached[length:]
        if self._forward.plain:
            for layer in self._cache.layers:
                if layer.is_initialized:
                    layer.keys, layer.values = layer.keys[:, :, :length], layer.values[:, :, :length]
        else:  # what was read cannot be taken back
            self._cache, length = self._forward.new_cache(), 0
            self._cached.clear()
        return length
