"""Choosing the next token.

A choice depends on the logits of its own sequence, on its own generator and on nothing else, so that a seed gives the
same text whoever else is being served (as long as rounding does not: a batch adds up in another order, and two nearly
equal logits may change places). One uniform number is drawn a token and looked up in the cumulated probabilities.
"""

from __future__ import annotations

import secrets
from dataclasses import dataclass, field

import torch
from torch import Tensor

# How many of the likeliest tokens are sorted first when a nucleus is looked for; nearly always they hold it.
_SOME = 256


@dataclass(frozen=True)
class Sampling:
    """How tokens are chosen. temperature 0 is greedy; top_p keeps the likeliest tokens that together have it."""

    temperature: float = 0.0
    top_p: float = 1.0
    seed: int | None = None
    frequency_penalty: float = 0.0
    presence_penalty: float = 0.0
    logit_bias: dict[int, float] = field(default_factory=dict)

    @property
    def plain(self) -> bool:
        """Whether it is the likeliest token, as it stands."""
        return self.temperature == 0 and not (self.frequency_penalty or self.presence_penalty or self.logit_bias)


class NotFiniteError(Exception):
    """The model gave no numbers to choose by."""


class Sampler:
    """The choices of one sequence. Different ``index``es under one seed choose independently."""

    def __init__(self, sampling: Sampling, index: int = 0) -> None:
        self._sampling = sampling
        seed = secrets.randbits(62) if sampling.seed is None else sampling.seed
        self._generator = torch.Generator().manual_seed((seed + index) % 2**63)
        self._counts: dict[int, int] = {}

    def choose(self, logits: Tensor) -> int:
        """The next token by the logits [vocabulary]; NotFiniteError if they hold NaN."""
        sampling = self._sampling
        logits = self._adjusted(logits)
        if not bool(torch.isfinite(logits.max())):
            raise NotFiniteError
        token = int(logits.argmax()) if sampling.temperature == 0 else self._draw(logits)
        if sampling.frequency_penalty or sampling.presence_penalty:
            self._counts[token] = self._counts.get(token, 0) + 1
        return token

    def _adjusted(self, logits: Tensor) -> Tensor:
        sampling = self._sampling
        changes = dict(sampling.logit_bias)
        for token, count in self._counts.items():
            penalty = sampling.presence_penalty + count * sampling.frequency_penalty
            changes[token] = changes.get(token, 0.0) - penalty
        if not changes:
            return logits
        return logits.index_add(0, torch.tensor([*changes]), torch.tensor([*changes.values()], dtype=logits.dtype))

    def _draw(self, logits: Tensor) -> int:
        # From the largest down, or a tiny temperature overflows.
        scaled = (logits - logits.max()).double() / self._sampling.temperature
        probabilities = scaled.softmax(-1)
        tokens = None
        if self._sampling.top_p < 1:
            probabilities, tokens = nucleus(probabilities, self._sampling.top_p)
        cumulated = probabilities.cumsum(-1)
        wanted = torch.rand((), generator=self._generator, dtype=torch.float64) * cumulated[-1]
        index = int(torch.searchsorted(cumulated, wanted, right=True).clamp(max=len(cumulated) - 1))
        return index if tokens is None else int(tokens[index])


def nucleus(probabilities: Tensor, top_p: float) -> tuple[Tensor, Tensor]:
    """The fewest likeliest tokens whose probabilities add up to ``top_p``: (probabilities, tokens)."""
    for count in (min(_SOME, len(probabilities)), len(probabilities)):
        best, tokens = probabilities.topk(count)
        cumulated = best.cumsum(-1)
        if cumulated[-1] >= top_p:
            break
    kept = int((cumulated < top_p).sum()) + 1
    return best[:kept], tokens[:kept]
