"""Checkpoints that the types of GGUF have room for: rows of whole blocks."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import transformers

import signbit
from tiny import POSITIONS, SMALL_RECIPE, SPECIAL_IDS, VOCAB, random_model, tokenizer

_ROPE = {"rope_theta": 10000.0}
_LLAMA3 = {
    **_ROPE,
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}
_EXPERTS = {"num_experts_per_tok": 2}
_MOE = {**_EXPERTS, "head_dim": 128, "moe_intermediate_size": 128, "num_experts": 4, "norm_topk_prob": True}
WIDE: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("LlamaConfig", {"tie_word_embeddings": True}),
    "llama biases": ("LlamaConfig", {"attention_bias": True, "mlp_bias": True}),
    "llama3": ("LlamaConfig", {"rope_parameters": _LLAMA3}),
    "llama linear": ("LlamaConfig", {"rope_parameters": {**_ROPE, "rope_type": "linear", "factor": 4.0}}),
    "mistral": ("MistralConfig", {"sliding_window": 48}),
    "mixtral": ("MixtralConfig", {**_EXPERTS, "num_local_experts": 4}),
    "qwen2": ("Qwen2Config", {}),
    "qwen3": ("Qwen3Config", {"head_dim": 128}),
    "qwen3 biases": ("Qwen3Config", {"head_dim": 128, "attention_bias": True}),
    "qwen3_moe": ("Qwen3MoeConfig", _MOE),
    "yarn": ("LlamaConfig", {"rope_parameters": {**_ROPE, "rope_type": "yarn", "factor": 4.0}}),
    "gelu": ("LlamaConfig", {"hidden_act": "gelu"}),
}


@pytest.fixture(scope="session")
def wide_dir(text_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """`wide_dir(name, **keys of the recipe)`: a packed model of 256 columns, made with XNOR, once."""
    made: dict[str, Path] = {}

    def original(name: str) -> Path:
        directory = tmp_path_factory.mktemp("wide") / "model"
        kind, changes = WIDE[name]
        config = getattr(transformers, kind)(
            vocab_size=VOCAB,
            hidden_size=256,
            intermediate_size=384,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            max_position_embeddings=POSITIONS,
            **SPECIAL_IDS,
            **changes,
        )
        random_model(config).save_pretrained(directory)
        tokenizer().save_pretrained(directory)
        return directory

    def directory(name: str, **keys: Any) -> Path:
        recipe = {**SMALL_RECIPE, "method": "xnor", "group_size": 128, "calib": str(text_file), **keys}
        key = repr((name, recipe))
        if key not in made:
            source = made.setdefault(name, original(name)) if name not in made else made[name]
            made[key] = tmp_path_factory.mktemp("wide-packed") / "checkpoint"
            signbit.quantize(source, made[key], recipe, device="cpu")
        return made[key]

    return directory
