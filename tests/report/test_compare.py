"""Comparisons: what is measured, what is written, and what is refused before hours of work."""

import json
import re
import xml.etree.ElementTree as ElementTree
from collections.abc import Callable
from pathlib import Path
from typing import Any
from urllib.parse import unquote

import pytest

import signbit
from hostile import Compared
from signbit import SignbitError
from signbit.cli import main
from signbit.report.measure import labels_of

MakeDir = Callable[..., Path]


def test_result(compared: Compared, text_file: Path) -> None:
    """What the page shows is what the rest of signbit says."""
    original, *packed = compared.result["models"]
    assert compared.result["against"] == original["model"] == compared.models[0]
    assert original["method"] is None
    assert "divergence" not in original["evaluation"]
    for one in packed:
        found = signbit.inspect(one["model"])
        assert one["bits_per_weight"] == found["bits_per_weight"]
        assert one["file_bytes"] == found["bytes"]["files"]
        assert one["evaluation"]["divergence"][str(text_file)]["kl"] > 0
        assert one["evaluation"]["original_perplexity"] == original["evaluation"]["perplexity"]
        assert one["making"]["source"] == compared.models[0]
        assert one["memory"] is None or one["memory"] == pytest.approx(
            one["speed"]["memory"]["decoded"]["resident"] - one["speed"]["memory"]["before"]["resident"], abs=1e6
        )
        assert f"{found['bits_per_weight']:.2f}" in compared.html
        assert (
            f"{one['evaluation']['divergence'][str(text_file)]['top1_agreement']:.1%}".replace("%", " %")
            in compared.html
        )


def test_page_is_one_file(compared: Compared) -> None:
    assert not re.search(r"""(src|href)\s*=\s*["'](?!data:)""", compared.html)
    assert "url(" not in compared.html
    assert "@import" not in compared.html
    assert len(compared.html) < 400_000


def test_markdown(compared: Compared) -> None:
    lines = compared.markdown.read_text(encoding="utf-8").splitlines()
    table = [line for line in lines if line.startswith("|")]
    assert len(table) == 2 + len(compared.models)
    unescaped = [re.sub(r"\\.", "", line) for line in table]
    assert {line.count("|") for line in unescaped} == {table[1].count("|")}
    assert not any("<" in line for line in unescaped)
    pictures = [match for line in lines for match in re.findall(r"\]\((.*)\)$", line)]
    assert pictures == [f"table%20%281%29%23%3F{which}.svg" for which in ("", "-2", "-3")]
    for picture in pictures:
        root = ElementTree.parse(compared.markdown.with_name(unquote(picture))).getroot()
        assert root.tag.endswith("svg")


def test_the_same_twice(packed_dir: MakeDir, text_file: Path, tmp_path: Path) -> None:
    """From the command line, without an original: no divergence, and nothing that changes from run to run."""
    options = ["--perplexity", text_file, "--seqlen", "48", "--windows", "2", "--no-speed", "--max-tokens", "4"]
    pages = []
    for name in "ab":
        out = tmp_path / f"{name}.html"
        command = ["compare", packed_dir("llama"), "--out", out, *options, "--markdown", tmp_path, "--prompt", "A boy"]
        assert main([str(one) for one in [*command, "--json", tmp_path / "facts.json"]]) == 0
        pages.append(out.read_bytes())
    assert pages[0] == pages[1]
    assert b"<h1>One model</h1>" in pages[0]
    assert (tmp_path / "report.md").is_file()
    found = json.loads((tmp_path / "facts.json").read_text())
    assert found["against"] is None
    assert found["models"][0]["speed"] is None
    assert len(found["models"][0]["texts"]) == 1


@pytest.mark.slow
def test_decoding_is_timed_in_another_process(packed_dir: MakeDir, tmp_path: Path) -> None:
    """Of a name that looks like an option, too; with nothing else to be measured."""
    (tmp_path / "--help").symlink_to(packed_dir("llama"))
    with pytest.MonkeyPatch.context() as patched:
        patched.chdir(tmp_path)
        result = signbit.compare(["--help"], "out.html", perplexity=(), prompts=(), speed=True)
    assert result["models"][0]["speed"]["tokens_per_second"] > 0
    assert "tokens<br>a second" in (tmp_path / "out.html").read_text()


