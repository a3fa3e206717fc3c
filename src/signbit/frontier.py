"""The best known recipe for a budget of bits, by measurement.

signbit/recipes/frontier.json holds what was measured, by one command (benchmarks/frontier.py): for each budget a preset
with changed keys, and what came of it on the demo model. ``quantize --bits B`` takes the recipe of the largest measured
budget that B pays for, and lets it use all of B, up to 2.5 bits: what is best beyond that is not ours to say.
"""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from importlib import resources
from typing import Any

from signbit.errors import SignbitError
from signbit.recipe import Recipe

# Bits a weight up to which a recipe is given all that is asked for.
_MOST = 2.5


@dataclass(frozen=True)
class Measured:
    """A recipe and what it made of the demo model.

    budget: bits a weight that it must not exceed; stored: those that it takes; recipe: a preset; changes: of its keys;
    perplexity: by text, that of the original under ``original``; minutes: of quantizing, on ``machine``.
    """

    budget: float
    recipe: str
    changes: dict[str, Any]
    stored: float
    perplexity: dict[str, float]
    original: dict[str, float]
    minutes: float
    machine: str


def measurements() -> list[Measured]:
    """All of them, fewest bits first."""
    text = (resources.files("signbit") / "recipes" / "frontier.json").read_text(encoding="utf-8")
    return sorted((Measured(**row) for row in json.loads(text)), key=lambda row: row.budget)


def recipe_for(bits: float, overrides: dict[str, Any] | None = None) -> Recipe:
    """The best known recipe that stores at most ``bits`` a weight; ``overrides`` replace its keys.

    SignbitError if fewer bits are asked for than anything measured takes.
    """
    if not 0 < bits < math.inf:
        raise SignbitError(f"bits must be a number above 0, got {bits}")
    known = measurements()
    paid = [row for row in known if row.budget <= bits]
    if not paid:
        raise SignbitError(
            f"no recipe is known for {bits:g} bits a weight, the least is {known[0].budget:g}: "
            "name a recipe, such as sign-factors with --set bits"
        )
    best = paid[-1]
    own = {"bits": min(bits, _MOST)} if "bits" in best.changes else {}
    return Recipe.load(best.recipe, {**best.changes, **own, **(overrides or {})})
