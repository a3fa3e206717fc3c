"""Benchmarks' files: each published form becomes the hub's rows, and what does not fit is refused by its line."""

import json
from pathlib import Path
from typing import Any

import pytest

from published import HUB, PUBLISHED, write_benchmarks
from signbit.errors import SignbitError
from signbit.evaluation.task_data import FORMS, local_configuration, read_rows


def test_every_form_has_rows_here() -> None:
    assert HUB.keys() == FORMS.keys()


@pytest.mark.parametrize("task", FORMS)
def test_rows_are_the_hubs(task: str, tmp_path: Path) -> None:
    """All fields that the harness's configuration looks at; what else the hub has is not made up."""
    rows = read_rows(task, write_benchmarks(tmp_path))
    assert len(rows) == len(HUB[task])
    for row, expected in zip(rows, HUB[task], strict=True):
        assert row.items() <= expected.items()


def test_other_places_and_forms(tmp_path: Path) -> None:
    write_benchmarks(tmp_path)
    (tmp_path / "boolq").rename(tmp_path / "BoolQ")
    assert len(read_rows("boolq", tmp_path)) == 3
    (tmp_path / "boolq").mkdir(exist_ok=True)  # BoolQ again, where a file system ignores case
    row = {"question": "is it", "title": "Salt", "answer": True, "passage": "Salt is a mineral."}
    (tmp_path / "boolq" / "val.jsonl").write_text(json.dumps(row))
    expected = {"question": "is it", "passage": "Salt -- Salt is a mineral.", "label": 1}
    assert read_rows("boolq", tmp_path) == [expected]


def test_text_files_of_all_kinds(tmp_path: Path) -> None:
    """A byte order mark, other line ends, blank lines, separators within strings."""
    write_benchmarks(tmp_path)
    rows = [{"text": "one\u2028two three"}, {"text": "four five"}]
    text = "\r\n".join(json.dumps(row, ensure_ascii=False) for row in rows)
    (tmp_path / "lambada" / "lambada_test.jsonl").write_bytes(b"\xef\xbb\xbf" + text.encode() + b"\r\n\r\n")
    assert read_rows("lambada_openai", tmp_path) == rows


def test_absent_files(tmp_path: Path) -> None:
    with pytest.raises(SignbitError, match=r"has no piqa/dev\.jsonl \(or piqa/valid\.jsonl\), which piqa is read from"):
        read_rows("piqa", tmp_path)
    with pytest.raises(SignbitError, match="not a directory"):
        read_rows("piqa", tmp_path / "nowhere")
    with pytest.raises(SignbitError, match="mmlu cannot be read from --task-data: that is known for piqa, "):
        local_configuration("mmlu", tmp_path)
    write_benchmarks(tmp_path)
    (tmp_path / "piqa" / "dev-labels.lst").unlink()
    with pytest.raises(SignbitError, match=r"dev-labels\.lst cannot be read: No such file"):
        read_rows("piqa", tmp_path)


@pytest.mark.parametrize(
    ("task", "change", "words"),
    [
        ("piqa", {"goal": None}, "'goal' must be text"),
        ("piqa", {"sol2": ""}, "'sol2' must be text"),
        ("winogrande", {"sentence": "No gap."}, "'sentence' must have a gap"),
        ("winogrande", {"answer": 1}, "'answer' must be text"),
        ("winogrande", {"answer": "3"}, "'answer' must be"),
        ("boolq", {"label": "true"}, "the label must be true or false"),
        ("boolq", {"passage": ["a"]}, "'passage' must be text"),
        ("arc_easy", {"question": "What?"}, "fields of another kind"),
        ("arc_easy", {"answerKey": "E"}, "'answerKey' 'E' is none of the choices' labels"),
        ("arc_challenge", {"question": {"stem": "What?", "choices": [{"text": "a"}]}}, "'label' is missing"),
        ("openbookqa", {"question": None}, "fields of another kind"),
        ("hellaswag", {"endings": ["a", "b", "c"]}, "'endings' must be four"),
        ("hellaswag", {"endings": ["a", "b", "c", " "]}, "'endings' must be text"),
        ("hellaswag", {"label": True}, "'label' must be a number from 0 to 3"),
        ("hellaswag", {"label": 4}, "'label' must be a number from 0 to 3"),
        ("lambada_openai", {"text": "one"}, "'text' must end in a word"),
        ("lambada_openai", {"text": "ends in a space "}, "'text' must end in a word"),
    ],
)
def test_malformed_rows(task: str, change: dict[str, Any], words: str, tmp_path: Path) -> None:
    write_benchmarks(tmp_path)
    file = tmp_path / FORMS[task].files[0]
    lines = file.read_text().splitlines()
    lines[1] = json.dumps(json.loads(lines[1]) | change)
    file.write_text("\n".join(lines))
    with pytest.raises(SignbitError) as caught:
        read_rows(task, tmp_path)
    assert str(caught.value).startswith(f"{file}, line 2: not a row of {task} (")
    assert words in str(caught.value)


@pytest.mark.parametrize("line", ["{", "3", "null", "[]", '"text"', "{}", "[" * 100_000])
@pytest.mark.parametrize("task", FORMS)
def test_lines_that_are_no_rows(task: str, line: str, tmp_path: Path) -> None:
    file = write_benchmarks(tmp_path) / FORMS[task].files[0]
    first = file.read_text().splitlines()[0]
    file.write_text(f"{first}\n\n{line}\n" + "\n".join([first] * (len(PUBLISHED[FORMS[task].files[0]]) - 2)))
    with pytest.raises(SignbitError, match=f"line 3: not a row of {task}"):
        read_rows(task, tmp_path)


@pytest.mark.parametrize(
    ("labels", "words"), [("0\n1\n", "2 labels for the 5"), ("0\n1\nx\n0\n1\n", "line 3"), ("", "0")]
)
def test_labels_that_do_not_fit(labels: str, words: str, tmp_path: Path) -> None:
    write_benchmarks(tmp_path)
    (tmp_path / "piqa" / "dev-labels.lst").write_text(labels)
    with pytest.raises(SignbitError, match=words):
        read_rows("piqa", tmp_path)


def test_files_that_are_no_text(tmp_path: Path) -> None:
    file = write_benchmarks(tmp_path) / "boolq" / "val.jsonl"
    file.write_bytes(b"\xff\xfe{")
    with pytest.raises(SignbitError, match="not UTF-8"):
        read_rows("boolq", tmp_path)
    file.write_text("\n \n")
    with pytest.raises(SignbitError, match="is empty"):
        read_rows("boolq", tmp_path)
