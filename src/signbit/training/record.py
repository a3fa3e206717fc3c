"""What a training has seen: losses of each step, held-out perplexities; and whether there is a point in going on.

Kept in each snapshot, and as signbit_training.json in the finished checkpoint. No timings: a run that was interrupted
ends in the same bytes as one that was not.
"""

from __future__ import annotations

import dataclasses
import json
import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from signbit.errors import SignbitError

FILE = "signbit_training.json"
# Steps for which the loss must have been so many times the first one.
_PATIENCE, _FACTOR = 50, 2.0


@dataclass
class Record:
    """losses: for each step ``loss``, its terms unweighted, and the ``gradient`` norm before clipping; heldout:
    (steps done, perplexity of the held-out windows)."""

    losses: list[dict[str, float]] = field(default_factory=list)
    heldout: list[tuple[int, float]] = field(default_factory=list)

    @property
    def steps(self) -> int:
        return len(self.losses)

    def trouble(self) -> str | None:
        """What is wrong with the last step; None if nothing is."""
        for name in ("loss", "gradient"):
            value = self.losses[-1][name] if self.losses else 0.0
            if not math.isfinite(value):
                return f"the {name} is {value}"
        if self.heldout and not math.isfinite(self.heldout[-1][1]):
            return f"the held-out perplexity is {self.heldout[-1][1]}"
        recent = [step["loss"] for step in self.losses[-_PATIENCE:]]
        if len(self.losses) > _PATIENCE and min(recent) > _FACTOR * self.losses[0]["loss"]:
            return f"the loss has been above {_FACTOR:g} times its first value for {_PATIENCE} steps: it diverges"
        return None

    def to_json(self) -> str:
        return json.dumps(dataclasses.asdict(self))

    @classmethod
    def from_json(cls, text: str, file: Path) -> Record:
        try:
            fields: dict[str, Any] = json.loads(text)
            return cls(
                losses=fields["losses"], heldout=[(int(step), float(value)) for step, value in fields["heldout"]]
            )
        except (ValueError, KeyError, TypeError) as error:
            raise SignbitError(f"{file} is damaged: start again with --overwrite") from error
