"""``signbit bench decode``: a model writing text, token by token.

Tokens are timed one by one inside ``generate``, where it asks whether to stop. The first has the prompt in it and is
kept apart; of the others the median counts, which a second of somebody else's work does not move.
"""

from __future__ import annotations

import time
from statistics import median
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel, StoppingCriteriaList

from signbit import checkpoint, inference, modules
from signbit.bench.kernels import environment
from signbit.bench.memory import Memory, memory
from signbit.errors import SignbitError
from signbit.kernels import cpu
from signbit.modules import QuantizedLinear, TiedHead
from signbit.safetensors_file import read_directory
from signbit.source import resolve

# How often the models take turns.
_ROUNDS = 3


@torch.inference_mode()
def bench_decode(
    model: str,
    *,
    against: str | None = None,
    activations: str = "exact",
    tokens: int = 64,
    prompt_tokens: int = 32,
    trust_remote_code: bool = False,
) -> dict[str, Any]:
    """Tokens a second of ``model`` at batch 1, the time it takes to be ready, its memory, and what its kernels take.

    against: another model, which takes turns with it. A model that is not a signbit checkpoint is run in bfloat16.
    """
    if tokens < 2 or prompt_tokens < 1:
        raise SignbitError("tokens must be at least 2 and prompt-tokens at least 1")
    before = memory()
    started = time.perf_counter()
    opened = _open(model, trust_remote_code)
    ready = time.perf_counter() - started
    loaded = memory()
    modules.set_activations(opened, activations)
    runs = [_Run(opened, prompt_tokens, tokens)]
    runs[0].turn()
    decoded = memory()
    if against is not None:
        runs.append(_Run(_open(against, trust_remote_code), prompt_tokens, tokens))
        runs[1].turn()
    for run in runs:
        run.seconds.clear()  # the first turn touched every page and warmed every cache
    for _ in range(_ROUNDS):
        for run in runs:
            run.turn()
    result = {
        **environment(),
        "model": model,
        "activations": activations,
        "seconds_to_load": ready,
        **runs[0].result(),
        "kernel_share": _kernel_share(runs[0]),
        "memory": _memory(model, before, loaded, decoded, runs[0].cache_bytes),
    }
    if against is not None:
        other = runs[1].result()
        result["against"] = {"model": against, **other}
        result["times_faster"] = other["seconds_per_token"] / result["seconds_per_token"]
    return result


def _open(model: str, trust_remote_code: bool) -> PreTrainedModel:
    path = resolve(model)
    packed = path.is_dir() and checkpoint.is_checkpoint(path)
    dtype = None if packed else torch.bfloat16
    return inference.open_model(model, device="cpu", dtype=dtype, trust_remote_code=trust_remote_code)[0]


class _Run:
    """A model that writes ``tokens`` tokens after a prompt of random ones, and when it wrote each."""

    def __init__(self, model: PreTrainedModel, prompt_tokens: int, tokens: int) -> None:
        self.model = model
        generator = torch.Generator().manual_seed(0)
        self.prompt = torch.randint(
            0, model.config.get_text_config().vocab_size, (1, prompt_tokens), generator=generator
        )
        self.tokens = tokens
        self.seconds: list[list[float]] = []  # of each token, in each turn
        self.cache_bytes = 0

    def turn(self) -> None:
        times: list[float] = []

        def stamp(ids: Tensor, scores: Tensor, **kwargs: Any) -> Tensor:
            times.append(time.perf_counter())
            return torch.zeros(len(ids), dtype=torch.bool)

        started = time.perf_counter()
        written = self.model.generate(
            self.prompt,
            attention_mask=torch.ones_like(self.prompt),
            max_new_tokens=self.tokens,
            eos_token_id=None,
            pad_token_id=0,
            do_sample=False,
            stopping_criteria=StoppingCriteriaList([stamp]),
            return_dict_in_generate=True,
        )
        self.seconds.append([end - begin for begin, end in zip([started, *times], times, strict=False)])
        layers = getattr(written.past_key_values, "layers", [])
        held = (getattr(layer, name, None) for layer in layers for name in ("keys", "values"))
        self.cache_bytes = sum(tensor.nbytes for tensor in held if tensor is not None)

    def result(self) -> dict[str, Any]:
        later = [seconds for turn in self.seconds for seconds in turn[1:]]
        return {
            "tokens_per_second": 1 / median(later),
            "seconds_per_token": median(later),
            "fastest_token": min(later),
            "seconds_to_first_token": median(turn[0] for turn in self.seconds),
            "prompt_tokens": self.prompt.shape[1],
            "tokens": len(later),
        }


def _kernel_share(run: _Run) -> float | None:
    """Share of a token's time that its products with packed matrices take when nothing else happens between them.

    None if no linear is packed, or without kernels.
    """
    linears = [module for module in run.model.modules() if isinstance(module, (QuantizedLinear, TiedHead))]
    products = [cpu.bound_products(one.packed, one.int8) for one in linears]
    if not products or not all(products):
        return None
    laps = []
    for _ in range(run.tokens):
        started = time.perf_counter()
        for product in products:
            for multiply in product:
                multiply()
        laps.append(time.perf_counter() - started)
    return median(laps) / median(run.seconds[-1][1:])


def _memory(
    model: str, before: Memory | None, loaded: Memory | None, decoded: Memory | None, cache_bytes: int
) -> dict[str, Any] | None:
    """before: the interpreter and its libraries; loaded, decoded: with the model; the ratios are to the checkpoint."""
    path = resolve(model)
    if before is None or loaded is None or decoded is None:
        return None
    if path.is_file():  # GGUF, with tokenizer and all
        checkpoint_bytes = path.stat().st_size
    else:
        checkpoint_bytes = sum(tensor.nbytes for tensor in read_directory(path).values())
    resident = decoded.resident - cache_bytes
    return {
        "checkpoint": checkpoint_bytes,
        "cache": cache_bytes,
        "before": before.to_dict(),
        "loaded": loaded.to_dict(),
        "decoded": decoded.to_dict(),
        "resident_to_checkpoint": resident / checkpoint_bytes,
        "model_to_checkpoint": (resident - before.resident) / checkpoint_bytes,
    }
