"""Checkpoints on disk: every byte accounted for, nothing loaded that does not fit, loadable without knowing signbit."""

import json
import os
import shutil
import struct
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel

import signbit
from signbit import SignbitError

MakeDir = Callable[..., Path]
LAYER = "model.layers.1.mlp.up_proj"
SIGNS = f"{LAYER}.packed.signs"
SCALES = f"{LAYER}.packed.scales"


def header_of(file: Path) -> tuple[int, dict[str, dict[str, Any]]]:
    """Bytes of the header, and its entries, by the letter of the safetensors format."""
    with file.open("rb") as stream:
        length = struct.unpack("<Q", stream.read(8))[0]
        header = json.loads(stream.read(length))
    header.pop("__metadata__")
    return 8 + length, header


def size(entry: dict[str, Any]) -> int:
    begin, end = entry["data_offsets"]
    return int(end - begin)


# --- honest bits ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", ["billm", "arb-llm", "pb-llm", "xnor", "sign"])
@pytest.mark.parametrize("family", ["llama", "gpt2", "mixtral"])
def test_bits_are_the_files_bytes(family: str, method: str, packed_dir: MakeDir, tiny_dir: MakeDir) -> None:
    packed = packed_dir(family, method=method)
    found = signbit.inspect(packed)
    header_bytes, header = header_of(packed / "model.safetensors")
    quantized = sum(size(entry) for name, entry in header.items() if ".packed." in name)
    assert found["bytes"]["quantized"] == sum(found["items"].values()) == quantized
    assert sum(layer["bytes"] for layer in found["layers"]) == quantized
    assert found["bytes"]["total"] == sum(size(entry) for entry in header.values())
    assert found["bytes"]["files"] == header_bytes + found["bytes"]["total"]
    assert found["bytes"]["files"] == (packed / "model.safetensors").stat().st_size
    parts = ("quantized", "embeddings", "other")
    assert sum(found["bytes"][part] for part in parts) == found["bytes"]["total"]
    # The weights that they replace are those of the original file, fused experts and all, that are not left alone.
    _, original = header_of(tiny_dir(family) / "model.safetensors")
    weights = sum(size(entry) for name, entry in original.items()) // 4
    kept = sum(size(entry) for name, entry in header.items() if ".packed." not in name) // 4
    assert found["quantized_weights"] == weights - kept
    assert found["bits_per_weight"] == 8 * quantized / (weights - kept)
    assert found["bits_per_weight"] > found["nominal_bits_per_weight"] >= 1


def test_layers_add_up(packed_dir: MakeDir) -> None:
    packed = packed_dir("llama")
    found = signbit.inspect(packed)
    _, header = header_of(packed / "model.safetensors")
    layers = {layer["name"]: layer for layer in found["layers"]}
    assert layers[LAYER]["shape"] == [100, 72]
    assert layers[LAYER]["layout"] == "split_planes"
    for name, layer in layers.items():
        nbytes = sum(size(entry) for key, entry in header.items() if key.startswith(f"{name}.packed."))
        assert layer["bytes"] == nbytes
        assert layer["bits_per_weight"] == 8 * nbytes / (layer["shape"][0] * layer["shape"][1])
        assert 0 < layer["weight_error"] < 1
        assert 0 < layer["output_error"] < 1
    # A row of 72 columns takes three 32-bit words.
    assert size(header[SIGNS]) == 100 * 12


@pytest.mark.parametrize(("codec", "row"), [("int8", 72 + 2), ("int4", 36 + 2), ("keep", 72 * 4)])
@pytest.mark.parametrize("tie", [True, False])
def test_embeddings_and_head_are_counted_apart(codec: str, row: int, tie: bool, packed_dir: MakeDir) -> None:
    codecs = {"embeddings": codec} if tie else {"embeddings": codec, "head": codec}
    found = signbit.inspect(packed_dir("llama", {"tie": tie}, **codecs))
    assert found["bytes"]["embeddings"] == (1 if tie else 2) * 300 * row
    plain = signbit.inspect(packed_dir("llama", {"tie": tie}))
    assert found["items"] == plain["items"]
    assert found["bits_per_weight"] == plain["bits_per_weight"]
    assert found["bytes"]["other"] == plain["bytes"]["other"] == 5 * 72 * 4  # norms


