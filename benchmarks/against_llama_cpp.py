"""signbit against llama.cpp: a random model in the shape of Llama 2 7B, in both, in turns, on the same threads.

    pip install llama-cpp-python gguf        # built natively: CMAKE_ARGS="-DGGML_NATIVE=ON"
    python benchmarks/against_llama_cpp.py [--types TQ2_0 ...] [--depths 2 6] [--tokens 32] [--rounds 5] [--json FILE]

Time per layer is the difference of two depths: embeddings, head and sampling drop out. What 32 layers would take is
the deeper model's time and the layers that it lacks. llama.cpp's models have their head and embeddings in Q8_0,
signbit's in 8 bits with a scale a row; both see the same tokens. Weights are random bytes of each type: none of these
kernels looks at what it multiplies, as long as it is no NaN. Figures are medians over rounds in which every model has
its turn; ``x`` is how many times faster signbit is, a median of ratios within rounds.

llama-cpp-python may live in another environment: ``--python`` is its interpreter. It runs in a process of its own in
any case, which does nothing while it is not asked: two OpenMP runtimes in one process would spin against each other.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

TYPES = ["Q1_0", "TQ2_0", "TQ1_0", "IQ1_S", "Q4_0"]
LAYERS = 32


# --- llama.cpp's side: these run under --python ----------------------------------------------------------------------


def write_gguf(file: Path, layers: int, kind: str) -> None:
    """A random model whose linears are of one type."""
    import gguf
    import numpy as np

    from_name = gguf.GGMLQuantizationType
    hidden, intermediate, heads, vocabulary = 4096, 11008, 32, 32000
    random = np.random.default_rng(0)
    writer = gguf.GGUFWriter(file, "llama")
    writer.add_block_count(layers)
    writer.add_context_length(4096)
    writer.add_embedding_length(hidden)
    writer.add_feed_forward_length(intermediate)
    writer.add_head_count(heads)
    writer.add_head_count_kv(heads)
    writer.add_layer_norm_rms_eps(1e-6)
    writer.add_rope_dimension_count(hidden // heads)
    writer.add_vocab_size(vocabulary)
    writer.add_tokenizer_model("llama")
    writer.add_token_list([b"<unk>", b"<s>", b"</s>", *(f"w{i}".encode() for i in range(3, vocabulary))])
    writer.add_token_scores([0.0] * vocabulary)
    writer.add_token_types([2, 3, 3, *([1] * (vocabulary - 3))])

    def add(name: str, rows: int, columns: int, kind: str) -> None:
        quantization = from_name[kind]
        block, size = gguf.GGML_QUANT_SIZES[quantization]
        packed = random.integers(0, 256, (rows, columns // block, size), dtype=np.uint8)
        scale = np.array([columns**-0.5 / 8], dtype=np.float16).view(np.uint8)
        at = size - 2 if kind in ("TQ1_0", "TQ2_0") else 0  # where a block has its scale
        packed[..., at : at + 2] = scale
        writer.add_tensor(name, packed.reshape(rows, -1), raw_dtype=quantization)

    def norm(name: str) -> None:
        writer.add_tensor(name, np.ones(hidden, dtype=np.float32))

    add("token_embd.weight", vocabulary, hidden, "Q8_0")
    add("output.weight", vocabulary, hidden, "Q8_0")
    norm("output_norm.weight")
    for layer in range(layers):
        for name in ("attn_q", "attn_k", "attn_v", "attn_output"):
            add(f"blk.{layer}.{name}.weight", hidden, hidden, kind)
        add(f"blk.{layer}.ffn_gate.weight", intermediate, hidden, kind)
        add(f"blk.{layer}.ffn_up.weight", intermediate, hidden, kind)
        add(f"blk.{layer}.ffn_down.weight", hidden, intermediate, kind)
        norm(f"blk.{layer}.attn_norm.weight")
        norm(f"blk.{layer}.ffn_norm.weight")
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def serve(folder: Path, kinds: list[str], depths: list[int], threads: int) -> None:
    """Answer lines of JSON, ``[kind, depth, prompt, tokens]``, with seconds of the prompt and of each token."""
    from llama_cpp import Llama

    models = {}
    for kind in kinds:
        for depth in depths:
            file = folder / f"{kind}-{depth}.gguf"
            write_gguf(file, depth, kind)
            models[kind, depth] = Llama(
                str(file),
                n_ctx=1024,
                n_batch=512,
                n_ubatch=512,
                n_threads=threads,
                n_threads_batch=threads,
                verbose=False,
            )
    print("ready", flush=True)
    for line in sys.stdin:
        kind, depth, prompt, tokens = json.loads(line)
        model = models[kind, depth]
        model.reset()

        def feed(ids: list[int], model: Any = model) -> None:
            model.eval(ids)

        print(json.dumps(timed(feed, prompt, tokens)), flush=True)


# --- both ------------------------------------------------------------------------------------------------------------


def timed(feed: Callable[[list[int]], None], prompt: int, tokens: int) -> list[float]:
    """Seconds of a prompt and of each token after it; which tokens they are does not matter, only that they are fed."""
    times = [time.perf_counter()]
    feed([3 + 7 * i % 30000 for i in range(prompt)])
    times.append(time.perf_counter())
    for i in range(tokens):
        feed([5 + i])
        times.append(time.perf_counter())
    return [end - begin for begin, end in pairwise(times)]


# --- signbit's side --------------------------------------------------------------------------------------------------


def open_ours(
    folder: Path, depths: list[int], modes: list[str]
) -> dict[tuple[str, int], Callable[[int, int], list[float]]]:
    """By mode and depth: what times a prompt and tokens of our model."""
    import torch
    from transformers import DynamicCache

    from seven_billion import write_checkpoint
    from signbit import checkpoint
    from signbit.cache import give_room
    from signbit.modules import set_activations

    opened = {}
    for depth in depths:
        directory = folder / f"signbit-{depth}"
        directory.mkdir()
        write_checkpoint(directory, depth)
        opened[depth] = checkpoint.load(directory)[0]

    def runner(mode: str, depth: int) -> Callable[[int, int], list[float]]:
        model = opened[depth]

        @torch.inference_mode()
        def run(prompt: int, tokens: int) -> list[float]:
            set_activations(model, mode)
            cache = DynamicCache(config=model.config)
            give_room(model, (), {"past_key_values": cache})

            def feed(ids: list[int]) -> None:
                logits = model(torch.tensor([ids]), past_key_values=cache, logits_to_keep=1).logits
                logits[0, -1].argmax()

            return timed(feed, prompt, tokens)

        return run

    return {(mode, depth): runner(mode, depth) for mode in modes for depth in depths}


def compare(arguments: argparse.Namespace, folder: Path) -> dict[str, Any]:
    import torch

    threads, modes = torch.get_num_threads(), ["int8", "exact"]
    program = [arguments.python, __file__, "--serve", str(folder), "--threads", str(threads)]
    program += ["--types", *arguments.types, "--depths", *map(str, arguments.depths)]
    other = subprocess.Popen(program, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert other.stdin is not None and other.stdout is not None
    if other.stdout.readline() != "ready\n":
        raise SystemExit("llama.cpp did not start: see above")
    ours = open_ours(folder, arguments.depths, modes)

    def theirs(kind: str, depth: int, prompt: int, tokens: int) -> list[float]:
        assert other.stdin is not None and other.stdout is not None
        other.stdin.write(json.dumps([kind, depth, prompt, tokens]) + "\n")
        other.stdin.flush()
        return list(json.loads(other.stdout.readline()))

    seconds: dict[str, list[dict[str, float]]] = {name: [] for name in (*modes, *arguments.types)}
    for round_number in range(arguments.rounds + 1):
        for name in seconds:
            measured = {}
            for depth in arguments.depths:
                run = ours[name, depth] if name in modes else lambda p, t, k=name, d=depth: theirs(k, d, p, t)
                measured[f"token {depth}"] = statistics.median(run(16, arguments.tokens)[1:])
                for length in arguments.prefills:
                    measured[f"prefill {length} {depth}"] = run(length, 0)[0]
            if round_number:  # the first touches every page
                seconds[name].append(summarize(measured, arguments))
    other.stdin.close()
    other.wait()
    return {"threads": threads, "depths": arguments.depths, "prefills": arguments.prefills, "rounds": seconds}


def summarize(measured: dict[str, float], arguments: argparse.Namespace) -> dict[str, float]:
    """Seconds per layer, and of 32 layers with embeddings and head, from those of two depths."""
    low, high = arguments.depths
    found = {}
    for what in ("token", *(f"prefill {length}" for length in arguments.prefills)):
        layer = (measured[f"{what} {high}"] - measured[f"{what} {low}"]) / (high - low)
        found[f"{what}, layer"] = layer
        found[f"{what}, whole"] = measured[f"{what} {high}"] + (LAYERS - high) * layer
    return found


def show(result: dict[str, Any]) -> None:
    rounds = result["rounds"]
    measures = list(next(iter(rounds.values()))[0])
    median = {name: {m: statistics.median(r[m] for r in own) for m in measures} for name, own in rounds.items()}
    sys.stdout.write(f"{result['threads']} threads, depths {result['depths']}; 'whole' is of {LAYERS} layers\n")
    head = ["", "ms per layer", "tokens/s", *(f"prefill {n}: tokens/s" for n in result["prefills"])]
    lines = [head]
    for name, own in median.items():
        whole = [f"{length / own[f'prefill {length}, whole']:.1f}" for length in result["prefills"]]
        lines.append([name, f"{own['token, layer'] * 1e3:.2f}", f"{1 / own['token, whole']:.1f}", *whole])
    for line in lines:
        sys.stdout.write("".join(f"{cell:>24}" for cell in line) + "\n")
    for mode in ("int8", "exact"):
        for measure in measures:
            types = [name for name in rounds if name not in ("int8", "exact")]
            fastest = min(types, key=lambda name: median[name][measure])
            pairs = zip(rounds[mode], rounds[fastest], strict=True)
            ratio = statistics.median(b[measure] / a[measure] for a, b in pairs)
            sys.stdout.write(f"{mode}, {measure}: {ratio:.2f} x as fast as {fastest}\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--types", nargs="+", default=TYPES)
    parser.add_argument("--depths", nargs=2, type=int, default=[2, 6])
    parser.add_argument("--prefills", nargs="*", type=int, default=[128, 512], metavar="TOKENS")
    parser.add_argument("--tokens", type=int, default=32)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--python", default=sys.executable, help="Interpreter that has llama-cpp-python.")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--serve", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--threads", type=int, default=0, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.serve:
        serve(arguments.serve, arguments.types, arguments.depths, arguments.threads)
        return
    with tempfile.TemporaryDirectory() as folder:
        result = compare(arguments, Path(folder))
    show(result)
    if arguments.json:
        arguments.json.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
