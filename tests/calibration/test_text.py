import importlib.util
import json
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from signbit.calibration import text as texts
from signbit.calibration.text import read_text, stream_text
from signbit.errors import SignbitError


def refuse(source: str | Path, *words: str) -> None:
    """Reading fails with one line that says ``words``."""
    with pytest.raises(SignbitError) as caught:
        read_text(str(source), "train")
    message = str(caught.value)
    assert "\n" not in message
    for word in words:
        assert word in message


@pytest.mark.parametrize("suffix", [".txt", ".raw"])
def test_plain_text_is_taken_as_it_is(tmp_path: Path, suffix: str) -> None:
    file = tmp_path / f"a{suffix}"
    text = ' = Title = \n\n“Ünïcode” \u2028 text\n{"text": "no row"}\n'
    file.write_text(text, encoding="utf-8")
    assert read_text(str(file), "train") == text


def test_rows_of_jsonl_are_joined_by_an_empty_line(tmp_path: Path) -> None:
    file = tmp_path / "a.jsonl"
    file.write_text('{"text": "one\\ntwo", "url": "x"}\n\n{"text": ""}\n  {"text": "drei\\u00df"}', encoding="utf-8")
    assert read_text(str(file), "train") == "one\ntwo\n\n\n\ndreiß"


@pytest.mark.parametrize("separator", ["\u2028", "\u2029", "\u0085"])
def test_a_row_may_hold_unicode_line_separators(tmp_path: Path, separator: str) -> None:
    """JSON allows them unescaped inside a string; only newlines end a row."""
    file = tmp_path / "a.jsonl"
    documents = [f"one{separator}two", "three"]
    file.write_text("\n".join(json.dumps({"text": d}, ensure_ascii=False) for d in documents), encoding="utf-8")
    assert read_text(str(file), "train") == "\n\n".join(documents)


def test_windows_line_ends_in_jsonl(tmp_path: Path) -> None:
    file = tmp_path / "a.jsonl"
    file.write_bytes(b'{"text": "one"}\r\n{"text": "two"}\r\n')
    assert read_text(str(file), "train") == "one\n\ntwo"


def test_a_home_directory_is_expanded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "a.txt").write_text("text")
    assert read_text("~/a.txt", "train") == "text"


@pytest.mark.parametrize(
    ("row", "problem"),
    [
        ("{", "expected a JSON object"),
        ("plain text", "expected a JSON object"),
        ('{"content": "x"}', 'with a "text"'),
        ('["text"]', "expected a JSON object"),
        ('"text"', "expected a JSON object"),
        ("7", "expected a JSON object"),
        ('{"text": 7}', "is not a string"),
        ('{"text": null}', "is not a string"),
    ],
)
def test_a_bad_row_is_named_by_its_line(tmp_path: Path, row: str, problem: str) -> None:
    file = tmp_path / "a.jsonl"
    file.write_text(f'{{"text": "fine"}}\n\n{row}\n')
    refuse(file, f"{file}, line 3: ", problem)


@pytest.mark.parametrize("name", ["a.txt", "a.jsonl"])
def test_a_streamed_text_is_the_same_text(tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / name
    rows = [json.dumps({"text": f"row {number}\nof a file"}) for number in range(40)]
    file.write_bytes("\r\n".join(rows).encode())
    assert list(stream_text(str(file))) == [read_text(str(file), "train")]
    monkeypatch.setattr(texts, "PIECE", 50)
    pieces = list(stream_text(str(file)))
    assert len(pieces) > 10
    assert "".join(pieces) == read_text(str(file), "train")


@pytest.mark.parametrize(
    ("name", "content"), [("a.txt", ""), ("a.raw", " \n\t\n"), ("a.jsonl", ""), ("a.jsonl", '{"text": "  "}\n')]
)
def test_empty(tmp_path: Path, name: str, content: str) -> None:
    (tmp_path / name).write_text(content)
    refuse(tmp_path / name, name, "is empty")


def test_wrong_encoding(tmp_path: Path) -> None:
    file = tmp_path / "a.txt"
    file.write_bytes("naïve".encode("latin-1"))
    refuse(file, str(file), "not UTF-8 (byte 2)")


def test_missing(tmp_path: Path) -> None:
    refuse(tmp_path / "a.txt", str(tmp_path / "a.txt"), "does not exist")


def test_a_directory(tmp_path: Path) -> None:
    (tmp_path / "a.txt").mkdir()
    refuse(tmp_path / "a.txt", str(tmp_path / "a.txt"), "cannot be read")


@pytest.mark.parametrize("source", ["wikitext", "", "notes.pdf", "a.txt.gz"])
def test_unknown_source_lists_the_known(source: str) -> None:
    refuse(source, repr(source), "wikitext2", "c4", "ptb", "self", ".txt", ".jsonl")


class TestDatasets:
    """The named data sets, with a stand-in for the datasets library."""

    @pytest.fixture(autouse=True)
    def stand_in(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
        monkeypatch.syspath_prepend(tmp_path)
        monkeypatch.delitem(sys.modules, "datasets", raising=False)
        yield tmp_path / "datasets.py"
        sys.modules.pop("datasets", None)

    @pytest.mark.parametrize("name", ["wikitext2", "c4", "ptb"])
    def test_offline(self, stand_in: Path, name: str) -> None:
        stand_in.write_text(
            "def load_dataset(*args, **options):\n    raise ConnectionError('cannot reach the hub\\nat all')\n"
        )
        refuse(name, name, "cannot reach the hub", "give a text file or 'self'")

    def test_offline_with_an_error_that_says_nothing(self, stand_in: Path) -> None:
        stand_in.write_text("def load_dataset(*args, **options):\n    raise TimeoutError\n")
        refuse("c4", "c4", "TimeoutError", "give a text file")

    @pytest.mark.parametrize("name", ["wikitext2", "c4", "ptb"])
    def test_not_installed(self, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
        monkeypatch.setattr(importlib.util, "find_spec", lambda _: None)
        refuse(name, name, "pip install 'signbit[data]'", "text file")

    @pytest.mark.parametrize(
        ("name", "split", "expected"),
        [
            ("wikitext2", "train", "one\n\n\n\ntwo"),
            ("wikitext2", "test", "one\n\n\n\ntwo"),
            ("ptb", "train", "one two"),
            ("ptb", "test", "one two"),
            ("c4", "train", "one\n\ntwo"),
            ("c4", "test", "one two"),
        ],
    )
    def test_rows_are_joined_as_in_gptq(self, stand_in: Path, name: str, split: str, expected: str) -> None:
        stand_in.write_text(
            "class Stream(list):\n"
            "    take = lambda self, count: self[:count]\n"
            "def load_dataset(path, *names, split, data_files=None, streaming=False, revision=None):\n"
            f"    assert split == {split!r}\n"
            "    if streaming:\n"
            "        assert ('validation' in data_files[split]) == (split == 'test')\n"
            "        return Stream([{'text': 'one'}, {'text': 'two'}])\n"
            "    if path.startswith('ptb'):\n"
            "        return [{'sentence': 'one'}, {'sentence': 'two'}]\n"
            "    return [{'text': 'one'}, {'text': ''}, {'text': 'two'}]\n"
        )
        assert read_text(name, split) == expected
