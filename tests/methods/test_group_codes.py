"""What every code of a group promises to the sweep and to the descent."""

from typing import Any

import pytest
import torch

from choosing import all_values
from matrices import random_factor, random_weight
from signbit.methods import sweep as module
from signbit.methods.sweep import GroupCode
from signbit.recipe import Recipe

RUNS = [
    "xnor",
    "xnor planes=3 mean=true",
    "billm-plus",
    "billm-plus mean=true",
    "arb-llm-x feedback=column",
    "arb-llm-rc feedback=column",
    "arb-llm-plus",
    "hbllm-plus",
    "hbllm-column feedback=column",
    "stbllm-plus",
    "stbllm feedback=column",
    "stbllm-1-4",
    "pb-llm-plus",
    "pb-llm code_scope=group",
    "gptq-2",
]


def codes_of(run: str, monkeypatch: pytest.MonkeyPatch) -> list[GroupCode]:
    """The codes of a small matrix before any pass of descent."""
    codes: list[GroupCode] = []
    original = module.sweep

    def recording(*arguments: Any) -> list[Any]:
        found = original(*arguments)
        codes.extend(found)
        return found

    for name in ("xnor", "split_code", "billm", "arb_llm", "hbllm", "stbllm", "pb_llm", "rtn", "column_scales"):
        monkeypatch.setattr(f"signbit.methods.{name}.sweep", recording, raising=False)
    preset, *changes = run.split()
    fields: dict[str, Any] = dict(change.split("=") for change in changes)
    fields = {key: value == "true" if value in ("true", "false") else value for key, value in fields.items()}
    recipe = Recipe.load(preset, {"group_size": 32, "passes": 0, "samples": 1, **fields})
    recipe.method.quantize(random_weight(12, 64), random_factor(64), recipe.options)
    assert len(codes) >= 2
    return codes


@pytest.mark.parametrize("run", RUNS)
def test_values_are_coefficients_times_features_whatever_their_sign(run: str, monkeypatch: pytest.MonkeyPatch) -> None:
    generator = torch.Generator().manual_seed(0)
    for code in codes_of(run, monkeypatch):
        features = code.features()
        assert features.shape[1:] == code.values().shape
        coefficients = torch.randn(features.shape[:2], generator=generator).half().float()
        if run.startswith("gptq"):
            coefficients.abs_()  # a step between levels; there is no sign to turn
        code.set_coefficients(coefficients)
        assert torch.allclose(code.values(), (coefficients.unsqueeze(2) * features).sum(0), atol=2e-2)


@pytest.mark.parametrize("run", RUNS)
def test_what_is_chosen_is_what_values_are(run: str, monkeypatch: pytest.MonkeyPatch) -> None:
    generator = torch.Generator().manual_seed(1)
    for code in codes_of(run, monkeypatch):
        choices, (n, k) = code.choices(), code.values().shape
        which = choices.which.expand(k, n).long()
        assert which.min() >= 0 and which.max() < len(choices.tables)
        counts = choices.counts[which]
        places = (torch.rand(k, n, generator=generator) * counts).long()
        code.choose(places.to(torch.uint8))
        found, wanted = code.values().T, all_values(choices)[which, places, torch.arange(n)]
        assert torch.allclose(found, wanted, atol=1e-6) if choices.even else torch.equal(found, wanted)
