"""Memory and time of quantizing against a model's size: the peak must not grow with depth, nor the cost per weight.

    python benchmarks/scaling.py [--models 20x2048x5632 40x2048x5632] [--recipe billm] [--samples 8] [--seqlen 256]
        [--device cuda] [--folder DIR]

A model is LAYERSxHIDDENxINTERMEDIATE. Writes random Llama-shaped models (bfloat16, sharded) to disk, one at a time,
quantizes each in a process of its own and prints its weights, peak resident memory, and processor seconds per billion
weights (with OMP_NUM_THREADS=1 they are what an idle machine takes); ratios are to the first row. RECIPE is a preset or
a YAML file. The default models have 1.0 and 2.1 billion weights to quantize. On a GPU it is the GPU's memory and the
time on the clock, the text read included.
"""

from __future__ import annotations

import argparse
import json
import resource
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

from signbit.cli import main as signbit_main

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


def random_text() -> str:
    return " ".join(f"w{i * i % VOCABULARY}" for i in range(20000))


def quantize(model: Path, out: Path, text: Path, arguments: argparse.Namespace) -> tuple[float, float]:
    """(seconds, peak GiB) of ``signbit quantize`` in a process of its own: of the processor, or of a GPU."""
    command = ["quantize", str(model), "--out", str(out), "--device", arguments.device, "--recipe", arguments.recipe]
    command += ["--calib", str(text), "--samples", str(arguments.samples), "--seqlen", str(arguments.seqlen)]
    # A process starts with the peak of the one that started it: one in between has none to speak of.
    between = [sys.executable, "-c", "import subprocess, sys; sys.exit(subprocess.call(sys.argv[1:]))"]
    measured = [*between, sys.executable, __file__, "--measured", *command]
    done = subprocess.run(measured, stdout=subprocess.PIPE, check=True, text=True)
    seconds, peak = done.stdout.split()[-2:]
    return float(seconds), float(peak)


def run_measured(command: list[str]) -> int:
    """Run signbit's command line here; prints seconds and peak GiB, and returns its exit status."""
    start, status = time.perf_counter(), signbit_main(command)
    if "cuda" in command:
        print(time.perf_counter() - start, torch.cuda.max_memory_allocated() / 2**30)
    else:
        used = resource.getrusage(resource.RUSAGE_SELF)
        print(used.ru_utime + used.ru_stime, used.ru_maxrss / 2**20)
    return status


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=["20x2048x5632", "40x2048x5632"])
    parser.add_argument("--recipe", default="billm")
    parser.add_argument("--samples", type=int, default=8)
    parser.add_argument("--seqlen", type=int, default=256)
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--folder", type=Path, help="where the models are written; a temporary folder by default")
    arguments = parser.parse_args()
    print("| model | weights (billions) | peak GiB | to first | s per billion weights | to first |")
    print("|---|---|---|---|---|---|", flush=True)
    first: tuple[float, float] | None = None
    with tempfile.TemporaryDirectory(dir=arguments.folder) as name:
        folder = Path(name)
        text = folder / "text.txt"
        text.write_text(random_text())
        for shape in arguments.models:
            model, out = folder / "model", folder / "out"
            model.mkdir()
            weights = write_model(model, *map(int, shape.split("x"))) / 1e9
            seconds, peak = quantize(model, out, text, arguments)
            first = first or (peak, seconds / weights)
            ratios = peak / first[0], seconds / weights / first[1]
            cells = [shape, f"{weights:.3f}", f"{peak:.2f}", f"{ratios[0]:.2f}", f"{seconds / weights:.0f}"]
            print(f"| {' | '.join(cells)} | {ratios[1]:.2f} |", flush=True)
            shutil.rmtree(model)
            shutil.rmtree(out)


if __name__ == "__main__":
    if sys.argv[1:2] == ["--measured"]:
        sys.exit(run_measured(sys.argv[2:]))
    main()
