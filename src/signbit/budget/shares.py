"""Each linear's share of a budget.

For each linear and each value of the option that varies, the method is asked for the matrix, and what is kept of it is
two numbers: the bits that it stores, and its relative output error e on the original model's inputs,

    e = tr(D H D^T) / tr(W H W^T)        loss = s e

with s what an error of that linear costs the model's predictions (sensitivity.py). Losses of different linears are
taken to add up, as they do to second order for errors that have nothing to do with each other, and the values are
chosen together (knapsack.py).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch

from signbit.budget.knapsack import choose
from signbit.budget.options import BudgetOptions
from signbit.calibration.hessian import factorize, quadratic
from signbit.errors import SignbitError
from signbit.methods.options import LinearSurvey, Method, MethodOptions


@dataclass(frozen=True)
class Tried:
    """What became of one linear with each value: the bits that it stores, and its relative output error."""

    weights: int
    bits: list[float]
    errors: list[float]


class Candidates:
    """The options that one linear may get, one for each value of the budget, and what each makes of it."""

    def __init__(self, method: Method, options: MethodOptions, budget: BudgetOptions, damping: float) -> None:
        self.budget = budget
        self.options = [_changed(options, {budget.vary: value}) for value in budget.values]
        self._probes = [_changed(one, budget.probe) for one in self.options]
        self._method, self._damping = method, damping

    def try_on(self, linear: LinearSurvey) -> Tried:
        tried = [self._try(linear, probe) for probe in self._probes]
        return Tried(linear.weight.numel(), [bits for bits, _ in tried], [error for _, error in tried])

    def _try(self, linear: LinearSurvey, options: MethodOptions) -> tuple[float, float]:
        hessian = linear.hessian
        factor = None if hessian is None else factorize(hessian, self._damping)
        packed = self._method.quantize(linear.weight, factor, options)
        difference = linear.weight - packed.dequantize()
        against = torch.eye(linear.weight.shape[1], device=difference.device) if hessian is None else hessian
        power = quadratic(linear.weight, against)
        return 8 * sum(packed.items().values()), quadratic(difference, against) / power if power else 0.0


def share_out(
    tried: Mapping[str, Tried], sensitivities: Mapping[str, float], candidates: Candidates
) -> dict[str, MethodOptions]:
    """The options of each linear, which is tried with ``candidates``."""
    budget = candidates.budget
    costs = [one.bits for one in tried.values()]
    losses = [[sensitivities[name] * error for error in one.errors] for name, one in tried.items()]
    weights = sum(one.weights for one in tried.values())
    try:
        chosen = choose(costs, losses, budget.bits * weights)
    except SignbitError as error:
        least = sum(map(min, costs)) / weights
        raise SignbitError(
            f"budget.bits {budget.bits:g} is less than the {least:.3f} bits a weight that the smallest of "
            f"budget.values take: give smaller values of {budget.vary}, or more bits"
        ) from error
    return {name: candidates.options[k] for name, k in zip(tried, chosen, strict=True)}


def _changed(options: MethodOptions, changes: dict[str, object]) -> MethodOptions:
    """The options with other values, checked as those of a recipe are."""
    unknown = changes.keys() - type(options).model_fields.keys()
    if unknown:
        raise SignbitError(f"budget: the method has no option {min(unknown)!r}")
    try:
        return type(options)(**{**options.model_dump(), **changes})
    except ValueError as error:
        raise SignbitError(f"budget: {changes} cannot be set: {' '.join(str(error).split())}") from error
