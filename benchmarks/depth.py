"""Memory and time of quantizing against the depth of the model: the peak must not grow, the time per weight neither.

    python benchmarks/depth.py [--layers 20 40] [--hidden 2048] [--intermediate 5632] [--recipe billm] [--folder DIR]

Writes random Llama-shaped models (bfloat16, sharded) to disk, quantizes each in a process of its own and prints its
weights, peak resident memory, and seconds per billion weights; the last column is the peak's ratio to the first row's.
The default models have 1.0 and 2.1 billion weights to quantize. RECIPE is a preset or a YAML file.
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, PreTrainedTokenizerFast

VOCABULARY = 4096


def write_model(folder: Path, layers: int, hidden: int, intermediate: int) -> int:
    """A random model, written a layer at a time; returns how many weights its linears have."""
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=hidden,
        intermediate_size=intermediate,
        num_hidden_layers=layers,
        num_attention_heads=hidden // 64,
        num_key_value_heads=hidden // 64,
        max_position_embeddings=2048,
        architectures=["LlamaForCausalLM"],
        dtype="bfloat16",
        tie_word_embeddings=True,
    )
    config.save_pretrained(folder)
    words = {f"w{i}": i for i in range(VOCABULARY)}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="w0"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="w0").save_pretrained(folder)
    generator = torch.Generator().manual_seed(0)

    def random(rows: int, columns: int) -> torch.Tensor:
        return (torch.randn(rows, columns, generator=generator) * columns**-0.5).to(torch.bfloat16)

    shapes = {f"self_attn.{name}_proj": (hidden, hidden) for name in "qkvo"}
    shapes |= {"mlp.gate_proj": (intermediate, hidden), "mlp.up_proj": (intermediate, hidden)}
    shapes["mlp.down_proj"] = (hidden, intermediate)
    weight_map = {}
    for layer in range(layers):
        prefix = f"model.layers.{layer}"
        tensors = {f"{prefix}.{name}.weight": random(*shape) for name, shape in shapes.items()}
        for norm in ("input_layernorm", "post_attention_layernorm"):
            tensors[f"{prefix}.{norm}.weight"] = torch.ones(hidden, dtype=torch.bfloat16)
        file = f"model-{layer + 1:05d}-of-{layers + 1:05d}.safetensors"
        save_file(tensors, folder / file, {"format": "pt"})
        weight_map |= dict.fromkeys(tensors, file)
    tensors = {
        "model.embed_tokens.weight": random(VOCABULARY, hidden),
        "model.norm.weight": torch.ones(hidden, dtype=torch.bfloat16),
    }
    file = f"model-{layers + 1:05d}-of-{layers + 1:05d}.safetensors"
    save_file(tensors, folder / file, {"format": "pt"})
    weight_map |= dict.fromkeys(tensors, file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return layers * sum(rows * columns for rows, columns in shapes.values())


def quantize(model: Path, out: Path, text: Path, recipe: str) -> tuple[float, float]:
    """(seconds, peak resident GiB) of ``signbit quantize`` in a process of its own."""
    command = [sys.executable, "-m", "signbit", "quantize", str(model), "--out", str(out), "--recipe", recipe]
    command += ["--calib", str(text), "--samples", "8", "--seqlen", "256"]
    script = (
        "import resource, subprocess, sys\n"
        "status = subprocess.call(sys.argv[1:])\n"
        "print(resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss)\n"
        "sys.exit(status)"
    )
    started = time.perf_counter()
    done = subprocess.run([sys.executable, "-c", script, *command], stdout=subprocess.PIPE, check=True, text=True)
    return time.perf_counter() - started, int(done.stdout.split()[-1]) / 2**20


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, nargs="+", default=[20, 40])
    parser.add_argument("--hidden", type=int, default=2048)
    parser.add_argument("--intermediate", type=int, default=5632)
    parser.add_argument("--recipe", default="billm")
    parser.add_argument("--folder", type=Path, help="where the models are written; a temporary folder by default")
    arguments = parser.parse_args()
    print("| layers | weights (billions) | peak GiB | s per billion weights | peak / first |")
    print("|---|---|---|---|---|")
    first = None
    with tempfile.TemporaryDirectory(dir=arguments.folder) as name:
        folder = Path(name)
        text = folder / "text.txt"
        text.write_text(" ".join(f"w{i * i % VOCABULARY}" for i in range(20000)))
        for layers in arguments.layers:
            model, out = folder / "model", folder / "out"
            model.mkdir()
            weights = write_model(model, layers, arguments.hidden, arguments.intermediate)
            seconds, peak = quantize(model, out, text, arguments.recipe)
            first = first or peak
            cost = seconds / weights * 1e9
            print(f"| {layers} | {weights / 1e9:.3f} | {peak:.2f} | {cost:.0f} | {peak / first:.3f} |", flush=True)
            shutil.rmtree(model)
            shutil.rmtree(out)


if __name__ == "__main__":
    main()
