"""A few rows of each benchmark, made up, in the form in which it was published."""

import json
from pathlib import Path
from typing import Any

Row = dict[str, Any]

_CHOICES = [
    {"text": "the river", "label": "A"},
    {"text": "a lantern made of brass", "label": "B"},
    {"text": "salt", "label": "C"},
    {"text": "the mayor's letter", "label": "D"},
]
_NUMBERED = [{"text": choice["text"], "label": str(number)} for number, choice in enumerate(_CHOICES, start=1)]
_QUESTIONS = ["What lights the harbour?", "Which of these melts ice?", "Who was it for?", "What ran past the mill?"]
_ANSWERS = ["B", "C", "D", "A"]


def _asked(choices: list[Row], answers: list[str]) -> list[Row]:
    return [
        {"id": f"q{number}", "question": {"stem": stem, "choices": choices}, "answerKey": answer}
        for number, (stem, answer) in enumerate(zip(_QUESTIONS, answers, strict=True))
    ]


PUBLISHED: dict[str, list[Row]] = {
    "piqa/dev.jsonl": [
        {"goal": "keep a lantern dry", "sol1": "put it in a box", "sol2": "put it in the river, then in a box"},
        {"goal": "count the boats", "sol1": "close your eyes", "sol2": "look at the river"},
        {"goal": "salt", "sol1": "sell it in the market", "sol2": "read it"},
        {"goal": "open a locked door", "sol1": "ask the cook", "sol2": "use the brass key"},
        {"goal": "tell the weather", "sol1": "smell the wind", "sol2": "paint a map of the coast"},
    ],
    "winogrande/dev.jsonl": [
        {"sentence": "The key did not fit the door, as _ was too small.", "option1": "key", "option2": "door"},
        {"sentence": "Anna paid Maria because _ had sold apples.", "option1": "Anna", "option2": "Maria"},
        {"sentence": "_ rang before the clock did.", "option1": "The bell", "option2": "A dog"},
    ],
    "boolq/val.jsonl": [
        {"question": "is the harbour deep", "passage": "Harbour -- The harbour is shallow.", "idx": 0, "label": False},
        {"question": "do bees sleep", "passage": "Bee -- Bees rest at night.", "idx": 1, "label": True},
        {"question": "is salt a spice", "passage": "Salt -- Salt is a mineral.", "idx": 2, "label": False},
    ],
    "arc/ARC-Easy-Test.jsonl": _asked(_CHOICES, _ANSWERS),
    "arc/ARC-Challenge-Test.jsonl": _asked(_NUMBERED, ["2", "3", "4", "1"]),
    "openbookqa/test.jsonl": _asked(_CHOICES, _ANSWERS),
    "hellaswag/hellaswag_val.jsonl": [
        {
            "ind": number,
            "activity_label": "Mending a lantern",
            "ctx_a": "A man holds a lantern [header] up.",
            "ctx_b": second,
            "ctx": "not looked at",
            "endings": ["lights it.", "eats [title] it with salt.", "sells it to a dog.", "walks into the river."],
            "label": label,
        }
        for number, (second, label) in enumerate([("he", 0), ("", 3), ("the boy", 2)])
    ],
    "lambada/lambada_test.jsonl": [
        {"text": "The bells rang for the third time.\n\nNobody in the village heard the bells"},
        {"text": "He counted the boats. There were thirty-seven boats"},
        {"text": "The dog slept, and slept, and when the tide turned the dog slept"},
    ],
}
# What the harness is given online: the same rows in the hub's schema.
_HUB_CHOICES = {"text": [choice["text"] for choice in _CHOICES], "label": ["A", "B", "C", "D"]}
_HUB_NUMBERED = {"text": [choice["text"] for choice in _CHOICES], "label": ["1", "2", "3", "4"]}
HUB: dict[str, list[Row]] = {
    "piqa": [row | {"label": label} for row, label in zip(PUBLISHED["piqa/dev.jsonl"], [0, 1, 0, 1, 0], strict=True)],
    "winogrande": [
        row | {"answer": answer} for row, answer in zip(PUBLISHED["winogrande/dev.jsonl"], ["1", "2", "1"], strict=True)
    ],
    "boolq": [row | {"label": label} for row, label in zip(PUBLISHED["boolq/val.jsonl"], [0, 1, 0], strict=True)],
    "arc_easy": [
        {"id": "", "question": stem, "choices": _HUB_CHOICES, "answerKey": answer}
        for stem, answer in zip(_QUESTIONS, _ANSWERS, strict=True)
    ],
    "arc_challenge": [
        {"id": "", "question": stem, "choices": _HUB_NUMBERED, "answerKey": answer}
        for stem, answer in zip(_QUESTIONS, ["2", "3", "4", "1"], strict=True)
    ],
    "openbookqa": [
        {"id": "", "question_stem": stem, "choices": _HUB_CHOICES, "answerKey": answer}
        for stem, answer in zip(_QUESTIONS, _ANSWERS, strict=True)
    ],
    "hellaswag": [row | {"label": str(row["label"])} for row in PUBLISHED["hellaswag/hellaswag_val.jsonl"]],
    "lambada_openai": PUBLISHED["lambada/lambada_test.jsonl"],
}


def write_benchmarks(directory: Path) -> Path:
    """All of them, as files below ``directory``."""
    answers = ["1", "2", "1"]
    for name, rows in PUBLISHED.items():
        if name.startswith("winogrande"):
            rows = [row | {"answer": answer} for row, answer in zip(rows, answers, strict=True)]
        file = directory / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    (directory / "piqa" / "dev-labels.lst").write_text("0\n1\n0\n1\n0\n")
    return directory
