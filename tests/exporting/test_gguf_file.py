"""``export --to gguf``: the file as gguf's own reader sees it."""

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from gguf import GGUFReader

import signbit
from q1_0 import decode_q1_0
from signbit import SignbitError
from signbit.journal import Journal
from tiny import VOCAB, tokenizer

MakeDir = Callable[..., Path]


def tensors_of(file: Path) -> dict[str, Any]:
    return {tensor.name: tensor for tensor in GGUFReader(file).tensors}


def field(file: Path, key: str) -> Any:
    found = GGUFReader(file).get_field(key)
    return None if found is None else found.contents()


def weight(checkpoint: Path, name: str) -> np.ndarray[Any, Any]:
    found: np.ndarray[Any, Any] = signbit.load(checkpoint)[0].get_submodule(name).packed.dequantize().numpy()
    return found


def rotated(rows: np.ndarray[Any, Any], heads: int) -> np.ndarray[Any, Any]:
    """By the letter of llama.cpp's converter: feature i of the first half comes before feature i of the second."""
    size = len(rows) // heads
    order = [h * size + part * size // 2 + i for h in range(heads) for i in range(size // 2) for part in (0, 1)]
    return rows[order]


def test_bits_are_the_same(wide_dir: MakeDir, tmp_path: Path) -> None:
    checkpoint, out = wide_dir("llama", embeddings="int8"), tmp_path / "out.gguf"
    result = signbit.export(checkpoint, out, to="gguf")
    assert result["types"] == {
        "q8_0": {"matrices": 1, "exact": 1, "relative_error": 0.0},
        "q1_0": {"matrices": 14, "exact": 14, "relative_error": 0.0},
    }
    assert not result["inexact"]
    assert result["bytes"] == out.stat().st_size
    tensors = tensors_of(out)
    assert len(tensors) == 2 + 2 * 9  # tied: no output.weight
    for name, module, heads in (
        ("blk.1.ffn_down", "model.layers.1.mlp.down_proj", 0),
        ("blk.0.attn_q", "model.layers.0.self_attn.q_proj", 4),
        ("blk.0.attn_k", "model.layers.0.self_attn.k_proj", 2),
        ("blk.0.attn_v", "model.layers.0.self_attn.v_proj", 0),
    ):
        expected = weight(checkpoint, module)
        found = decode_q1_0(tensors[f"{name}.weight"].data)
        assert np.array_equal(found, rotated(expected, heads) if heads else expected), name
    embeddings = tensors["token_embd.weight"]
    rows = gguf.dequantize(embeddings.data, embeddings.tensor_type)
    assert np.array_equal(rows, weight(checkpoint, "model.embed_tokens"))
    assert {tensors[name].tensor_type.name for name in ("output_norm.weight", "blk.0.attn_norm.weight")} == {"F32"}
    assert field(out, "general.file_type") == gguf.LlamaFileType.MOSTLY_Q1_0
    assert field(out, "general.architecture") == "llama"


def test_experts_are_stacked(wide_dir: MakeDir, tmp_path: Path) -> None:
    checkpoint, out = wide_dir("mixtral"), tmp_path / "out.gguf"
    assert signbit.export(checkpoint, out, to="gguf")["types"]["q1_0"]["matrices"] == 2 * (4 + 4 * 2)
    tensors = tensors_of(out)
    both = weight(checkpoint, "model.layers.1.mlp.experts.2.gate_up_proj")
    for name, expected in (("gate", both[:384]), ("up", both[384:])):
        found = tensors[f"blk.1.ffn_{name}_exps.weight"]
        assert list(found.shape) == [256, 384, 4]
        assert np.array_equal(decode_q1_0(found.data[2]), expected)


@pytest.mark.parametrize("left_out", [0, 1])
def test_packed_experts_beside_others(left_out: int, wide_dir: MakeDir, tmp_path: Path) -> None:
    """They share a tensor, so the packed ones are not written as they are: not unless a type is named."""
    checkpoint, out = wide_dir("mixtral", skip=[f"*.experts.{left_out}.*"]), tmp_path / "out.gguf"
    with pytest.raises(SignbitError, match=r"12 matrices .*12: experts that are not packed share the tensor"):
        signbit.export(checkpoint, out, to="gguf")
    types = signbit.export(checkpoint, out, to="gguf", type="f32")["types"]
    assert {kind: (found["matrices"], found["exact"]) for kind, found in types.items()} == {
        "q1_0": (8, 8),
        "f32": (12, 12),
    }
    up = tensors_of(out)["blk.1.ffn_up_exps.weight"].data
    experts = signbit.load(checkpoint)[0].get_submodule("model.layers.1.mlp.experts")
    for index in range(4):
        linear = experts.get_submodule(f"{index}.gate_up_proj")
        rows = linear.weight if index == left_out else linear.packed.dequantize()
        assert np.array_equal(up[index], rows.detach().numpy()[384:]), index


def test_what_does_not_map_is_explained_and_dequantized_if_asked(wide_dir: MakeDir, tmp_path: Path) -> None:
    checkpoint, out = wide_dir("llama", method="billm"), tmp_path / "out.gguf"
    with pytest.raises(SignbitError, match=r"14 matrices .* no exact type in GGUF .*split_planes.* --type \(f32, f16"):
        signbit.export(checkpoint, out, to="gguf")
    assert not list(tmp_path.iterdir())
    for kind, error in (("f32", 0), ("f16", 3e-4), ("q8_0", 6e-3), ("q4_0", 0.12)):
        result = signbit.export(checkpoint, out, to="gguf", type=kind, overwrite=True)
        assert result["types"][kind]["matrices"] == sum(result["inexact"].values()) == 14
        assert error / 100 <= result["types"][kind]["relative_error"] <= error
        found = tensors_of(out)["blk.0.ffn_up.weight"]
        expected = weight(checkpoint, "model.layers.0.mlp.up_proj")
        difference = np.linalg.norm(gguf.dequantize(found.data, found.tensor_type) - expected)
        assert difference <= 1.2 * error * np.linalg.norm(expected)


def test_the_tokenizer(wide_dir: MakeDir, tmp_path: Path) -> None:
    out = tmp_path / "out.gguf"
    signbit.export(wide_dir("llama"), out, to="gguf")
    vocab = tokenizer().get_vocab()
    tokens = field(out, "tokenizer.ggml.tokens")
    assert len(tokens) == VOCAB
    assert all(tokens[index] == token for token, index in vocab.items())
    assert field(out, "tokenizer.ggml.model") == "gpt2"
    assert field(out, "tokenizer.ggml.pre") == "gpt-2"
    assert [field(out, f"tokenizer.ggml.{name}_token_id") for name in ("bos", "eos", "padding")] == [0, 1, 2]
    assert field(out, "tokenizer.ggml.add_bos_token") is False
    assert field(out, "tokenizer.ggml.token_type")[:4] == [3, 3, 3, 1]


def test_context_ends_where_llama_cpp_would_see_more(wide_dir: MakeDir, tmp_path: Path) -> None:
    signbit.export(wide_dir("mistral"), tmp_path / "out.gguf", to="gguf")
    assert field(tmp_path / "out.gguf", "llama.context_length") == 48


def test_refusals(wide_dir: MakeDir, packed_dir: MakeDir, tiny_dir: MakeDir, tmp_path: Path) -> None:
    def refused(model: Path, message: str, name: str = "out.gguf", **options: Any) -> None:
        with pytest.raises(SignbitError, match=message):
            signbit.export(model, tmp_path / name, to="gguf", **options)
        assert not list(tmp_path.iterdir())

    refused(packed_dir("gpt2"), "gpt2 models are not exported to GGUF")
    refused(packed_dir("qwen3_moe"), "layers all have experts")
    refused(wide_dir("yarn"), "rotary positions of kind 'yarn' are not exported")
    refused(wide_dir("gelu"), "with silu, not gelu")
    refused(wide_dir("qwen3 biases"), "gives the attention of qwen3 models no biases")
    refused(tiny_dir("qwen3", dtype=torch.float64), "is torch.float64, which llama.cpp does not compute with")
    refused(packed_dir("llama"), "72 columns, and q4_0 is made of blocks of 32: use --type f16", type="q4_0")
    refused(tiny_dir("llama"), "nothing is packed in", type="f16")
    refused(wide_dir("llama"), "type 'q3' is none of", type="q3")
    refused(wide_dir("llama"), r"should end in \.gguf", name="out")


def test_overwriting(wide_dir: MakeDir, tmp_path: Path) -> None:
    out = tmp_path / "out.gguf"
    signbit.export(wide_dir("llama"), out, to="gguf")
    before = out.read_bytes()
    with pytest.raises(SignbitError, match="already exists"):
        signbit.export(wide_dir("llama"), out, to="gguf")
    signbit.export(wide_dir("llama"), out, to="gguf", overwrite=True)
    assert out.read_bytes() == before


def test_only_gguf_files_are_overwritten(wide_dir: MakeDir, tmp_path: Path) -> None:
    out, pipe = tmp_path / "out.gguf", tmp_path / "pipe.gguf"
    out.write_bytes(b"letters")
    os.mkfifo(pipe)
    for path in (out, pipe):
        with pytest.raises(SignbitError, match="is no GGUF file: it is not overwritten"):
            signbit.export(wide_dir("llama"), path, to="gguf", overwrite=True)
    assert out.read_bytes() == b"letters"
    assert sorted(tmp_path.iterdir()) == [out, pipe]


def test_what_a_killed_export_left_is_removed(wide_dir: MakeDir, tmp_path: Path) -> None:
    (tmp_path / ".out.gguf.123.tmp").write_bytes(b"GGUF")
    (tmp_path / "signbit-weights-out.gguf-abcd1234").mkdir()
    (tmp_path / ".other.gguf.123.tmp").write_bytes(b"GGUF")
    signbit.export(wide_dir("llama"), tmp_path / "out.gguf", to="gguf")
    assert sorted(path.name for path in tmp_path.iterdir()) == [".other.gguf.123.tmp", "out.gguf"]


def test_one_export_at_a_time(wide_dir: MakeDir, tmp_path: Path) -> None:
    with Journal(tmp_path / "out.gguf").locked(), pytest.raises(SignbitError, match="another run is writing"):
        signbit.export(wide_dir("llama"), tmp_path / "out.gguf", to="gguf")


def test_an_original_keeps_its_numbers(tiny_dir: MakeDir, tmp_path: Path) -> None:
    out = tmp_path / "out.gguf"
    signbit.export(tiny_dir("qwen3", dtype=torch.bfloat16), out, to="gguf")
    assert {t.tensor_type.name for t in tensors_of(out).values()} == {"BF16", "F32"}
