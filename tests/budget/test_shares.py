"""A budget in a recipe: met, by giving more to linears that need it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import signbit
from signbit import Recipe, SignbitError
from signbit.budget.options import BudgetOptions
from signbit.budget.shares import Candidates, share_out
from signbit.methods import METHODS
from signbit.methods.options import LinearSurvey
from signbit.methods.sign_factors import SignFactorsOptions

MakeDir = Callable[..., Path]
FACTORS = {"method": "sign-factors", "iterations": 10}
# One method for each kind of option that may vary.
VARIED: dict[str, dict[str, Any]] = {
    "bits": {**FACTORS, "budget": {"bits": 3.0, "values": [2.0, 3.0, 4.0, 6.0], "probe": {"iterations": 3}}},
    "keep": {
        "method": "stbllm",
        "group_size": 32,
        "budget": {"bits": 9.0, "vary": "keep", "values": [2, 4, 6]},
    },
    "planes": {"method": "xnor", "mean": False, "budget": {"bits": 3.0, "vary": "planes", "values": [1, 2, 3]}},
    "group_size": {"method": "billm", "budget": {"bits": 6.5, "vary": "group_size", "values": [16, 32, 64]}},
}


def recipe(text_file: Path, vary: str, **fields: Any) -> Recipe:
    return Recipe({**VARIED[vary], "samples": 8, "seqlen": 48, "calib": str(text_file), **fields})


@pytest.mark.parametrize("vary", VARIED)
def test_the_total_is_met(vary: str, tiny_dir: MakeDir, text_file: Path, tmp_path: Path) -> None:
    signbit.quantize(tiny_dir("llama"), tmp_path / "out", recipe(text_file, vary))
    found = signbit.inspect(tmp_path / "out")
    wanted = VARIED[vary]["budget"]["bits"]
    assert 0.8 * wanted < found["bits_per_weight"] <= wanted


def test_linears_that_predictions_depend_on_get_more() -> None:
    generator = torch.Generator().manual_seed(0)
    weight, x = torch.randn(64, 64, generator=generator), torch.randn(200, 64, generator=generator)
    linear = LinearSurvey(weight, 2 * x.T @ x / len(x))
    method = METHODS["sign-factors"]
    budget = BudgetOptions(bits=3.0, values=(2.0, 3.0, 4.0))
    candidates = Candidates(method, SignFactorsOptions(iterations=5), budget, damping=0.01)
    tried = candidates.try_on(linear)
    found = share_out({"a": tried, "b": tried}, {"a": 10.0, "b": 0.1}, candidates)
    a, b = (found[name].model_dump() for name in "ab")
    assert a["bits"] > b["bits"] and a["iterations"] == 5


def test_an_interrupted_run_keeps_its_choices(tiny_dir: MakeDir, text_file: Path, tmp_path: Path) -> None:
    model = tiny_dir("llama")
    signbit.quantize(model, tmp_path / "whole", recipe(text_file, "bits"))

    class StoppedError(Exception):
        pass

    with pytest.MonkeyPatch.context() as patch:
        write_block = signbit.journal.Journal.write_block

        def stop(self: Any, index: int, block: Any) -> None:
            write_block(self, index, block)
            raise StoppedError

        patch.setattr(signbit.journal.Journal, "write_block", stop)
        with pytest.raises(StoppedError):
            signbit.quantize(model, tmp_path / "out", recipe(text_file, "bits"))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("signbit.blockwise.allocate.share_out", None)
        signbit.quantize(model, tmp_path / "out", recipe(text_file, "bits"), resume=True)
    files = [tmp_path / name / "model.safetensors" for name in ("whole", "out")]
    assert files[0].read_bytes() == files[1].read_bytes()


@pytest.mark.parametrize(
    ("budget", "message"),
    [
        ({"bits": 0.01, "values": [2.0, 3.0]}, "less than the .* that the smallest of budget.values"),
        ({"bits": 3.0, "vary": "nope", "values": [2.0, 3.0]}, "no option 'nope'"),
        ({"bits": 3.0, "values": [2.0, -3.0]}, "cannot be set"),
        ({"bits": 3.0, "values": [2.0, 3.0], "probe": {"iterations": 0}}, "cannot be set"),
    ],
)
def test_budgets_that_make_no_sense(
    budget: dict[str, Any], message: str, tiny_dir: MakeDir, text_file: Path, tmp_path: Path
) -> None:
    with pytest.raises(SignbitError, match=message):
        signbit.quantize(tiny_dir("llama"), tmp_path / "out", recipe(text_file, "bits", budget=budget))


@pytest.mark.parametrize("budget", [{"bits": 3.0, "values": [2.0]}, {"values": [1, 2]}, {"bits": -1, "values": [1, 2]}])
def test_recipes_refuse_what_is_no_budget(budget: dict[str, Any], text_file: Path) -> None:
    with pytest.raises(SignbitError, match="budget"):
        recipe(text_file, "bits", budget=budget)