def test_inspecting_an_original(tiny_dir: MakeDir) -> None:
    original = tiny_dir("mixtral", dtype=torch.bfloat16)
    found = signbit.inspect(original)
    _, header = header_of(original / "model.safetensors")
    assert found["bytes"]["total"] == sum(size(entry) for entry in header.values())
    assert found["bytes"]["embeddings"] == 2 * 300 * 64 * 2
    assert found["bytes"]["quantized"] == found["quantized_weights"] == 0
    assert found["bits_per_weight"] is None


def test_no_pickle_and_no_path_of_this_machine_but_the_recipes(packed_dir: MakeDir, text_file: Path) -> None:
    packed = packed_dir("llama")
    assert not [file for file in packed.iterdir() if file.suffix in (".bin", ".pt", ".pth", ".pkl")]
    config = json.loads((packed / "config.json").read_text())
    assert config["quantization_config"].pop("calib") == str(text_file)
    assert str(text_file.parent.parent) not in json.dumps(config)


# --- tampering --------------------------------------------------------------------------------------------------------


def rewrite(checkpoint: Path, change: Callable[[dict[str, Tensor]], Any]) -> None:
    file = checkpoint / "model.safetensors"
    tensors = load_file(file)
    change(tensors)
    save_file(tensors, file, metadata={"format": "pt"})


