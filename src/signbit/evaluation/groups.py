"""The papers' averages.

| group | tasks | paper |
|---|---|---|
| ``onebit`` | six | OneBit (arXiv 2402.11295), table 2 |
| ``billm`` | seven | BiLLM (arXiv 2402.04291), table 4 |
| ``stbllm`` | seven | STBLLM (arXiv 2408.01803): RTE in place of PIQA, the seven of Wanda |

Which accuracy is averaged differs: OneBit's figures of the originals look like ``acc_norm`` where a task has it (and
come from an old harness), NanoQuant's are ``acc`` everywhere. So both are given, under the harness's names: ``acc``,
and ``acc_norm`` with ``acc`` for the tasks without it. Tasks count alike, whatever their size. Errors of tasks are
independent: the standard error of the mean of k tasks is sqrt(sum of squares) / k.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

GROUPS = {
    "onebit": ("winogrande", "hellaswag", "piqa", "boolq", "arc_easy", "arc_challenge"),
    "billm": ("piqa", "boolq", "openbookqa", "winogrande", "arc_easy", "arc_challenge", "hellaswag"),
    "stbllm": ("winogrande", "openbookqa", "hellaswag", "boolq", "arc_easy", "arc_challenge", "rte"),
}


def expand(names: Sequence[str]) -> list[str]:
    """The tasks that are named, by themselves or by a group, each once."""
    return list(dict.fromkeys(task for name in names for task in GROUPS.get(name, (name,))))


def average(group: str, tasks: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """acc and acc_norm of a group with their standard errors, and its tasks."""
    members = [tasks[name] for name in GROUPS[group]]
    found: dict[str, Any] = {"tasks": list(GROUPS[group])}
    for metric in ("acc", "acc_norm"):
        names = [metric if metric in member else "acc" for member in members]
        errors = [member[f"{name}_stderr"] for member, name in zip(members, names, strict=True)]
        found[metric] = sum(member[name] for member, name in zip(members, names, strict=True)) / len(members)
        # One row has no standard error.
        known = all(error is not None for error in errors)
        found[f"{metric}_stderr"] = math.hypot(*errors) / len(errors) if known else None
    return found
