"""``signbit export`` on the command line."""

import json
import resource
from collections.abc import Callable
from pathlib import Path

import pytest

from signbit.cli import main

MakeDir = Callable[..., Path]


def call(*arguments: object) -> int:
    return main([str(argument) for argument in arguments])


def test_tables_and_json(wide_dir: MakeDir, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model, out = wide_dir("llama", method="billm"), tmp_path / "out.gguf"
    assert call("export", model, "--to", "gguf", "--out", out, "--type", "f16", "--json", "-") == 0
    said = capsys.readouterr()
    result = json.loads(said.out)
    assert (result["to"], result["bytes"]) == ("gguf", out.stat().st_size)
    assert "f16" in said.err
    assert "split_planes" in said.err
    assert call("export", model, "--to", "dense", "--out", tmp_path / "dense", "--dtype", "float16") == 0
    assert "float16" in capsys.readouterr().err


def test_places_that_cannot_be_written(wide_dir: MakeDir, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    circle, file = tmp_path / "circle.gguf", tmp_path / "file"
    circle.symlink_to(circle)
    file.touch()
    for out, message in (
        (circle, "cannot be written to"),
        (tmp_path / ("a" * 300) / "out.gguf", "cannot be written to"),
        (tmp_path / "\udcff.gguf", "is not UTF-8"),
        (file / "out.gguf", "file is not a directory"),
        (tmp_path / "no" / "out.gguf", "does not exist: create it first"),
        ("/", "is no place to write to"),
    ):
        assert call("export", wide_dir("llama"), "--to", "gguf", "--out", out) == 2, out
        said = capsys.readouterr().err
        assert message in said
        assert said.count("\n") == 1
    assert sorted(tmp_path.iterdir()) == [circle, file]


@pytest.mark.parametrize(("form", "name"), [("gguf", "out.gguf"), ("dense", "out")])
def test_no_room(form: str, name: str, wide_dir: MakeDir, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The file system refuses in the middle of the weights: what was there stays, and nothing is left beside it."""
    model, out = wide_dir("llama"), tmp_path / name
    assert call("export", model, "--to", form, "--out", out) == 0
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    capsys.readouterr()
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (200_000, hard))
    try:
        assert call("export", model, "--to", form, "--out", out, "--overwrite") == 2
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert "Make room; nothing was written" in capsys.readouterr().err
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--to", "gguf", "--out", "out.gguf"], "name a type with --type"),
        (["--to", "gguf", "--out", "out.txt"], "should end in .gguf"),
        (["--to", "onnx", "--out", "out"], "'onnx' is not one of"),
        (["--to", "dense"], "Missing option '--out'"),
        (["--to", "dense", "--out", "out", "--type", "f16"], "type is for gguf"),
    ],
)
def test_bad_input_is_one_line(
    arguments: list[str],
    message: str,
    wide_dir: MakeDir,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    model = wide_dir("llama", method="billm")
    monkeypatch.chdir(tmp_path)
    assert call("export", model, *arguments) == 2
    said = capsys.readouterr()
    assert not said.out
    assert message in said.err
    assert said.err.count("\n") == 1
    assert not list(tmp_path.iterdir())
