"""``export --to dense``: what plain transformers makes of it, without signbit, is what signbit computes."""

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import signbit
from signbit import SignbitError
from signbit.exporting import RECORD
from signbit.safetensors_file import INDEX

MakeDir = Callable[..., Path]
IDS = list(range(3, 40))
# Several directories in one process: importing torch takes longer than all the rest.
PLAIN = """
import json, sys
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer
for directory in json.loads(sys.argv[1]):
    model, info = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"], info
    ids = torch.tensor([json.loads(sys.argv[2])])
    torch.save(model(ids).logits, directory + "/../logits.pt")
    AutoTokenizer.from_pretrained(directory)
assert "signbit" not in sys.modules
"""


def plain_logits(*directories: Path) -> list[torch.Tensor]:
    """Logits of a process that never imports signbit."""
    arguments = [json.dumps(list(map(str, directories))), json.dumps(IDS)]
    found = subprocess.run(
        [sys.executable, "-c", PLAIN, *arguments], capture_output=True, text=True, cwd=directories[0], check=False
    )
    assert found.returncode == 0, found.stderr
    return [torch.load(directory.parent / "logits.pt") for directory in directories]


def our_logits(checkpoint: Path) -> torch.Tensor:
    with torch.inference_mode():
        logits: torch.Tensor = signbit.load(checkpoint)[0](torch.tensor([IDS])).logits
    return logits


CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "bias corrections, which make biases": ("llama", {"bias_correction": True, "embeddings": "int8"}),
    "transposed, with biases": ("gpt2", {"bias_correction": True}),
    "tied": ("qwen3", {"embeddings": "int4"}),
    "fused linears": ("phi3", {}),
    "fused experts": ("mixtral", {}),
    "some layers with experts": ("qwen3_moe", {"method": "xnor", "skip": ["*.experts.1.*"]}),
    "scaled embeddings": ("gemma3", {"embeddings": "int8"}),
    "linears outside the blocks": ("opt_projected", {}),
}


def test_plain_transformers_computes_the_same(packed_dir: MakeDir, tmp_path: Path) -> None:
    checkpoints = [packed_dir(family, **keys) for family, keys in CASES.values()]
    for index, checkpoint in enumerate(checkpoints):
        for dtype in ("float32", "bfloat16"):
            (tmp_path / f"{dtype}-{index}").mkdir()
            signbit.export(checkpoint, tmp_path / f"{dtype}-{index}" / "out", to="dense", dtype=dtype)
    for dtype, tolerance in (("float32", 2e-5), ("bfloat16", 0.1)):
        found = plain_logits(*(tmp_path / f"{dtype}-{index}" / "out" for index in range(len(checkpoints))))
        for name, checkpoint, logits in zip(CASES, checkpoints, found, strict=True):
            assert (logits - our_logits(checkpoint)).abs().max() < tolerance, name


def test_the_same_files_as_the_original(tiny_dir: MakeDir, packed_dir: MakeDir, tmp_path: Path) -> None:
    """Names, shapes and files are those that transformers wrote, experts and all."""
    for family in ("mixtral", "qwen3", "gpt2"):
        out = tmp_path / family
        signbit.export(packed_dir(family), out, to="dense", dtype="float32")
        written, original = (load_file(path / "model.safetensors") for path in (out, tiny_dir(family)))
        assert {name: t.shape for name, t in written.items()} == {name: t.shape for name, t in original.items()}
        config, known = (json.loads((path / "config.json").read_text()) for path in (out, tiny_dir(family)))
        assert config == known
        files = {file.name for file in out.iterdir()}
        assert files == {file.name for file in tiny_dir(family).iterdir()} | {RECORD}


def test_what_is_written_is_said(packed_dir: MakeDir, tmp_path: Path) -> None:
    result = signbit.export(packed_dir("llama", method="sign"), tmp_path / "out", to="dense", dtype="float32")
    assert result == json.loads((tmp_path / "out" / RECORD).read_text())
    assert result["types"] == {"float32": {"matrices": 16, "exact": 16, "relative_error": 0.0}}
    assert result["bytes"] == (tmp_path / "out" / "model.safetensors").stat().st_size
    rounded = signbit.export(packed_dir("llama", method="sign"), tmp_path / "b", to="dense")["types"]["bfloat16"]
    assert rounded["exact"] == 0
    assert 1e-4 < rounded["relative_error"] < 4e-3


