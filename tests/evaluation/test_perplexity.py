"""Perplexity and divergence are what the definitions say, computed here the slow and obvious way."""

import json
import math
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

import signbit
from signbit import SignbitError
from signbit.calibration.tokens import tokenize
from signbit.evaluation.perplexity import score, windows_of
from signbit.progress import Silent
from signbit.source import open_source
from tiny import CONFIGS, TEXT, VOCAB, build, tokenizer

MakeDir = Callable[..., Path]
TOKENS = torch.randint(3, VOCAB, (1000,), generator=torch.Generator().manual_seed(5))


@torch.no_grad()
def probabilities(model: PreTrainedModel, window: Tensor) -> Tensor:
    """Of each next token at each position but the last, in float64."""
    logits = model(window.unsqueeze(0)).logits[0, :-1].double()
    exponentials = (logits - logits.max(-1, keepdim=True).values).exp()
    return exponentials / exponentials.sum(-1, keepdim=True)


def naive_perplexity(model: PreTrainedModel, tokens: list[int], seqlen: int, windows: int) -> float:
    means = []
    for index in range(windows):
        window = tokens[index * seqlen : (index + 1) * seqlen]
        p = probabilities(model, torch.tensor(window))
        means.append(sum(-math.log(float(p[i, window[i + 1]])) for i in range(seqlen - 1)) / (seqlen - 1))
    return math.exp(sum(means) / windows)


def close(value: float) -> Any:
    return pytest.approx(value, rel=1e-5)


# --- windows ----------------------------------------------------------------------------------------------------------


def test_windows_follow_each_other_and_drop_the_rest() -> None:
    windows = windows_of(torch.arange(103), 10, None, "text")
    assert torch.equal(windows, torch.arange(100).view(10, 10))


def test_only_the_first_windows() -> None:
    assert torch.equal(windows_of(torch.arange(103), 10, 3, "text"), torch.arange(30).view(3, 10))
    assert len(windows_of(torch.arange(103), 10, 99, "text")) == 10


def test_one_window_is_enough_and_less_is_refused() -> None:
    assert len(windows_of(torch.arange(10), 10, None, "text")) == 1
    with pytest.raises(SignbitError, match="text has 9 tokens, fewer than one window of 10"):
        windows_of(torch.arange(9), 10, None, "text")


# --- perplexity -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("seqlen", "windows"), [(2, 30), (37, 5), (256, 3)])
def test_perplexity(seqlen: int, windows: int) -> None:
    """Window lengths around, at and beyond what is scored at once."""
    model = build("llama")
    found = score(model, windows_of(TOKENS, seqlen, windows, ""), Silent(), "")
    assert found.perplexity == close(naive_perplexity(model, TOKENS.tolist(), seqlen, windows))
    assert found.tokens == seqlen * windows
    assert found.kl is None
    assert found.top1 is None


def test_long_windows_are_scored_in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    model, cut = build("gpt2"), windows_of(TOKENS, 100, 3, "")
    whole = score(model, cut, Silent(), "", build("gpt2", seed=1))
    for size in (1, 7, 99):
        monkeypatch.setattr("signbit.evaluation.perplexity._CHUNK", size)
        parts = score(model, cut, Silent(), "", build("gpt2", seed=1))
        assert parts.perplexity == close(whole.perplexity)
        assert parts.kl == close(whole.kl or 0)
        assert parts.top1 == whole.top1


def test_evaluate_follows_the_protocol(packed_dir: MakeDir, text_file: Path) -> None:
    """The whole text is tokenised once, then cut: by the naive way on the packed model itself."""
    packed = packed_dir("llama")
    found = signbit.evaluate(packed, perplexity=[str(text_file)], seqlen=50, windows=4, device="cpu")
    model, words = signbit.load(packed)
    tokens = words(TEXT).input_ids
    assert found["perplexity"][str(text_file)] == close(naive_perplexity(model, tokens, 50, 4))
    assert found["tokens"][str(text_file)] == 200
    everything = signbit.evaluate(packed, perplexity=[str(text_file)], seqlen=200, device="cpu")
    assert everything["tokens"][str(text_file)] == len(tokens) // 200 * 200


