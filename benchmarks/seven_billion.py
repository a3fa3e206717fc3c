"""A model of seven billion weights on this machine: how fast it is ready, how fast it writes, what memory it takes.

    python benchmarks/seven_billion.py [--layers 32] [--tokens 32] [--activations exact|int8] [--keep DIR]

Writes a random checkpoint in the shape of Llama 2 7B: one sign plane with a scale for each row, embeddings and head in
8 bits. It is loaded and decoded in a process of its own (``signbit bench decode``), so that nothing of the writing is
in the figures. The checkpoint, about 1.1 GB, is deleted afterwards unless ``--keep`` says where it stays.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import Tensor
from transformers import LlamaConfig, PreTrainedTokenizerFast

from signbit.checkpoint import FORMAT_VERSION, METHOD_NAME
from signbit.layouts.integers import IntegersSpec
from signbit.layouts.sign_planes import SignPlanesSpec
from signbit.recipe import Recipe
from signbit.safetensors_file import SINGLE, write_tensors

HIDDEN, INTERMEDIATE, HEADS, VOCABULARY = 4096, 11008, 32, 32000
LINEARS = {f"self_attn.{name}_proj": (HIDDEN, HIDDEN) for name in "qkvo"} | {
    "mlp.gate_proj": (INTERMEDIATE, HIDDEN),
    "mlp.up_proj": (INTERMEDIATE, HIDDEN),
    "mlp.down_proj": (HIDDEN, INTERMEDIATE),
}
OUTER = ["lm_head", "model.embed_tokens"]


def write_checkpoint(folder: Path, layers: int) -> None:
    """A random checkpoint, one tensor in memory at a time."""
    signs = {name: SignPlanesSpec(shape, 1, 0, False, "float16") for name, shape in LINEARS.items()}
    specs = {f"model.layers.{layer}.{name}": spec for layer in range(layers) for name, spec in signs.items()}
    specs |= {name: IntegersSpec((VOCABULARY, HIDDEN), 8, 0, False, "float16") for name in OUTER}
    tensors = {
        f"{name}.packed.{key}": (tensor.dtype, tensor.shape)
        for name, spec in specs.items()
        for key, tensor in spec.tensors().items()
    }
    norms = [f"model.layers.{i}.{n}_layernorm.weight" for i in range(layers) for n in ("input", "post_attention")]
    tensors |= dict.fromkeys((*norms, "model.norm.weight"), (torch.float16, (HIDDEN,)))
    generator = torch.Generator().manual_seed(0)

    def supply(name: str) -> Tensor:
        dtype, shape = tensors[name]
        if dtype == torch.uint8:
            words = torch.empty(*shape[:-1], shape[-1] // 8, dtype=torch.int64)
            return words.random_(-(2**63), None, generator=generator).view(torch.uint8)
        if name.endswith("norm.weight"):
            return torch.ones(shape, dtype=dtype)
        # Such scales leave the size of activations as it is; 74 is the deviation of codes of 8 bits.
        deviation = 74.0 if name.startswith(tuple(OUTER)) else 1.0
        return torch.full(shape, HIDDEN**-0.5 / deviation, dtype=dtype)

    write_tensors(tensors, supply, {"format": "pt"}, folder / SINGLE)
    config = llama_config(layers)
    config.quantization_config = {
        "quant_method": METHOD_NAME,
        "format_version": FORMAT_VERSION,
        **Recipe.load("sign", {"group_size": 0}).to_dict(),
        "outer_modules": OUTER,
        "layers": {name: {"layout": _kind(spec), **spec.to_dict()} for name, spec in specs.items()},
    }
    config.save_pretrained(folder)
    words = {f"w{i}": i for i in range(VOCABULARY)}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="w0"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="w0").save_pretrained(folder)


def _kind(spec: SignPlanesSpec | IntegersSpec) -> str:
    return "sign_planes" if isinstance(spec, SignPlanesSpec) else "integers"


def llama_config(layers: int) -> LlamaConfig:
    return LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=HIDDEN,
        intermediate_size=INTERMEDIATE,
        num_hidden_layers=layers,
        num_attention_heads=HEADS,
        num_key_value_heads=HEADS,
        max_position_embeddings=4096,
        architectures=["LlamaForCausalLM"],
        dtype="float16",
        tie_word_embeddings=False,
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=32)
    parser.add_argument("--tokens", type=int, default=32)
    parser.add_argument("--activations", choices=["exact", "int8"], default="exact")
    parser.add_argument("--keep", type=Path, metavar="DIR", help="Where the checkpoint stays.")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        folder = arguments.keep or Path(temporary) / "model"
        folder.mkdir(exist_ok=True)
        write_checkpoint(folder, arguments.layers)
        bench = [sys.executable, "-m", "signbit", "bench", "decode", str(folder)]
        options = ["--tokens", str(arguments.tokens), "--activations", arguments.activations]
        sys.exit(subprocess.run([*bench, *options]).returncode)


if __name__ == "__main__":
    main()
