"""Rounding columns in turn: each weight to the nearest value that it may have, each column after those before it.

    t_j  <-  t_j + sum over i < j of  S_ji c_i           what the changes of the columns before mean for this one
    q_j  =   the nearest to t_j of the values that each weight may have
    c_j  =   q_j - b_j                                   its change: from what it was before, or from t_j itself

With S from the Hessian's factor and changes from t this is the inner loop of GPTQ (sweep.py); with S from the Hessian,
and changes from the values before, it is a round of coordinate descent (descent.py). Columns depend on each other, rows
do not: in C++ and in Triton a few rows go through all columns at a time.

A code says what its weights may become as :class:`Choices`, tables of values, and is told the places in them. So codes
need not know how the nearest is found, and what finds it need not know codes. Of values that are alike, as those with
either sign of a scale of 0, a target below them gets the last and any other the first: with positive signs first in a
table, that is still the sign of what is left, from which a fit can bring the scale back.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from signbit.kernels import cpu, dispatch
from signbit.kernels.turns import Turns

# Columns in one call of a kernel. What all columns before these mean for them is one matrix product.
TURNS = 128


@dataclass(frozen=True)
class Choices:
    """What the weights of a group, [k, n] with columns first, may become.

    tables: float32 [Z, L, n], L values for the weights of each row, of which table z has the first ``counts`` [Z],
    int32, at most 256: places are bytes. which: int32 [k, n], the table of each weight; [k, 1] where it is the same for
    all rows. even: tables have [Z, 2, n], the first of ``counts`` values and the step from each to the next, which is
    not negative.
    """

    tables: Tensor
    counts: Tensor
    which: Tensor
    even: bool = False

    @classmethod
    def among(cls, values: list[Tensor], which: Tensor) -> Choices:
        """Tables [L_z, n], of which each weight has the one that ``which`` [k, n or 1] names."""
        counts = [len(one) for one in values]
        tables = values[0].new_zeros(len(values), max(counts), values[0].shape[1])
        for table, one in zip(tables, values, strict=True):
            table[: len(one)] = one
        return cls(tables, _counts(counts, which.device), which.int())

    @classmethod
    def of_steps(cls, first: list[Tensor], step: list[Tensor], counts: list[int], which: Tensor) -> Choices:
        """Values that go up from the ``first`` [n] by one ``step`` [n], for each table."""
        tables = torch.stack([torch.stack(pair) for pair in zip(first, step, strict=True)])
        return cls(tables, _counts(counts, which.device), which.int(), even=True)


def _counts(counts: list[int], device: torch.device) -> Tensor:
    return torch.tensor(counts, dtype=torch.int32).to(device)


class Choosing(Protocol):
    """A code whose choices can be made anew, its coefficients as they are."""

    def choices(self) -> Choices: ...

    def choose(self, places: Tensor) -> None:
        """Take the values at these places of each weight's table, uint8 [k, n]."""
        ...


def round_in_turn(
    code: Choosing, targets: Tensor, shares: Tensor | None = None, before: Tensor | None = None
) -> Tensor:
    """Choose for all columns of ``code``; their changes c [k, n].

    All float32. targets: t [k, n]. shares: S [k, k], zero but below the diagonal; None: columns are rounded each by
    itself. before: b [k, n]; None: changes are from the targets, after what they took.
    """
    choices, targets = code.choices(), targets.contiguous()
    before = None if before is None else before.contiguous()
    # Kernels take addresses.
    if any(one is not None and one.dtype != torch.float32 for one in (targets, shares, before, choices.tables)):
        raise TypeError(f"columns are rounded in float32, got {targets.dtype} and values in {choices.tables.dtype}")
    places, changes = torch.empty_like(targets, dtype=torch.uint8), torch.zeros_like(targets)
    for start in range(0, len(targets), TURNS):
        turns = slice(start, start + TURNS)
        target, inner = targets[turns], None
        if shares is not None:
            inner = shares[turns, turns].contiguous()
            if start:
                target = torch.addmm(target, shares[turns, :start], changes[:start])
        was = None if before is None else before[turns]
        tables = choices.tables, choices.counts, choices.even, choices.which[turns]
        _round(Turns(target, inner, was, *tables, places[turns], changes[turns]))
    code.choose(places)
    return changes


def _round(turns: Turns) -> None:
    """At most TURNS columns."""
    if turns.targets.is_cuda and (kernels := dispatch.triton_kernels()) is not None:
        kernels.round_in_turn(turns)
    elif not cpu.round_in_turn(turns):
        reference(turns)


def reference(turns: Turns) -> None:
    """In torch, column by column; the truth that kernels are tested against."""
    rows = torch.arange(turns.targets.shape[1], device=turns.targets.device)
    nearest = _nearest_step if turns.even else _nearest
    for j, target in enumerate(turns.targets.clone()):
        if turns.shares is not None:
            target.addmv_(turns.changes[:j].T, turns.shares[j, :j])
        which = turns.which[j].expand(len(rows)).long()
        turns.places[j], value = nearest(target, turns.tables[which, :, rows], turns.counts[which])
        torch.sub(value, target if turns.before is None else turns.before[j], out=turns.changes[j])


def _nearest(target: Tensor, values: Tensor, count: Tensor) -> tuple[Tensor, Tensor]:
    beyond = torch.arange(values.shape[1], device=values.device) >= count.unsqueeze(1)
    place = (values - target.unsqueeze(1)).abs().masked_fill(beyond, torch.inf).argmin(1, keepdim=True)
    value = values.gather(1, place)
    alike = (values == value) & ~beyond
    last = values.shape[1] - 1 - alike.flip(1).int().argmax(1)
    return torch.where(target < value.squeeze(1), last, place.squeeze(1)), value.squeeze(1)


def _nearest_step(target: Tensor, table: Tensor, count: Tensor) -> tuple[Tensor, Tensor]:
    """Where the step is 0 it is one of the two in the middle, by the side that the target is on."""
    (first, step), last = table.unbind(1), (count - 1).float()
    side = torch.where(target < first, -0.5, 0.5)
    steps = torch.where(step > 0, (target - first) / step, 0.5 * last + side)
    place = (steps.nan_to_num(0.0, torch.inf).clamp(min=0).minimum(last) + 0.5).floor()
    return place, first + place * step