def test_tokenizers_add_what_they_add_by_default() -> None:
    plain = tokenizer()("a b").input_ids
    config = CONFIGS["llama"]()
    assert tokenize(tokenizer(), "a b", config).tolist() == plain
    assert tokenize(lambda _, **__: {"input_ids": [0, *plain]}, "a b", config).tolist() == [0, *plain]


def test_a_model_that_knows_nothing() -> None:
    model = build("llama", tie=False)
    with torch.no_grad():
        model.lm_head.weight.zero_()
    assert score(model, windows_of(TOKENS, 100, 2, ""), Silent(), "").perplexity == close(VOCAB)


def test_outputs_that_are_no_numbers_are_refused() -> None:
    model = build("llama", tie=False)
    with torch.no_grad():
        model.lm_head.weight[5, 5] = float("nan")
    with pytest.raises(SignbitError, match="NaN or infinite"):
        score(model, windows_of(TOKENS, 100, 2, ""), Silent(), "")


def test_hopeless_models_still_get_a_finite_number() -> None:
    model = build("llama", tie=False)
    with torch.no_grad():
        model.lm_head.weight.mul_(1e4)
    assert math.isfinite(score(model, windows_of(TOKENS, 100, 2, ""), Silent(), "").perplexity)


# --- divergence -------------------------------------------------------------------------------------------------------


def test_divergence_from_itself_is_nothing() -> None:
    model = build("llama")
    found = score(model, windows_of(TOKENS, 100, 3, ""), Silent(), "", model)
    assert found.kl == 0
    assert found.top1 == 1


def test_divergence() -> None:
    model, original = build("llama"), build("llama", seed=1)
    cut = windows_of(TOKENS, 60, 4, "")
    found = score(model, cut, Silent(), "", original)
    p = torch.cat([probabilities(original, window) for window in cut])
    q = torch.cat([probabilities(model, window) for window in cut])
    assert found.kl == close(float((p * (p.log() - q.log())).sum(1).mean()))
    assert found.top1 == close(float((p.argmax(1) == q.argmax(1)).double().mean()))
    assert found.perplexity == score(model, cut, Silent(), "").perplexity


def test_evaluate_against_the_original(packed_dir: MakeDir, tiny_dir: MakeDir, text_file: Path) -> None:
    source = str(text_file)
    options: dict[str, Any] = {"perplexity": [source], "seqlen": 60, "windows": 3, "device": "cpu"}
    found = signbit.evaluate(packed_dir("llama"), against=tiny_dir("llama"), **options)
    assert found["divergence"][source]["kl"] > 0.001
    assert 0 < found["divergence"][source]["top1_agreement"] < 1
    itself = signbit.evaluate(tiny_dir("llama"), against=tiny_dir("llama"), **options)
    assert itself["divergence"][source] == {"kl": 0, "top1_agreement": 1}


def test_self_written_text_is_the_originals(packed_dir: MakeDir, tiny_dir: MakeDir) -> None:
    options: dict[str, Any] = {"perplexity": ["self"], "seqlen": 60, "windows": 2, "device": "cpu"}
    found = signbit.evaluate(packed_dir("llama"), against=tiny_dir("llama"), **options)
    assert found["tokens"] == {"self": 120}
    original = signbit.evaluate(tiny_dir("llama"), **options)["perplexity"]["self"]
    # Its own text suits the original better than the packed model, which is scored on the same one.
    assert original < found["perplexity"]["self"]


def test_other_vocabularies_cannot_be_compared(tiny_dir: MakeDir, text_file: Path, tmp_path: Path) -> None:
    model = build("llama")
    model.resize_token_embeddings(310)
    model.save_pretrained(tmp_path)
    tokenizer().save_pretrained(tmp_path)
    with pytest.raises(SignbitError, match="different vocabularies"):
        signbit.evaluate(tmp_path, perplexity=[str(text_file)], seqlen=60, against=tiny_dir("llama"))


