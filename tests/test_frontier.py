"""The best known recipe by budget."""

from __future__ import annotations

import math
from itertools import pairwise
from pathlib import Path

import pytest

from signbit import SignbitError
from signbit.cli import main
from signbit.frontier import measurements, recipe_for


def test_every_measurement_is_of_a_recipe_and_within_its_budget() -> None:
    rows = measurements()
    assert rows
    for row in rows:
        assert row.stored <= row.budget
        assert recipe_for(row.budget).method.name
        assert row.perplexity.keys() == row.original.keys()


def test_more_bits_never_choose_what_is_worse() -> None:
    rows = measurements()
    for fewer, more in pairwise(rows):
        assert all(more.perplexity[text] <= fewer.perplexity[text] for text in more.perplexity)


def test_a_recipe_with_a_budget_of_its_own_gets_all_of_it() -> None:
    first = measurements()[0]
    assert recipe_for(first.budget + 0.01).to_dict()["bits"] == first.budget + 0.01
    assert recipe_for(2.5).to_dict()["bits"] == recipe_for(16).to_dict()["bits"] == 2.5
    assert recipe_for(first.budget, {"bits": 0.4, "samples": 3}).to_dict()["bits"] == 0.4


@pytest.mark.parametrize("bits", [0.0, -1.0, 0.01, math.nan])
def test_budgets_that_nothing_is_known_for(bits: float) -> None:
    with pytest.raises(SignbitError, match="bits"):
        recipe_for(bits)


def test_bits_and_a_recipe_do_not_go_together(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["quantize", "demo", "--out", str(tmp_path / "out"), "--bits", "1", "--recipe", "billm"]
    assert main(arguments) == 2
    assert "--bits chooses the recipe" in capsys.readouterr().err
