"""One choice for each item under one budget: the multiple-choice knapsack, by its Lagrangian.

    minimise  sum_i loss[i][k_i]      subject to  sum_i cost[i][k_i] <= budget

For a price p each item by itself takes the choice of least loss + p cost. The total cost falls as p rises, and for the
p at which it just fits, no other choices of that cost or less have a lower loss (Everett 1963). Those choices lie on
the items' lower convex hulls; what the budget leaves over is smaller than one step of one hull, and is spent on the
single changes that then gain the most.
"""

from __future__ import annotations

from collections.abc import Sequence

from signbit.errors import SignbitError


def choose(costs: Sequence[Sequence[float]], losses: Sequence[Sequence[float]], budget: float) -> list[int]:
    """k of each item; SignbitError if even the cheapest choices exceed the budget."""
    chosen = [_cheapest(cost, loss) for cost, loss in zip(costs, losses, strict=True)]
    least = sum(cost[k] for cost, k in zip(costs, chosen, strict=True))
    if least > budget:
        raise SignbitError(f"a budget of {budget:,.0f} bits is below {least:,.0f}, the least that the values can cost")
    # Steps up the hulls, the best gain for its cost first: the same as lowering the price step by step.
    steps = sorted(
        (
            (gain / cost, i, k, cost)
            for i in range(len(costs))
            for k, cost, gain in _hull(costs[i], losses[i], chosen[i])
        ),
        key=lambda step: -step[0],
    )
    left = budget - least
    for _, i, k, cost in steps:
        if cost > left:
            break
        chosen[i], left = k, left - cost
    return _spend_rest(costs, losses, chosen, left)


def _cheapest(cost: Sequence[float], loss: Sequence[float]) -> int:
    return min(range(len(cost)), key=lambda k: (cost[k], loss[k]))


def _hull(cost: Sequence[float], loss: Sequence[float], start: int) -> list[tuple[int, float, float]]:
    """Steps (to which choice, what it costs more, what it gains) along the lower convex hull, from ``start`` on."""
    steps: list[tuple[int, float, float]] = []
    at = start
    while True:
        better = [k for k in range(len(cost)) if cost[k] > cost[at] and loss[k] < loss[at]]
        if not better:
            return steps
        best = max(better, key=lambda k: ((loss[at] - loss[k]) / (cost[k] - cost[at]), cost[k]))
        steps.append((best, cost[best] - cost[at], loss[at] - loss[best]))
        at = best


def _spend_rest(
    costs: Sequence[Sequence[float]], losses: Sequence[Sequence[float]], chosen: list[int], left: float
) -> list[int]:
    while True:
        gains = [
            (losses[i][at] - losses[i][k], i, k)
            for i, at in enumerate(chosen)
            for k in range(len(costs[i]))
            if costs[i][k] - costs[i][at] <= left and losses[i][k] < losses[i][at]
        ]
        if not gains:
            return chosen
        _, i, k = max(gains)
        left -= costs[i][k] - costs[i][chosen[i]]
        chosen[i] = k
