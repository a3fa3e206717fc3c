"""The command that a page shows makes the recipe that it shows."""

import shlex
from typing import Any

import pytest

from signbit.recipe import Recipe, parse_overrides, presets
from signbit.report.command import RECIPE_FILE, command_of


def read_back(command: str) -> Recipe:
    """What the command line makes of it."""
    _, _, _, *options = shlex.split(command)
    given = dict(pair for pair in zip(options[::2], options[1::2], strict=True) if pair[0] != "--set")
    overrides = parse_overrides(
        value for name, value in zip(options[::2], options[1::2], strict=True) if name == "--set"
    )
    shortcuts = {key: given[f"--{key}"] for key in ("calib", "samples", "seqlen", "seed") if f"--{key}" in given}
    return Recipe.load(given["--recipe"], {**overrides, **shortcuts})


@pytest.mark.parametrize("name", presets())
def test_presets_are_recognised(name: str) -> None:
    recipe = Recipe.load(name, {"seed": 5, "calib": "a file's <name>.txt", "skip": ["*.v_proj", "é"]})
    command = command_of(recipe.to_dict(), "MODEL")
    assert command is not None
    assert command.split()[:3] == ["signbit", "train" if recipe.training else "quantize", "MODEL"]
    assert f"--recipe {name} " in command
    assert read_back(command).to_dict() == recipe.to_dict()


def test_what_no_preset_makes() -> None:
    start = Recipe.load("onebit").without_training().to_dict()
    command = command_of(start, "-a model")
    assert command is not None
    assert command.endswith(f"--recipe {RECIPE_FILE}")


@pytest.mark.parametrize("recipe", [{}, {"method": "of tomorrow"}, {"method": "billm", "unheard_of": 1}])
def test_recipes_of_other_versions(recipe: dict[str, Any]) -> None:
    assert command_of(recipe, "MODEL") is None
