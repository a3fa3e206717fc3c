"""The command that makes a checkpoint again, from the recipe that is in it.

The recipe is written as the preset that it differs least from and what is different, which is how people give it.
"""

from __future__ import annotations

import json
import shlex
from typing import Any

from signbit.errors import SignbitError
from signbit.recipe import Recipe, presets

# Where there is no preset, such as for what a training of OneBit starts from, the recipe has to be a file.
RECIPE_FILE = "recipe.yaml"
_SHORTCUTS = ("calib", "samples", "seqlen", "seed")


def command_of(recipe: dict[str, Any], source: str) -> str | None:
    """``signbit quantize`` or ``signbit train`` with everything that makes ``recipe``; None if it is of another version
    of signbit and not valid in this one."""
    try:
        wanted = Recipe(recipe)
    except SignbitError:
        return None
    full = wanted.to_dict()
    name, different = _nearest_preset(full)
    parts = ["signbit", "train" if wanted.training else "quantize", source, "--out", "DIR", "--recipe", name]
    for key, value in different.items():
        if key in _SHORTCUTS and value is not None:
            parts += [f"--{key}", str(value)]
        else:
            parts += ["--set", f"{key}={json.dumps(value, ensure_ascii=False)}"]
    return shlex.join(parts)


def _nearest_preset(full: dict[str, Any]) -> tuple[str, dict[str, Any]]:
    """The preset of the same method, and of the same command, with the fewest other values; and these values."""
    best: tuple[str, dict[str, Any]] | None = None
    for name in presets():
        preset = Recipe.load(name).to_dict()
        if preset["method"] != full["method"] or not preset.keys() <= full.keys():
            continue  # a preset for training cannot be made one for quantizing
        different = {key: value for key, value in full.items() if preset.get(key, full) != value}
        if best is None or len(different) < len(best[1]):
            best = name, different
    return best or (RECIPE_FILE, {})
