"""Choices under one budget: never beyond it, and as good as any search up to one step."""

from __future__ import annotations

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from signbit.budget.knapsack import choose
from signbit.errors import SignbitError

Table = list[list[float]]
items = st.lists(
    st.lists(st.tuples(st.integers(1, 30), st.integers(0, 100)), min_size=2, max_size=4), min_size=1, max_size=5
)


def total(table: Table, chosen: list[int]) -> float:
    return sum(row[k] for row, k in zip(table, chosen, strict=True))


def best(costs: Table, losses: Table, budget: float) -> float:
    every = itertools.product(*(range(len(row)) for row in costs))
    return min(total(losses, list(one)) for one in every if total(costs, list(one)) <= budget)


@given(items, st.integers(0, 60))
def test_within_the_budget_and_within_one_step_of_the_best(tables: list[list[tuple[int, int]]], more: int) -> None:
    costs: Table = [[float(cost) for cost, _ in row] for row in tables]
    losses: Table = [[float(loss) for _, loss in row] for row in tables]
    budget = sum(map(min, costs)) + more
    chosen = choose(costs, losses, budget)
    assert total(costs, chosen) <= budget
    largest_step = max(max(row) - min(row) for row in losses)
    assert total(losses, chosen) <= best(costs, losses, budget) + largest_step


def test_exact_where_steps_fit() -> None:
    costs, losses = [[1.0, 2.0, 3.0]] * 3, [[9.0, 4.0, 3.0], [90.0, 40.0, 30.0], [0.9, 0.4, 0.3]]
    assert choose(costs, losses, 7.0) == [2, 2, 0]
    assert choose(costs, losses, 6.0) == [1, 2, 0]
    assert choose(costs, losses, 3.0) == [0, 0, 0]
    assert choose(costs, losses, 99.0) == [2, 2, 2]


def test_what_is_dearer_and_worse_is_never_chosen() -> None:
    assert choose([[1.0, 2.0, 3.0]], [[5.0, 7.0, 4.0]], 2.5) == [0]


def test_a_budget_below_the_least() -> None:
    with pytest.raises(SignbitError, match="below"):
        choose([[2.0, 3.0]], [[1.0, 0.0]], 1.0)
