"""Choices made anew: of one column of a code, and of random ones, with what must hold of them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from signbit.kernels.turns import Turns
from signbit.methods.rounding import Choices, round_in_turn
from signbit.methods.sweep import GroupCode


def choose_column(code: GroupCode, column: int, weights: Tensor) -> Tensor:
    """The values that one column of ``code`` has for these weights [n], the others' being as they are."""
    targets = code.values().T.contiguous()
    targets[column] = weights
    round_in_turn(code, targets)
    return code.values()[:, column]


def all_values(choices: Choices) -> Tensor:
    """Of each table, [Z, L, n]; what is beyond its count means nothing."""
    if not choices.even:
        return choices.tables
    first, step = choices.tables.split(1, dim=1)
    return first + torch.arange(float(choices.counts.max())).unsqueeze(1) * step


@dataclass
class Rounding:
    """Random arguments of what rounds columns in turn, and its result."""

    targets: Tensor
    shares: Tensor | None
    before: Tensor | None
    choices: Choices
    places: Tensor
    changes: Tensor

    def run(self, round_columns: Callable[..., object], device: str = "cpu") -> None:
        def there(tensor: Tensor | None) -> Any:
            return None if tensor is None else tensor.to(device)

        one = self.choices
        turns = Turns(
            there(self.targets),
            there(self.shares),
            there(self.before),
            there(one.tables),
            there(one.counts),
            one.even,
            there(one.which),
            there(self.places),
            there(self.changes),
        )
        round_columns(turns)
        self.places, self.changes = turns.places.cpu(), turns.changes.cpu()

    def check(self) -> None:
        """Each weight has the nearest of its values to what its target came to, and has changed by that."""
        (k, n), one = self.targets.shape, self.choices
        which, rows = one.which.expand(k, n).long(), torch.arange(n)
        targets = self.targets.double()
        if self.shares is not None:
            targets += self.shares.double() @ self.changes.double()
        counts = one.counts[which].long()
        assert (self.places < counts).all()
        values = all_values(one)[which, :, rows].double()  # [k, n, L]
        distances = (values - targets.unsqueeze(2)).abs()
        beyond = torch.arange(values.shape[2]) >= counts.unsqueeze(2)
        nearest = distances.masked_fill(beyond, torch.inf).amin(2)
        found = values.gather(2, self.places.long().unsqueeze(2)).squeeze(2)
        size = 1 + targets.abs()
        assert ((found - targets).abs() <= nearest + 1e-5 * size).all()
        was = targets if self.before is None else self.before.double()
        assert ((found - was - self.changes).abs() <= 1e-5 * size).all()


def random_rounding(
    n: int, k: int, *, even: bool = False, each_weight: bool = False, shares: bool = True, before: bool = False
) -> Rounding:
    """Three tables of 2, 5 and 16 values; a column has one of them, or each weight."""
    generator = torch.Generator().manual_seed(n + 1000 * k)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    counts = [2, 5, 16]
    which = torch.randint(3, (k, n if each_weight else 1), generator=generator)
    first, step = ([one.abs() * sign for one in normal(3, n)] for sign in (-1, 1))
    by_value = Choices.among([normal(count, n) for count in counts], which)
    return Rounding(
        targets=normal(k, n),
        shares=(normal(k, k) / k**0.5).tril(-1) if shares else None,
        before=normal(k, n) if before else None,
        choices=Choices.of_steps(first, step, counts, which) if even else by_value,
        places=torch.zeros(k, n, dtype=torch.uint8),
        changes=torch.zeros(k, n),
    )
