"""Benchmarks from files in the form in which they were published, for machines without a network.

The harness reads a benchmark's rows from the hub and does everything else itself: prompts, answers to choose from,
what is right, metrics. Here only the rows come from elsewhere. A row is brought to the schema of the hub's data set,
which is where the traps are, and the harness's own configuration of the task takes it from there:

- PIQA's labels are in a file beside the rows.
- ARC's question is a mapping, its choices are a list of mappings, and some rows label choices 1 to 4: labels are kept,
  since the harness looks the answer up among them.
- BoolQ has two forms. SuperGLUE's passages begin with the title; those of the original, which has titles apart and
  ``answer`` for ``label``, get it put before them.
- LAMBADA (OpenAI's form) is whole passages: the harness takes the last word off.
- HellaSwag's labels are strings on the hub.

A row that does not fit is refused, never skipped: a mean over other rows is another figure.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from signbit.errors import SignbitError

Row = dict[str, Any]


@dataclass(frozen=True)
class Form:
    """files: where a directory may have the rows, the first being the name to use. split: what the harness calls the
    rows that it evaluates. convert: a published row to one of the hub's; it may raise what a row of another form leads
    to. labels: whether they are in a file of their own."""

    files: tuple[str, ...]
    split: str
    convert: Callable[[Row], Row]
    labels: bool = False


def local_configuration(task: str, directory: Path) -> dict[str, Any]:
    """The keys that make the harness's configuration of ``task`` take its rows from ``directory``.

    SignbitError if the task has no known form, the file is absent, or a row is malformed.
    """
    if task not in FORMS:
        raise SignbitError(
            f"{task} cannot be read from --task-data: that is known for {', '.join(FORMS)}; "
            "evaluate it without --task-data, online"
        )
    form = FORMS[task]
    rows = read_rows(task, directory)

    def dataset(**_: Any) -> Any:  # called with the task's metadata
        from datasets import Dataset, DatasetDict

        return DatasetDict({form.split: Dataset.from_list(rows)})

    # The other splits are only for examples in the prompt, of which there are none.
    splits = dict.fromkeys(("training_split", "validation_split", "test_split")) | {f"{form.split}_split": form.split}
    return {"task": task, "custom_dataset": dataset, **splits}


def read_rows(task: str, directory: Path) -> list[Row]:
    """The rows of ``task`` in the schema of the hub's data set."""
    form = FORMS[task]
    file = _find(task, form, directory)
    lines = list(_lines(file))
    labels: list[str] | None = None
    if form.labels:
        beside = file.with_name(f"{file.stem}-labels.lst")
        labels = [label for _, label in _lines(beside)]
        if len(labels) != len(lines):
            raise SignbitError(f"{beside} has {len(labels)} labels for the {len(lines)} rows of {file.name}")
    if not lines:
        raise SignbitError(f"{file} is empty")
    rows = []
    for index, (number, line) in enumerate(lines):
        try:
            published = json.loads(line)
            if labels is not None:
                published["label"] = int(labels[index])
            rows.append(form.convert(published))
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            raise SignbitError(f"{file}, line {number}: not a row of {task} ({_reason(error)})") from error
    return rows


def _find(task: str, form: Form, directory: Path) -> Path:
    if not directory.is_dir():
        raise SignbitError(f"{directory} is not a directory: --task-data names one with the benchmarks' files")
    for name in form.files:
        if (directory / name).is_file():
            return directory / name
    others = f" (or {', '.join(form.files[1:])})" if form.files[1:] else ""
    raise SignbitError(f"{directory} has no {form.files[0]}{others}, which {task} is read from: see docs/evaluation.md")


def _lines(file: Path) -> Iterator[tuple[int, str]]:
    """The lines that are not blank, numbered from 1. Only line feeds end a line: JSON strings may hold others."""
    try:
        text = file.read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise SignbitError(f"{file} is not UTF-8 (byte {error.start}): convert it first") from error
    except OSError as error:
        raise SignbitError(f"{file} cannot be read: {error.strerror}") from error
    for number, line in enumerate(text.split("\n"), start=1):
        if line.strip():
            yield number, line