# --- GGUF -------------------------------------------------------------------------------------------------------------

_NAMES = {
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
}


def write_gguf(model: PreTrainedModel, file: Path) -> None:
    """A Llama as llama.cpp stores it, in float32."""
    config, words = model.config, tokenizer()
    writer = gguf.GGUFWriter(file, "llama")
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_rope_dimension_count(config.head_dim)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_vocab_size(VOCAB)
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(words.convert_ids_to_tokens(range(VOCAB)))
    writer.add_token_types([3 if i < 3 else 1 for i in range(VOCAB)])
    writer.add_token_merges(
        [" ".join(pair) for pair in json.loads(words.backend_tokenizer.to_str())["model"]["merges"]]
    )
    writer.add_add_bos_token(False)
    writer.add_bos_token_id(0)
    writer.add_eos_token_id(1)
    writer.add_pad_token_id(2)
    tensors = {
        "token_embd.weight": "model.embed_tokens",
        "output_norm.weight": "model.norm",
        "output.weight": "lm_head",
    }
    for i in range(config.num_hidden_layers):
        tensors |= {f"blk.{i}.{theirs}.weight": f"model.layers.{i}.{ours}" for ours, theirs in _NAMES.items()}
    for name, module in tensors.items():
        weight = model.get_submodule(module).weight.detach().numpy()
        if name.endswith(("attn_q.weight", "attn_k.weight")):
            # llama.cpp rotates neighbouring dimensions where transformers rotates halves.
            heads = config.num_attention_heads if "attn_q" in name else config.num_key_value_heads
            weight = weight.reshape(heads, 2, -1, weight.shape[1]).swapaxes(1, 2).reshape(weight.shape)
        writer.add_tensor(name, np.ascontiguousarray(weight))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


@pytest.fixture(scope="module")
def gguf_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("gguf") / "tiny.gguf"
    write_gguf(build("llama", tie=False), file)
    return file


def test_gguf_weights_are_the_originals(gguf_file: Path) -> None:
    source = open_source(str(gguf_file))
    model = build("llama", tie=False)
    parameters = dict(model.named_parameters())
    assert {name for name, _ in source.skeleton.named_parameters()} == parameters.keys()
    for name, parameter in parameters.items():
        assert torch.equal(source.tensor(name), parameter), name
    assert source.dtype == torch.float16  # of what is kept
    assert all(p.device.type == "meta" for p in source.skeleton.parameters())
    assert source.tokenizer(TEXT, add_special_tokens=False).input_ids == tokenizer()(TEXT).input_ids


def test_gguf_is_quantized_like_the_model_it_holds(
    gguf_file: Path, tiny_dir: MakeDir, text_file: Path, tmp_path: Path
) -> None:
    recipe = {"method": "billm", "group_size": 32, "samples": 8, "seqlen": 48, "calib": str(text_file)}
    original = shutil.copytree(tiny_dir("llama", tie=False), tmp_path / "original")
    # Older versions of transformers give a tokenizer that was read from GGUF another default: to begin with <s>.
    open_source(str(gguf_file)).tokenizer.save_pretrained(original)
    for model, out in ((gguf_file, "a"), (original, "b")):
        signbit.quantize(str(model), tmp_path / out, signbit.Recipe({**recipe, "dtype": "float16"}), device="cpu")
    assert (tmp_path / "a" / "model.safetensors").read_bytes() == (tmp_path / "b" / "model.safetensors").read_bytes()
    options: dict[str, Any] = {"perplexity": [str(text_file)], "seqlen": 64, "windows": 2, "device": "cpu"}
    against = signbit.evaluate(tmp_path / "a", against=gguf_file, **options)
    assert against["divergence"][str(text_file)]["kl"] > 0
    assert against["perplexity"] == signbit.evaluate(tmp_path / "b", **options)["perplexity"]
