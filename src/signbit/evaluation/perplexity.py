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
from signbit.precision import fast_float32
from signbit.progress import Progress

# Positions whose logits are brought to float32 at once: a vocabulary of 150,000 then takes 150 MB.
_CHUNK = 256


@dataclass(frozen=True)
class TextScore:
    """perplexity; tokens looked at; and, where there is an original, its perplexity, the mean KL(original || model) per
    token in nats, and top1, the share of tokens for which both have the same most likely successor."""

    perplexity: float
    tokens: int
    original_perplexity: float | None = None
    kl: float | None = None
    top1: float | None = None


def windows_of(tokens: Tensor, seqlen: int, limit: int | None, source: str) -> Tensor:
    """The first ``limit`` windows [windows, seqlen] of a text's tokens."""
    count = len(tokens) // seqlen
    if count == 0:
        raise SignbitError(
            f"{source} has {len(tokens):,} tokens, fewer than one window of {seqlen}: "
            "give a longer text or a smaller seqlen"
        )
    count = count if limit is None else min(count, limit)
    return tokens[: count * seqlen].view(count, seqlen)


@torch.inference_mode()
def score(
    model: PreTrainedModel,
    windows: Tensor,
    progress: Progress,
    description: str,
    original: PreTrainedModel | None = None,
) -> TextScore:
    """Score ``model`` on windows [windows, seqlen], against ``original`` if there is one."""
    losses: list[float] = []
    original_losses: list[float] = []
    divergence, agreement = 0.0, 0
    positions = len(windows) * (windows.shape[1] - 1)
    with progress.task(description, len(windows)) as task:
        for window in windows:
            logits = _logits(model, window)
            reference = None if original is None else _logits(original, window)
            loss, original_loss = 0.0, 0.0
            for start in range(0, len(window) - 1, _CHUNK):
                rows = slice(start, min(start + _CHUNK, len(window) - 1))
                targets = window[rows.start + 1 : rows.stop + 1].to(logits.device).unsqueeze(1)
                predicted = logits[rows].float().log_softmax(-1)
                loss -= float(predicted.gather(1, targets).sum())
                if reference is not None:
                    wanted = reference[rows].float().log_softmax(-1)
                    original_loss -= float(wanted.gather(1, targets).sum())
                    divergence += float((wanted.exp() * (wanted - predicted)).sum())
                    agreement += int((wanted.argmax(-1) == predicted.argmax(-1)).sum())
            if not math.isfinite(loss + divergence):
                raise SignbitError("the model's output contains NaN or infinite values: it cannot be scored")
            losses.append(loss / (len(window) - 1))
            original_losses.append(original_loss / (len(window) - 1))
            task.advance()
    if original is None:
        return TextScore(_perplexity(losses), windows.numel())
    return TextScore(
        perplexity=_perplexity(losses),
        tokens=windows.numel(),
        original_perplexity=_perplexity(original_losses),
        kl=divergence / positions,
        top1=agreement / positions,
    )


def _perplexity(losses: list[float]) -> float:
    # The exponential of a hopeless model must still be a number that JSON can hold.
    return math.exp(min(sum(losses) / len(losses), 700.0))


def _logits(model: PreTrainedModel, window: Tensor) -> Tensor:
    with fast_float32():
        logits: Tensor = model(input_ids=window.unsqueeze(0).to(model.device), use_cache=False).logits[0]
    return logits
