"""The papers' averages."""

import math

import pytest

from signbit.evaluation.groups import GROUPS, average, expand


def test_groups_are_the_papers() -> None:
    assert len(GROUPS["onebit"]) == 6
    assert len(GROUPS["billm"]) == len(GROUPS["stbllm"]) == 7
    assert set(GROUPS["billm"]) - set(GROUPS["onebit"]) == {"openbookqa"}
    assert set(GROUPS["stbllm"]) - set(GROUPS["billm"]) == {"rte"}


def test_names_are_expanded_once() -> None:
    assert expand(["piqa", "onebit", "mmlu", "piqa"])[:3] == ["piqa", "winogrande", "hellaswag"]
    assert len(expand(["onebit", "billm", "stbllm"])) == 8


def test_averages() -> None:
    tasks: dict[str, dict[str, float | None]] = {
        name: {"acc": 0.1 * i, "acc_stderr": 0.01 * i} for i, name in enumerate(GROUPS["onebit"])
    }
    tasks["piqa"] |= {"acc_norm": 0.9, "acc_norm_stderr": 0.06}
    found = average("onebit", tasks)
    assert found["acc"] == pytest.approx(0.25)
    assert found["acc_stderr"] == pytest.approx(math.sqrt(sum((0.01 * i) ** 2 for i in range(6))) / 6)
    assert found["acc_norm"] == pytest.approx((1.5 - 0.2 + 0.9) / 6)
    assert found["tasks"] == list(GROUPS["onebit"])
    tasks["boolq"]["acc_stderr"] = None
    assert average("onebit", tasks)["acc_stderr"] is None
