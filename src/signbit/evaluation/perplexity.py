"""Perplexity by the protocol of GPTQ and of every paper here, and divergence from the original on the same windows.

The whole text is tokenised once, cut into windows of ``seqlen`` tokens that do not overlap (the rest is dropped), and
each window is predicted from its own beginning: perplexity = exp(mean over windows of mean negative log likelihood).
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import PreTrainedModel

from signbit.errors import SignbitError
from signbit.progress import Progress

# Positions whose logits are brought to float32 at once: a vocabulary of 150,000 then takes 150 MB.
_CHUNK = 256


@dataclass(frozen=True)
class TextScore:
    """perplexity; tokens looked at; kl: mean KL(original || model) per token in nats and top1: share of tokens with
    the same most likely successor, both None without an original."""

    perplexity: float
    tokens: int
    kl: float | None = None
    top1: float | None = None


def windows_of(tokens: Tensor, seqlen: int, limit: int | None, source: str) -> Tensor:
    """The first ``limit`` windows [windows, seqlen] of a text's tokens."""
    count = len(tokens) // seqlen
    if count == 0:
        raise SignbitError(
            f"{source} has {len(tokens):,} tokens, fewer than one window of {seqlen}: give more text or a smaller --seqlen"
        )
    count = count if limit is None else min(count, limit)
    return tokens[: count * seqlen].view(count, seqlen)


@torch.inference_mode()
def score(
    model: PreTrainedModel, windows: Tensor, progress: Progress, description: str, original: PreTrainedModel | None = None
) -> TextScore:
    """Score ``model`` on windows [windows, seqlen], against ``original`` if there is one."""
    likelihoods: list[float] = []
    divergence, agreement, positions = 0.0, 0, 0
    with progress.task(description, len(windows)) as task:
        for window in windows:
            logits = _logits(model, window)
            reference = None if original is None else _logits(original, window)
            total = 0.0
            for start in range(0, len(window) - 1, _CHUNK):
                rows = slice(start, min(start + _CHUNK, len(window) - 1))
                targets = window[rows.start + 1 : rows.stop + 1].to(logits.device)
                log_probabilities = logits[rows].float().log_softmax(-1)
                total -= float(log_probabilities.gather(1, targets.unsqueeze(1)).sum())
                if reference is not None:
                    wanted = reference[rows].float().log_softmax(-1)
                    divergence += float((wanted.exp() * (wanted - log_probabilities)).sum())
                    agreement += int((wanted.argmax(-1) == log_probabilities.argmax(-1)).sum())
                    positions += rows.stop - rows.start
            if not math.isfinite(total):
                raise SignbitError("the model's output contains NaN or infinite values: it cannot be scored")
            likelihoods.append(total / (len(window) - 1))
            task.advance()
    mean = sum(likelihoods) / len(likelihoods)
    # exp() of a hopeless model must still be a number that JSON can hold.
    perplexity = math.exp(min(mean, 700.0))
    if original is None:
        return TextScore(perplexity, windows.numel())
    return TextScore(perplexity, windows.numel(), divergence / positions, agreement / positions)


def _logits(model: PreTrainedModel, window: Tensor) -> Tensor:
    logits: Tensor = model(input_ids=window.unsqueeze(0).to(model.device), use_cache=False).logits[0]
    return logits
