"""Blocks, linears and experts are found from the module tree, for every family."""

import pytest
import torch
import transformers
from torch import nn
from transformers.pytorch_utils import Conv1D

from signbit import SignbitError
from signbit.architectures import (
    UnfusedExperts,
    dense_shape,
    dense_weight,
    find_blocks,
    linears_of,
    unfuse_experts,
    unquantized_parameters,
)
from tiny import FAMILIES, SPECIAL_IDS, build

BLOCKS = {"opt": "model.decoder.layers", "gpt_neox": "gpt_neox.layers", "gpt2": "transformer.h"}
QKVO = {f"self_attn.{name}": None for name in ("q_proj", "k_proj", "v_proj", "o_proj")}
GATED = {"mlp.gate_proj", "mlp.up_proj", "mlp.down_proj"}
LLAMA = set(QKVO) | GATED
OPT = {"self_attn.k_proj", "self_attn.v_proj", "self_attn.q_proj", "self_attn.out_proj", "fc1", "fc2"}
EXPERTS = {f"mlp.experts.{e}.{name}" for e in range(4) for name in ("gate_up_proj", "down_proj")}
# The linears of the last block.
LINEARS = {
    "llama": LLAMA,
    "mistral": LLAMA,
    "qwen2": LLAMA,
    "qwen3": LLAMA,
    "gemma2": LLAMA,
    "gemma3": LLAMA,
    "opt": OPT,
    "opt_projected": OPT,
    "gpt_neox": {"attention.query_key_value", "attention.dense", "mlp.dense_h_to_4h", "mlp.dense_4h_to_h"},
    "phi3": {"self_attn.qkv_proj", "self_attn.o_proj", "mlp.gate_up_proj", "mlp.down_proj"},
    "gpt2": {"attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj"},
    "qwen3_moe": set(QKVO) | EXPERTS,
    "mixtral": set(QKVO) | EXPERTS,
}
MIXTURES = ("qwen3_moe", "mixtral")


@pytest.mark.parametrize("family", FAMILIES)
def test_blocks_and_linears(family: str) -> None:
    model = build(family)
    unfuse_experts(model)
    name, blocks = find_blocks(model)
    assert name == BLOCKS.get(family.removesuffix("_projected"), "model.layers")
    assert len(blocks) == model.config.num_hidden_layers
    assert set(linears_of(blocks[-1])) == LINEARS[family]


def test_first_block_of_a_mixture_may_be_dense() -> None:
    assert set(linears_of(find_blocks(build("qwen3_moe"))[1][0])) == LLAMA


@pytest.mark.parametrize("family", ["opt", "gpt2"])
def test_dense_weight_is_out_by_in(family: str) -> None:
    for linear in linears_of(find_blocks(build(family))[1][0]).values():
        out, width = dense_shape(linear)
        assert dense_weight(linear, linear.weight).shape == (out, width)
        x = torch.randn(3, width)
        torch.testing.assert_close(linear(x), x @ dense_weight(linear, linear.weight).T + linear.bias)


def unfused_copy(model: transformers.PreTrainedModel) -> transformers.PreTrainedModel:
    """`model` with its experts taken apart, and filled from where unfuse_experts says."""
    fused = dict(model.named_parameters())
    copy = type(model)(model.config).eval()
    copy.load_state_dict(model.state_dict())
    with torch.no_grad():
        for name, part in unfuse_experts(copy).items():
            owner, _, leaf = name.rpartition(".")
            setattr(copy.get_submodule(owner), leaf, nn.Parameter(part.take(fused[part.name]).clone()))
    return copy


@pytest.mark.parametrize("family", MIXTURES)
def test_unfused_experts_compute_the_same(family: str) -> None:
    model = build(family)
    model.set_experts_implementation("eager")
    ids = torch.randint(3, 300, (2, 40), generator=torch.Generator().manual_seed(0))
    unfused = unfused_copy(model)
    assert any(isinstance(module, UnfusedExperts) for module in unfused.modules())
    assert not any(p.ndim == 3 for p in unfused.parameters())
    with torch.no_grad():
        torch.testing.assert_close(unfused(ids).logits, model(ids).logits, rtol=0, atol=1e-6)


def test_unfused_experts_with_bias_clamped_gate_and_transposed_weights() -> None:
    """gpt-oss: [in, out] weights, biases, an interleaved and clamped gate of its own."""
    config = transformers.GptOssConfig(
        vocab_size=300,
        hidden_size=32,
        intermediate_size=24,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=16,
        num_local_experts=4,
        num_experts_per_tok=2,
        **SPECIAL_IDS,
    )
    model = transformers.AutoModelForCausalLM.from_config(config).eval()
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=0.5)
    model.set_experts_implementation("eager")
    ids = torch.randint(3, 300, (2, 20))
    with torch.no_grad():
        torch.testing.assert_close(unfused_copy(model)(ids).logits, model(ids).logits, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("family", FAMILIES)
def test_every_parameter_is_quantized_or_has_a_reason(family: str) -> None:
    model = build(family, tie=False)
    unfuse_experts(model)
    prefix, blocks = find_blocks(model)
    quantized = {f"{prefix}.{i}.{name}" for i, block in enumerate(blocks) for name in linears_of(block)}
    reasons = unquantized_parameters(model, quantized, {})
    inside = {name for name, _ in model.named_parameters() if name.rpartition(".")[0] in quantized}
    assert reasons.keys() == {name for name, _ in model.named_parameters()} - inside
    assert all(reasons.values())
    kinds = list(reasons.values())
    assert kinds.count("embedding") == 1
    assert kinds.count("output head") == 1
    # A router, and nothing else inside the blocks, is a matrix that stays as it is.
    matrices = {name for name in reasons if name.startswith(prefix) and model.get_parameter(name).ndim > 1}
    assert matrices == {name for name, _ in model.named_parameters() if name.endswith("mlp.gate.weight")}
    assert bool(matrices) == (family in MIXTURES)


def test_routers_that_are_plain_linears_are_left_alone() -> None:
    """As mixtures of code that keeps its experts in a list: the router is a linear with one output an expert."""
    model = build("llama")
    block = model.model.layers[1]
    block.mlp.experts = nn.ModuleList(nn.Linear(72, 72) for _ in range(5))
    block.mlp.gate = nn.Linear(72, 5)
    linears = linears_of(block)
    assert "mlp.gate" not in linears
    assert "mlp.experts.4" in linears
    assert unquantized_parameters(model, set(), {})["model.layers.1.mlp.gate.weight"] == "chooses experts"


def test_skipped_linears_carry_their_reason() -> None:
    reasons = unquantized_parameters(build("llama"), set(), {"model.layers.0.mlp.up_proj": "because I say so"})
    assert reasons["model.layers.0.mlp.up_proj.weight"] == "because I say so"


def test_a_model_without_blocks_is_refused() -> None:
    config = transformers.ResNetConfig(embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1], layer_type="basic")
    with pytest.raises(SignbitError, match="ResNetModel has no list of decoder blocks"):
        find_blocks(transformers.ResNetModel(config))


def test_conv1d_is_a_linear() -> None:
    assert all(isinstance(linear, Conv1D) for linear in linears_of(find_blocks(build("gpt2"))[1][0]).values())
