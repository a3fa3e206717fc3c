"""One token of a 7B-shaped model on a GPU, in each layout and in bfloat16: tokens per second, and memory.

    python benchmarks/gpu_decode.py [--layers 32] [--context 256] [--turns 50] [--matrices sign billm ...]

Random weights, packed as the methods would leave them (``signbit bench kernels``); embeddings and head in 8 bits, as
signbit stores them. A step is the whole model with transformers' static cache, and the choice of the next token, as a
CUDA graph: what is timed is the GPU.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable

import torch
from torch import nn
from transformers import LlamaForCausalLM, StaticCache

from seven_billion import HIDDEN, VOCABULARY, llama_config
from signbit.bench.gpu import seconds
from signbit.bench.random_layouts import MAKERS
from signbit.layouts import Layout
from signbit.modules import QuantizedEmbedding, QuantizedLinear


def build(name: str, layers: int, device: torch.device) -> LlamaForCausalLM:
    """``bfloat16``, or with matrices of a kind; each layer has memory of its own."""
    config = llama_config(layers)
    with torch.device("meta"):
        model = LlamaForCausalLM(config).to(torch.bfloat16).eval()
    if name != "bfloat16":
        pack(model, MAKERS[name], device)
    with device:
        rotary = type(model.model.rotary_emb)(config)
    for module in model.modules():
        if not isinstance(module, Layout):
            module.to_empty(device=device, recurse=False)
    model.model.rotary_emb = rotary
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.02) if parameter.dim() > 1 else nn.init.ones_(parameter)
    return model


def pack(model: LlamaForCausalLM, make: Callable[[int, int], Layout], device: torch.device) -> None:
    made: dict[tuple[int, int], Layout] = {}

    def packed(kind: Callable[[int, int], Layout], shape: tuple[int, int]) -> Layout:
        if shape not in made:
            made[shape] = kind(*shape)
        one = made[shape]
        return type(one)(one.spec, {key: tensor.to(device) for key, tensor in one.state_dict().items()})

    for layer in model.model.layers:
        for owner in (layer.self_attn, layer.mlp):
            for key, linear in list(owner.named_children()):
                if isinstance(linear, nn.Linear):
                    setattr(owner, key, QuantizedLinear(packed(make, tuple(linear.weight.shape))))
    made.clear()
    shape = (VOCABULARY, HIDDEN)
    model.lm_head = QuantizedLinear(packed(MAKERS["int8"], shape))
    model.model.embed_tokens = QuantizedEmbedding(packed(MAKERS["int8"], shape), torch.bfloat16)


@torch.inference_mode()
def seconds_per_token(model: LlamaForCausalLM, context: int, turns: int, device: torch.device) -> float:
    cache = StaticCache(config=model.config, max_cache_len=context)
    ids = torch.zeros(1, 1, dtype=torch.long, device=device)
    position = torch.zeros(1, 1, dtype=torch.long, device=device)

    def step() -> None:
        logits = model(ids, position_ids=position, past_key_values=cache, use_cache=True).logits
        ids.copy_(logits[:, -1:].argmax(-1))
        position.add_(1)

    return seconds([step], device, turns)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=32)
    parser.add_argument("--context", type=int, default=256)
    parser.add_argument("--turns", type=int, default=50)
    parser.add_argument("--matrices", nargs="+", default=["bfloat16", *MAKERS])
    arguments = parser.parse_args()
    device = torch.device("cuda", torch.cuda.current_device())
    print("| matrices | tokens/s | ms a token | GiB of weights | GiB at most |\n|---|---|---|---|---|", flush=True)
    for name in arguments.matrices:
        torch.cuda.empty_cache()
        model = build(name, arguments.layers, device)
        torch.cuda.reset_peak_memory_stats()
        held = torch.cuda.memory_allocated() / 2**30
        taken = seconds_per_token(model, arguments.context, arguments.turns, device)
        peak = torch.cuda.max_memory_allocated() / 2**30
        print(f"| {name} | {1 / taken:.0f} | {1e3 * taken:.2f} | {held:.2f} | {peak:.2f} |", flush=True)
        del model


if __name__ == "__main__":
    main()
