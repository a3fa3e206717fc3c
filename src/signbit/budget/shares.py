"""Each linear's share of a budget.

For each linear and each value of the option that varies, the method is asked for the matrix, and what is kept of it is
two numbers: the bits that it stores, and its relative output error e on the original model's inputs,

    e = tr(D H D^T) / tr(W H W^T)        loss = s e

with s what an error of that linear costs the model's predictions (sensitivity.py). Losses of different linears are
taken to add up, as they do to second order for errors that have nothing to do with each other, and the values are
chosen together (knapsack.py).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch

from signbit.budget.knapsack import choose
from signbit.budget.options import BudgetOptions
from signbit.calibration.hessian import factorize, quadratic
from signbit.errors import SignbitError
from signbit.methods.options import LinearSurvey, Method, MethodOptions


def share_out(
    linears: Iterable[tuple[str, LinearSurvey]],
    sensitivities: Mapping[str, float],
    method: Method,
    options: MethodOptions,
    budget: BudgetOptions,
    damping: float,
) -> dict[str, MethodOptions]:
    """The options of each linear. linears: (name, what is known of it), one at a time, with their Hessians."""
    candidates = [_changed(options, {budget.vary: value}) for value in budget.values]
    probes = [_changed(one, budget.probe) for one in candidates]
    names, costs, losses, weights = [], [], [], 0
    for name, linear in linears:
        tried = [_try(name, linear, method, probe, damping) for probe in probes]
        names.append(name)
        costs.append([bits for bits, _ in tried])
        losses.append([sensitivities[name] * error for _, error in tried])
        weights += linear.weight.numel()
    try:
        chosen = choose(costs, losses, budget.bits * weights)
    except SignbitError as error:
        least = sum(map(min, costs)) / weights
        raise SignbitError(
            f"budget.bits {budget.bits:g} is less than the {least:.3f} bits a weight that the smallest of "
            f"budget.values take: give smaller values of {budget.vary}, or more bits"
        ) from error
    return {name: candidates[k] for name, k in zip(names, chosen, strict=True)}


def _changed(options: MethodOptions, changes: dict[str, object]) -> MethodOptions:
    """The options with other values, checked as those of a recipe are."""
    unknown = changes.keys() - type(options).model_fields.keys()
    if unknown:
        raise SignbitError(f"budget: the method has no option {min(unknown)!r}")
    try:
        return type(options)(**{**options.model_dump(), **changes})
    except ValueError as error:
        raise SignbitError(f"budget: {changes} cannot be set: {' '.join(str(error).split())}") from error


def _try(
    name: str, linear: LinearSurvey, method: Method, options: MethodOptions, damping: float
) -> tuple[float, float]:
    """Bits stored, and relative output error."""
    hessian = linear.hessian
    factor = None if hessian is None else factorize(hessian, damping)
    packed = method.quantize(linear.weight, factor, options)
    difference = linear.weight - packed.dequantize()
    against = torch.eye(linear.weight.shape[1], device=difference.device) if hessian is None else hessian
    power = quadratic(linear.weight, against)
    return 8 * sum(packed.items().values()), quadratic(difference, against) / power if power else 0.0