def _reason(error: BaseException) -> str:
    if isinstance(error, json.JSONDecodeError):
        return "not JSON"
    if isinstance(error, KeyError):
        return f"{error.args[0]!r} is missing"
    return str(error) if type(error) is ValueError else "fields of another kind were expected"


def _require(condition: bool, reason: str) -> None:
    if not condition:
        raise ValueError(reason)


def _text(row: Row, key: str, *, empty: bool = False) -> str:
    value = row[key]
    _require(isinstance(value, str) and (empty or bool(value.strip())), f"{key!r} must be text")
    return str(value)


def _label(row: Row, key: str, choices: int) -> int:
    value = row[key]
    known = type(value) is int and 0 <= value < choices
    _require(known, f"{key!r} must be a number from 0 to {choices - 1}")
    return int(value)


def _piqa(row: Row) -> Row:
    return {key: _text(row, key) for key in ("goal", "sol1", "sol2")} | {"label": _label(row, "label", 2)}


def _winogrande(row: Row) -> Row:
    found = {key: _text(row, key) for key in ("sentence", "option1", "option2", "answer")}
    _require("_" in found["sentence"], "'sentence' must have a gap, _")
    _require(found["answer"] in ("1", "2"), '\'answer\' must be "1" or "2"')
    return found


def _boolq(row: Row) -> Row:
    original = "answer" in row
    answer = row["answer" if original else "label"]
    _require(isinstance(answer, bool), "the label must be true or false")
    passage = _text(row, "passage")
    if original:
        passage = f"{_text(row, 'title')} -- {passage}"
    return {"question": _text(row, "question"), "passage": passage, "label": int(answer)}


def _choices(row: Row) -> Row:
    """Of ARC and OpenBookQA: the choices as the hub has them, and which is right."""
    published = row["question"]["choices"]
    choices = {key: [_text(choice, key) for choice in published] for key in ("text", "label")}
    answer = _text(row, "answerKey")
    _require(answer in choices["label"], f"'answerKey' {answer!r} is none of the choices' labels")
    return {"choices": choices, "answerKey": answer}


def _arc(row: Row) -> Row:
    return {"question": _text(row["question"], "stem")} | _choices(row)


def _openbookqa(row: Row) -> Row:
    return {"question_stem": _text(row["question"], "stem")} | _choices(row)


def _hellaswag(row: Row) -> Row:
    endings = row["endings"]
    _require(isinstance(endings, list) and len(endings) == 4, "'endings' must be four")
    _require(all(isinstance(ending, str) and ending.strip() for ending in endings), "'endings' must be text")
    found: Row = {key: _text(row, key) for key in ("activity_label", "ctx_a")}
    return found | {
        "ctx_b": _text(row, "ctx_b", empty=True),
        "endings": endings,
        "label": str(_label(row, "label", 4)),
    }


def _lambada(row: Row) -> Row:
    text = _text(row, "text")
    context, _, word = text.rpartition(" ")
    _require(bool(context.strip()) and bool(word.strip()), "'text' must end in a word to predict")
    return {"text": text}


FORMS = {
    "piqa": Form(("piqa/dev.jsonl", "piqa/valid.jsonl"), "validation", _piqa, labels=True),
    "winogrande": Form(("winogrande/dev.jsonl", "winogrande_1.1/dev.jsonl"), "validation", _winogrande),
    "hellaswag": Form(("hellaswag/hellaswag_val.jsonl",), "validation", _hellaswag),
    "boolq": Form(
        ("boolq/val.jsonl", "boolq/val.bool.jsonl", "boolq/dev.jsonl", "BoolQ/val.jsonl"), "validation", _boolq
    ),
    "arc_easy": Form(("arc/ARC-Easy-Test.jsonl", "ARC-Easy/ARC-Easy-Test.jsonl"), "test", _arc),
    "arc_challenge": Form(("arc/ARC-Challenge-Test.jsonl", "ARC-Challenge/ARC-Challenge-Test.jsonl"), "test", _arc),
    "openbookqa": Form(("openbookqa/test.jsonl", "Data/Main/test.jsonl"), "test", _openbookqa),
    "lambada_openai": Form(("lambada/lambada_test.jsonl",), "test", _lambada),
}