def test_other_vocabularies_are_not_compared(tiny_dir: MakeDir, text_file: Path, tmp_path: Path) -> None:
    """Perplexities are, with a warning: a reader may know better."""
    import shutil

    other = tmp_path / "other"
    shutil.copytree(tiny_dir("llama"), other)
    tokenizer = json.loads((other / "tokenizer.json").read_text())
    vocabulary = tokenizer["model"]["vocab"]
    first, second = sorted(vocabulary)[-2:]
    vocabulary[first], vocabulary[second] = vocabulary[second], vocabulary[first]
    (other / "tokenizer.json").write_text(json.dumps(tokenizer))
    given: dict[str, Any] = {"perplexity": text_file, "seqlen": 32, "windows": 1, "prompts": (), "speed": False}
    result = signbit.compare([tiny_dir("llama"), other], tmp_path / "out.html", **given)
    assert "divergence" not in result["models"][1]["evaluation"]
    assert "Not all vocabularies are the same" in (tmp_path / "out.html").read_text()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"models": []}, "name at least one model"),
        ({"models": ["x/y/z"]}, "does not exist"),
        ({"models": ["{model}", "{model}"]}, "given twice"),
        ({"models": ["{model}", "{model}/../model/"]}, "given twice"),
        ({"tasks": ["no_such_task"]}, "no_such_task"),
        ({"tasks": ["piqa"], "task_data": "nowhere"}, "nowhere is not a directory"),
        ({"perplexity": "{text}", "seqlen": 10_000}, "model: seqlen 10000"),
        ({"out": "page.txt"}, "end it in .html"),
        ({"out": "nowhere/page.html"}, "nowhere does not exist"),
        ({"markdown": "nowhere"}, "neither a .md file nor a directory"),
        ({"perplexity": "missing.txt"}, "missing.txt"),
        ({"perplexity": "self", "models": ["{packed}"]}, "--against"),
        ({"prompts": [""]}, "the prompt is empty"),
        ({"max_tokens": 0}, "max-tokens"),
        ({"against": "x/y/z"}, "does not exist"),
    ],
)
def test_refusals(
    tiny_dir: MakeDir, packed_dir: MakeDir, text_file: Path, tmp_path: Path, change: dict[str, Any], message: str
) -> None:
    places = {"model": str(tiny_dir("llama")), "packed": str(packed_dir("llama"))}
    given: dict[str, Any] = {"models": ["{model}"], "out": "page.html", "perplexity": (), **change}
    models = [one.format(**places) for one in given.pop("models")]
    if given["perplexity"] == "{text}":
        given["perplexity"] = text_file
    with pytest.MonkeyPatch.context() as patched:
        patched.chdir(tmp_path)
        with pytest.raises(SignbitError, match=re.escape(message)):
            signbit.compare(models, given.pop("out"), speed=False, **given)
    assert not list(tmp_path.iterdir())


def test_labels(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of paths that are not there, which are taken for hub ids, and of those that are."""
    assert labels_of(["demo", "a/b/billm/", "/x/rtn-4"]) == ["demo", "billm", "rtn-4"]
    assert labels_of(["one/out", "two/out", "out"]) == ["one/out", "two/out", "out"]
    assert labels_of(["/", "./x"]) == ["/", "x"]
    for name in ("a/billm", "b/a/billm"):
        (tmp_path / name).mkdir(parents=True)
    monkeypatch.chdir(tmp_path / "a/billm")
    assert labels_of([".", "../../b/a/billm"]) == [f"{tmp_path.name}/a/billm", "b/a/billm"]
    assert labels_of(["."]) == ["billm"]


def test_a_disk_that_is_full_at_the_end(tiny_dir: MakeDir, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*arguments: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("signbit.report.compare.write_text", full)
    with pytest.raises(SignbitError, match=r"cannot be written: No space left"):
        signbit.compare([tiny_dir("llama")], tmp_path / "out.html", perplexity=(), prompts=(), speed=False)
