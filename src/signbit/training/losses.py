"""The losses of distillation, each a mean per token, so that weights mean the same for any length and batch.

    kl      KL(teacher || student) = sum_v p_v (log p_v - log q_v)       of the next token's distribution, temperature 1
    hidden  sum over blocks of | t / |t| - s / |s| |^2                   of hidden states t and s, Euclidean norms
    lm      -log q_v of the token that follows                           over the positions that have one

These are OneBit's terms (arXiv 2402.11295, section 3.4) and PB-LLM's (arXiv 2310.00034, section 3.4). OneBit's paper
averages over tokens too, but its code sums KL over the positions of a sequence and divides by the batch only: its
weight of 0.01 at 2048 tokens is 20.48 here. As in that code the sum over blocks has no term for the last: there, KL
speaks. (It has one for the embeddings, which is zero, since both models have the same.)

Logits exist for a few positions at a time. The gradient with respect to them is known in closed form,

    d(a kl + b lm) / d logits = (a + b) q - a p - b e_v                  e_v: the token that follows

so each piece goes through the head, gives its loss, goes back through the head and is forgotten: beside the gradient of
the last hidden states nothing is kept for the backward pass. The hidden term keeps the states that are there anyway and
one number a token.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from signbit.training.options import TrainingOptions
from signbit.training.states import States

HeadLike = Callable[[Tensor], Tensor]

# Positions whose logits exist at once: three float32 matrices of 150,000 logits then take 450 MB.
_CHUNK = 256
# exp(-40) is nothing beside 1, but a number that CPUs multiply fast: what is left of exp(-100) in float32 takes them a
# hundred times as long, and a confident model has many of those.
_FLOOR = -40.0
# Hidden states shorter than this are taken for zero, which has no direction.
_LEAST = 1e-12


@dataclass(frozen=True)
class Losses:
    """total: what is minimised; terms: each with a weight by its name, detached."""

    total: Tensor
    terms: dict[str, Tensor]


def distillation(
    options: TrainingOptions,
    student: States,
    teacher: States,
    ids: Tensor,
    student_head: HeadLike | None,
    teacher_head: HeadLike | None,
) -> Losses:
    """The losses of one batch of ids [batch, tokens]; only what has a weight is computed."""
    terms: dict[str, Tensor] = {}
    parts: list[Tensor] = []
    if options.kl or options.lm:
        assert student.last is not None
        assert student_head is not None
        weighted, kl, lm = _Prediction.apply(
            student.last.flatten(0, 1),
            teacher.last.flatten(0, 1) if options.kl and teacher.last is not None else None,
            _following(ids) if options.lm else None,
            student_head,
            teacher_head,
            options.kl,
            options.lm,
        )
        parts.append(weighted)
        terms |= {"kl": kl} if options.kl else {}
        terms |= {"lm": lm} if options.lm else {}
    if options.hidden:
        hidden = sum(map(hidden_distance, student.hidden, teacher.hidden), ids.new_zeros((), dtype=torch.float32))
        parts.append(options.hidden * hidden)
        terms["hidden"] = hidden.detach()
    return Losses(torch.stack(parts).sum(), terms)


def hidden_distance(student: Tensor, teacher: Tensor) -> Tensor:
    """Mean over tokens of the squared distance between unit vectors; both [..., width]."""
    distance: Tensor = _Distance.apply(student, teacher)
    return distance


@torch.no_grad()
def cross_entropies(last: Tensor, ids: Tensor, head: HeadLike) -> Tensor:
    """Mean negative log likelihood [batch] of each window in ids [batch, tokens], from last hidden states."""
    losses = []
    for states, window in zip(last, ids, strict=True):
        loss = torch.zeros((), dtype=torch.float64, device=last.device)
        for start in range(0, len(window) - 1, _CHUNK):
            rows = slice(start, min(start + _CHUNK, len(window) - 1))
            targets = window[rows.start + 1 : rows.stop + 1]
            loss += F.cross_entropy(head(states[rows]), targets, reduction="sum")
        losses.append(loss / (len(window) - 1))
    return torch.stack(losses)


def _following(ids: Tensor) -> Tensor:
    """For each position the token that follows, flat; -1 where a sequence ends."""
    return F.pad(ids[:, 1:], (0, 1), value=-1).flatten()


class _Prediction(torch.autograd.Function):
    """(weighted sum, kl, lm) of last hidden states [tokens, width]; only the first has a gradient."""

    @staticmethod
    def forward(
        ctx: Any,
        last: Tensor,
        teacher: Tensor | None,
        targets: Tensor | None,
        head: HeadLike,
        teacher_head: HeadLike | None,
        kl_weight: float,
        lm_weight: float,
    ) -> tuple[Tensor, Tensor, Tensor]:
        count = len(last)
        predicted = 0 if targets is None else int((targets >= 0).sum())
        of_kl, of_lm = kl_weight / count, lm_weight / max(predicted, 1)
        kl, lm = last.new_zeros((), dtype=torch.float32), last.new_zeros((), dtype=torch.float32)
        gradient = torch.empty_like(last)
        for start in range(0, count, _CHUNK):
            rows = slice(start, start + _CHUNK)
            with torch.enable_grad():
                states = last[rows].detach().requires_grad_()
                logits = head(states)
            log_q = logits.detach().log_softmax(-1)
            wanted = torch.zeros((), device=last.device)
            share = torch.full((len(states), 1), of_kl, device=last.device)
            if teacher is not None:
                assert teacher_head is not None
                log_p = teacher_head(teacher[rows]).log_softmax(-1)
                p = log_p.clamp(min=_FLOOR).exp_()
                kl += torch.dot(p.flatten(), log_p.sub_(log_q).flatten())
                wanted = p.mul_(-of_kl)
            if targets is not None:
                there = targets[rows] >= 0
                lm -= log_q.gather(1, targets[rows].clamp(min=0).unsqueeze(1)).squeeze(1)[there].sum()
                share = share + of_lm * there.unsqueeze(1)
            slope = log_q.clamp_(min=_FLOOR).exp_().mul_(share).add_(wanted)
            if targets is not None:
                slope.scatter_add_(1, targets[rows].clamp(min=0).unsqueeze(1), -of_lm * there.unsqueeze(1).float())
            (gradient[rows],) = torch.autograd.grad(logits, states, slope)
        kl, lm = kl / count, lm / max(predicted, 1)
        ctx.save_for_backward(gradient)
        ctx.mark_non_differentiable(kl, lm)
        return kl_weight * kl + lm_weight * lm, kl, lm

    @staticmethod
    def backward(ctx: Any, *upstream: Tensor) -> tuple[Tensor | None, ...]:
        (gradient,) = ctx.saved_tensors
        return gradient * upstream[0].to(gradient.dtype), None, None, None, None, None, None


class _Distance(torch.autograd.Function):
    """mean | s/|s| - t/|t| |^2, whose gradient in s is 2 (cos s/|s| - t/|t|) / |s| a token."""

    @staticmethod
    def forward(ctx: Any, student: Tensor, teacher: Tensor) -> Tensor:
        s, t = student.float(), teacher.float()
        of_s, of_t = _inverse_norm(s), _inverse_norm(t)
        cosine = (s * t).sum(-1, keepdim=True) * of_s * of_t
        ctx.save_for_backward(student, teacher, of_s, of_t, cosine)
        # A state of zero has no direction: its unit vector is zero, and the distance that of the other from zero.
        lengths = (of_s > 0).float() + (of_t > 0).float()
        return (lengths - 2 * cosine).mean()

    @staticmethod
    def backward(ctx: Any, *upstream: Tensor) -> tuple[Tensor | None, ...]:
        student, teacher, of_s, of_t, cosine = ctx.saved_tensors
        scale = upstream[0] * 2 / math.prod(student.shape[:-1])
        gradient = student.float() * (scale * cosine * of_s * of_s)
        gradient -= teacher.float() * (scale * of_s * of_t)
        return gradient.to(student.dtype), None


def _inverse_norm(x: Tensor) -> Tensor:
    """1 / |x| over the last dimension, kept; 0 where x vanishes."""
    norm = torch.linalg.vector_norm(x, dim=-1, keepdim=True)
    return torch.where(norm > _LEAST, 1 / norm, 0.0)
