"""The architectures that can be written as GGUF: their names there, and the numbers that llama.cpp wants of them.

Tensor names come from the gguf package's own table. What is here is what that table does not say: which models
llama.cpp runs the way transformers does, verified by comparing logits (tests/exporting/test_llama_cpp.py).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import gguf
from gguf import MODEL_ARCH, GGUFWriter
from transformers import PreTrainedConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from signbit.errors import SignbitError


@dataclass(frozen=True)
class Family:
    """neighbours: llama.cpp rotates neighbouring features of a head for this architecture, transformers those half a
    head apart; rows of q and k change places."""

    arch: MODEL_ARCH
    neighbours: bool = False

    @property
    def name(self) -> str:
        return gguf.MODEL_ARCH_NAMES[self.arch]


FAMILIES = {
    "llama": Family(MODEL_ARCH.LLAMA, neighbours=True),
    "mistral": Family(MODEL_ARCH.LLAMA, neighbours=True),
    "mixtral": Family(MODEL_ARCH.LLAMA, neighbours=True),
    "qwen2": Family(MODEL_ARCH.QWEN2),
    "qwen3": Family(MODEL_ARCH.QWEN3),
    "qwen3_moe": Family(MODEL_ARCH.QWEN3MOE),
}


def family_of(config: PreTrainedConfig) -> Family:
    """How models with ``config`` are written; SignbitError for those that are not."""
    kind = config.model_type
    if kind not in FAMILIES:
        raise SignbitError(
            f"{kind} models are not exported to GGUF (those that are: {', '.join(FAMILIES)}): export to dense and use "
            "llama.cpp's convert_hf_to_gguf.py"
        )
    activation = getattr(config, "hidden_act", "silu")
    if activation not in ("silu", "swish"):
        raise SignbitError(f"llama.cpp runs {kind} models with silu, not {activation}: export to dense instead")
    if getattr(config, "mlp_only_layers", None) or getattr(config, "decoder_sparse_step", 1) != 1:
        raise SignbitError(f"llama.cpp runs {kind} models whose layers all have experts: export to dense instead")
    if FAMILIES[kind].arch != MODEL_ARCH.LLAMA and getattr(config, "attention_bias", False):
        raise SignbitError(f"llama.cpp gives the attention of {kind} models no biases: export to dense instead")
    if kind == "qwen3_moe" and not config.norm_topk_prob:
        raise SignbitError(f"llama.cpp runs {kind} models with norm_topk_prob=true: export to dense instead")
    return FAMILIES[kind]


def add_metadata(writer: GGUFWriter, config: PreTrainedConfig) -> None:
    """What llama.cpp has to know to build the model."""
    heads = config.num_attention_heads
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // heads
    # llama.cpp attends to everything in these architectures: up to here that is the same.
    window = getattr(config, "sliding_window", None)
    writer.add_context_length(min(config.max_position_embeddings, window or config.max_position_embeddings))
    writer.add_block_count(config.num_hidden_layers)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_key_length(head_dim)
    writer.add_value_length(head_dim)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_vocab_size(config.vocab_size)
    writer.add_rope_dimension_count(head_dim)
    experts = getattr(config, "num_local_experts", None) or getattr(config, "num_experts", None)
    if experts:
        writer.add_expert_count(experts)
        writer.add_expert_used_count(config.num_experts_per_tok)
        writer.add_expert_feed_forward_length(getattr(config, "moe_intermediate_size", config.intermediate_size))
    rope = rope_of(config)
    writer.add_rope_freq_base(rope["rope_theta"])
    if rope["rope_type"] == "linear":
        writer.add_rope_scaling_type(gguf.RopeScalingType.LINEAR)
        writer.add_rope_scaling_factor(rope["factor"])


def rope_of(config: PreTrainedConfig) -> dict[str, Any]:
    """The rotary parameters; SignbitError for a kind that would be written wrongly."""
    rope: dict[str, Any] = {"rope_type": "default", **(getattr(config, "rope_parameters", None) or {})}
    known = (
        ("default", "linear", "llama3")
        if FAMILIES[config.model_type].arch == MODEL_ARCH.LLAMA
        else (
            "default",
            "linear",
        )
    )
    if rope["rope_type"] not in known or rope.get("partial_rotary_factor", 1.0) != 1.0 or "rope_theta" not in rope:
        raise SignbitError(
            f"rotary positions of kind {rope['rope_type']!r} are not exported to GGUF for {config.model_type} models "
            f"(those that are: {', '.join(known)}): export to dense and use llama.cpp's convert_hf_to_gguf.py"
        )
    return rope


def rope_factors(config: PreTrainedConfig) -> Any:
    """What llama.cpp divides each frequency by, float32 [half a head], where Llama 3 changes them; None elsewhere."""
    if rope_of(config)["rope_type"] != "llama3":
        return None
    changed, _ = ROPE_INIT_FUNCTIONS["llama3"](config, "cpu")
    base = rope_of(config)["rope_theta"]
    plain = [base ** -(i / len(changed)) for i in range(len(changed))]
    return (changed.new_tensor(plain) / changed).float().numpy()
