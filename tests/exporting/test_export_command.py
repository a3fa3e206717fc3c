"""``signbit export`` on the command line."""

import json
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