def test_shards(packed_dir: MakeDir, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A block may lie in several; it is then made for each, and counted once."""
    whole = signbit.export(packed_dir("mixtral"), tmp_path / "whole", to="dense", dtype="float32")

    def limited(self: Any, directory: Any, max_shard_size: str = "50KB") -> None: ...

    monkeypatch.setattr("signbit.checkpoint.PreTrainedModel.save_pretrained", limited)
    result = signbit.export(packed_dir("mixtral"), tmp_path / "out", to="dense", dtype="float32")
    assert result["types"] == whole["types"]
    weight_map = json.loads((tmp_path / "out" / INDEX).read_text())["weight_map"]
    assert len(set(weight_map.values())) > 3
    shards = [load_file(file) for file in sorted((tmp_path / "out").glob("*.safetensors"))]
    merged = {name: tensor for shard in shards for name, tensor in shard.items()}
    expected = load_file(tmp_path / "whole" / "model.safetensors")
    assert merged.keys() == expected.keys() == weight_map.keys()
    assert all(torch.equal(tensor, expected[name]) for name, tensor in merged.items())


def test_an_original_is_written_again(tiny_dir: MakeDir, tmp_path: Path) -> None:
    signbit.export(tiny_dir("mixtral"), tmp_path / "out", to="dense", dtype="float32")
    written, original = (load_file(d / "model.safetensors") for d in (tmp_path / "out", tiny_dir("mixtral")))
    assert written.keys() == original.keys()
    assert all(torch.equal(tensor, original[name]) for name, tensor in written.items())


def test_only_exports_are_overwritten(packed_dir: MakeDir, tiny_dir: MakeDir, tmp_path: Path) -> None:
    checkpoint, out = packed_dir("llama"), tmp_path / "out"
    signbit.export(checkpoint, out, to="dense")
    with pytest.raises(SignbitError, match=r"already exists: .* --overwrite"):
        signbit.export(checkpoint, out, to="dense")
    signbit.export(checkpoint, out, to="dense", dtype="float32", overwrite=True)
    assert json.loads((out / "config.json").read_text())["dtype"] == "float32"
    (out / RECORD).unlink()
    with pytest.raises(SignbitError, match="was not written by an export"):
        signbit.export(checkpoint, out, to="dense", overwrite=True)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out"]


def test_nothing_is_left_of_what_fails(packed_dir: MakeDir, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*arguments: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("signbit.exporting.dense.write_tensors", fail)
    with pytest.raises(SignbitError, match="No space left on device"):
        signbit.export(packed_dir("llama"), tmp_path / "out", to="dense")
    assert not list(tmp_path.iterdir())


def test_a_damaged_checkpoint(packed_dir: MakeDir, tmp_path: Path) -> None:
    """Nothing is left out in silence, and no reading error is called a full disk."""
    checkpoint = tmp_path / "checkpoint"
    shutil.copytree(packed_dir("llama"), checkpoint)
    config = json.loads((checkpoint / "config.json").read_text())
    (checkpoint / "config.json").write_text(json.dumps({**config, "num_hidden_layers": 1}))
    with pytest.raises(SignbitError, match=r"layers\.1\..* is packed, but config\.json makes a model without it"):
        signbit.export(checkpoint, tmp_path / "out", to="dense")
    (checkpoint / "config.json").write_text(json.dumps(config))
    (checkpoint / "generation_config.json").write_text("{")
    with pytest.raises(SignbitError, match=r"generation_config\.json cannot be read"):
        signbit.export(checkpoint, tmp_path / "out", to="dense")
    assert list(tmp_path.iterdir()) == [checkpoint]


def test_what_no_plain_model_does(packed_dir: MakeDir, tiny_dir: MakeDir, text_file: Path, tmp_path: Path) -> None:
    corrected = packed_dir("qwen2", bias_correction=True)
    with pytest.raises(SignbitError, match="no place for it: quantize with bias_correction=false"):
        signbit.export(corrected, tmp_path / "out", to="dense")
    with pytest.raises(SignbitError, match="normalises its outputs"):
        signbit.export(packed_dir("llama", method="onebit", group_size=0, norm=True), tmp_path / "out", to="dense")
    cases: list[tuple[dict[str, Any], str]] = [
        ({"to": "onnx"}, "is no form to export to"),
        ({"to": "dense", "type": "f16"}, "type is for gguf"),
        ({"to": "gguf", "dtype": "float16"}, "dtype is for dense"),
        ({"to": "dense", "dtype": "int8"}, "dtype 'int8' is none of"),
    ]
    for arguments, message in cases:
        with pytest.raises(SignbitError, match=message):
            signbit.export(packed_dir("llama"), tmp_path / "out", **arguments)
    with pytest.raises(SignbitError, match="the model lies in"):
        signbit.export(corrected, corrected, to="dense", overwrite=True)
    with pytest.raises(SignbitError, match="does not exist: create it first"):
        signbit.export(corrected, tmp_path / "no" / "out", to="dense")
    assert not list(tmp_path.iterdir())