def reconfigure(checkpoint: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    file = checkpoint / "config.json"
    config = json.loads(file.read_text())
    change(config["quantization_config"])
    file.write_text(json.dumps(config))


def truncate(checkpoint: Path, keep: int) -> None:
    os.truncate(checkpoint / "model.safetensors", keep)


def layer(**changes: Any) -> Callable[[Path], None]:
    return lambda path: reconfigure(path, lambda q: q["layers"][LAYER].update(changes))


def rename(checkpoint: Path) -> None:
    new = LAYER.replace("up_proj", "op_proj")
    rewrite(checkpoint, lambda t: t.update({key.replace(LAYER, new): t.pop(key) for key in [*t] if LAYER in key}))
    reconfigure(checkpoint, lambda q: q["layers"].update({new: q["layers"].pop(LAYER)}))


Damage = Callable[[Path], Any]
# What is done to a checkpoint -> what the error names.
DAMAGES: dict[str, tuple[Damage, list[str]]] = {
    "wrong dtype": (
        lambda path: rewrite(path, lambda t: t.update({SCALES: t[SCALES].float()})),
        ["model.safetensors", SCALES],
    ),
    "dtype of the same size": (
        lambda path: rewrite(path, lambda t: t.update({SCALES: t[SCALES].bfloat16()})),
        ["model.safetensors", SCALES],
    ),
    "wrong shape": (
        lambda path: rewrite(path, lambda t: t.update({SIGNS: t[SIGNS][:, :-4].contiguous()})),
        ["model.safetensors", SIGNS],
    ),
    "shape of the same size": (
        lambda path: rewrite(path, lambda t: t.update({SIGNS: t[SIGNS].flatten()})),
        ["model.safetensors", SIGNS],
    ),
    "packed tensor missing": (lambda path: rewrite(path, lambda t: t.pop(SIGNS)), [SIGNS]),
    "plain tensor missing": (lambda path: rewrite(path, lambda t: t.pop("model.norm.weight")), ["model.norm.weight"]),
    "packed tensor too many": (
        lambda path: rewrite(path, lambda t: t.update({f"{LAYER}.packed.gizmo": torch.zeros(3)})),
        ["model.safetensors", f"{LAYER}.packed.gizmo"],
    ),
    "dense weight too many": (
        lambda path: rewrite(path, lambda t: t.update({f"{LAYER}.weight": torch.zeros(100, 72)})),
        [f"{LAYER}.weight"],
    ),
    "plain tensor of another shape": (
        lambda path: rewrite(path, lambda t: t.update({"model.norm.weight": torch.ones(71)})),
        ["model.norm.weight"],
    ),
    "file truncated": (lambda path: truncate(path, 40_000), ["model.safetensors", "truncated"]),
    "header truncated": (lambda path: truncate(path, 100), ["model.safetensors", "truncated"]),
    "file empty": (lambda path: truncate(path, 0), ["model.safetensors"]),
    "file missing": (lambda path: (path / "model.safetensors").unlink(), ["model.safetensors"]),
    "not safetensors": (lambda path: (path / "model.safetensors").write_bytes(b"rubbish" * 9), ["model.safetensors"]),
    "newer format": (lambda path: reconfigure(path, lambda q: q.update(format_version=2)), ["version 2", "reads 1"]),
    "no format version": (lambda path: reconfigure(path, lambda q: q.pop("format_version")), ["version None"]),
    "no layers": (lambda path: reconfigure(path, lambda q: q.pop("layers")), ["layers"]),
    "unknown layout": (layer(layout="sign_tensors"), [LAYER, "sign_tensors", "split_planes"]),
    "layout description lacks a field": (
        lambda path: reconfigure(path, lambda q: q["layers"][LAYER].pop("group_size")),
        [LAYER, "group_size"],
    ),
    "layout description has a field too many": (layer(colour="blue"), [LAYER, "colour"]),
    "layout description of a wrong type": (layer(group_size="many"), [LAYER]),
    "layout description is no mapping": (
        lambda path: reconfigure(path, lambda q: q["layers"].update({LAYER: 7})),
        [LAYER],
    ),
    "shape in config.json": (layer(shape=[100, 40]), [LAYER]),
    "shape of three dimensions": (layer(shape=[100, 72, 1]), [LAYER]),
    "negative shape": (layer(shape=[-100, 72]), [LAYER]),
    "unknown scale dtype": (layer(scale_dtype="float8"), [LAYER, "float8"]),
    "a layer that the model does not have": (
        lambda path: reconfigure(
            path, lambda q: q["layers"].update({"model.layers.9.mlp.up_proj": q["layers"][LAYER]})
        ),
        ["model.layers.9.mlp.up_proj"],
    ),
    "a layer forgotten in config.json": (lambda path: reconfigure(path, lambda q: q["layers"].pop(LAYER)), [LAYER]),
    "a layer of another name": (rename, ["model.layers.1.mlp.op_proj"]),
}


# Of these, inspect (which builds no model) and from_pretrained (which may ignore a tensor) need not know.
IN_THE_MODEL = (
    "plain tensor missing",
    "plain tensor of another shape",
    "dense weight too many",
    "a layer that the model does not have",
    "a layer of another name",
)
HARMLESS = ("dense weight too many",)


@pytest.fixture
def damaged(request: pytest.FixtureRequest, packed_dir: MakeDir, tmp_path: Path) -> tuple[Path, list[str]]:
    damage, named = DAMAGES[request.param]
    path = shutil.copytree(packed_dir("llama"), tmp_path / "checkpoint")
    damage(path)
    return path, named


@pytest.mark.parametrize("damaged", DAMAGES, indirect=True)
def test_damage_is_named(damaged: tuple[Path, list[str]]) -> None:
    path, named = damaged
    with pytest.raises(SignbitError) as caught:
        signbit.load(path)
    message = str(caught.value)
    assert all(word in message for word in named), message
    assert "\n" not in message


@pytest.mark.parametrize("damaged", [name for name in DAMAGES if name not in HARMLESS], indirect=True)
def test_damage_is_never_loaded_by_transformers(damaged: tuple[Path, list[str]]) -> None:
    """Whatever the error is: no weights that are made up."""
    path, _ = damaged
    with pytest.raises(Exception):  # noqa: B017
        AutoModelForCausalLM.from_pretrained(path)


@pytest.mark.parametrize("damaged", [name for name in DAMAGES if name not in IN_THE_MODEL], indirect=True)
def test_damage_is_named_by_inspect(damaged: tuple[Path, list[str]]) -> None:
    path, named = damaged
    with pytest.raises(SignbitError) as caught:
        signbit.inspect(path)
    assert all(word in str(caught.value) for word in named)


def test_a_model_that_is_no_checkpoint_is_refused(tiny_dir: MakeDir, tmp_path: Path) -> None:
    with pytest.raises(SignbitError, match="not a signbit checkpoint"):
        signbit.load(tiny_dir("llama"))
    with pytest.raises(SignbitError, match=r"no config\.json"):
        signbit.load(tmp_path)


# --- shards -----------------------------------------------------------------------------------------------------------


def test_large_checkpoints_are_sharded(
    packed_dir: MakeDir, tiny_dir: MakeDir, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By transformers' own limit, here lowered."""
    whole = packed_dir("mixtral")

    def save_pretrained(self: PreTrainedModel, directory: str, max_shard_size: str = "100KB") -> None: ...

    monkeypatch.setattr(PreTrainedModel, "save_pretrained", save_pretrained)
    recipe = signbit.Recipe(signbit.inspect(whole)["recipe"])
    signbit.quantize(str(tiny_dir("mixtral")), tmp_path / "out", recipe, device="cpu")
    monkeypatch.undo()
    shards = sorted((tmp_path / "out").glob("model-0000?-of-0000?.safetensors"))
    assert len(shards) > 1
    assert not (tmp_path / "out" / "model.safetensors").exists()
    merged: dict[str, Tensor] = {}
    for shard in shards:
        tensors = load_file(shard)
        assert sum(t.nbytes for t in tensors.values()) <= 100_000 or len(tensors) == 1
        merged |= tensors
    wanted = load_file(whole / "model.safetensors")
    assert merged.keys() == wanted.keys()
    assert all(torch.equal(merged[name], tensor) for name, tensor in wanted.items())
    assert signbit.inspect(tmp_path / "out")["items"] == signbit.inspect(whole)["items"]
    ids = torch.arange(40).view(2, 20)
    with torch.no_grad():
        assert torch.equal(signbit.load(tmp_path / "out")[0](ids).logits, signbit.load(whole)[0](ids).logits)
    shards[1].unlink()
    with pytest.raises(SignbitError, match=f"lacks the shard {shards[1].name}"):
        signbit.load(tmp_path / "out")


# --- without signbit --------------------------------------------------------------------------------------------------


def test_the_stub_loads_it_where_signbit_was_not_imported(packed_dir: MakeDir, tmp_path: Path) -> None:
    packed, file = packed_dir("qwen3", embeddings="int8"), tmp_path / "logits.safetensors"
    program = f"""
import sys, torch
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM
assert "signbit" not in sys.modules
model = AutoModelForCausalLM.from_pretrained({str(packed)!r}, trust_remote_code=True)
with torch.no_grad():
    save_file({{"logits": model(torch.arange(40).view(2, 20)).logits}}, {str(file)!r})
"""
    subprocess.run(
        [sys.executable, "-c", program], check=True, timeout=120, env={**os.environ, "HF_HOME": str(tmp_path / "home")}
    )
    with torch.no_grad():
        wanted = signbit.load(packed)[0](torch.arange(40).view(2, 20)).logits
    torch.testing.assert_close(load_file(file)["logits"], wanted, rtol=0, atol=0)


def test_the_stub_is_two_lines(packed_dir: MakeDir) -> None:
    packed = packed_dir("mixtral")
    auto_map = json.loads((packed / "config.json").read_text())["auto_map"]
    assert auto_map == {"AutoModelForCausalLM": "modeling_signbit.MixtralForCausalLM"}
    lines = (packed / "modeling_signbit.py").read_text().splitlines()
    assert [line.split("  #")[0] for line in lines] == ["import signbit", "from transformers import MixtralForCausalLM"]


@pytest.mark.skipif(sys.platform != "linux", reason="looks into /proc")
def test_packed_tensors_are_where_the_file_is_mapped(packed_dir: MakeDir) -> None:
    """Loading copies nothing: the system reads what is used, keeps one copy for all processes, and may drop it."""
    directory = packed_dir("llama")
    model = signbit.load(directory)[0]
    mapped = [
        tuple(int(end, 16) for end in line.split()[0].split("-"))
        for line in Path("/proc/self/maps").read_text(encoding="utf-8").splitlines()
        if line.endswith(str(directory / "model.safetensors"))
    ]
    packed = [tensor for name, tensor in model.named_buffers() if ".packed." in name]
    assert packed
    assert all(any(start <= tensor.data_ptr() < end for start, end in mapped) for tensor in packed)
