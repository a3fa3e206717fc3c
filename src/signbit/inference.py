"""Opening any MODEL to run it: a signbit checkpoint packed, anything else as transformers has it."""

from __future__ import annotations

import math
from typing import Any

import torch
from transformers import AutoModelForCausalLM, PreTrainedModel

from signbit import checkpoint
from signbit.calibration.tokens import check_seqlen, tokenize
from signbit.device import choose_device
from signbit.errors import SignbitError
from signbit.modules import set_activations
from signbit.safetensors_file import check_directory
from signbit.source import first_line, load_config, load_tokenizer, resolve


def open_model(
    model: str, *, device: str = "auto", dtype: torch.dtype | None = None, trust_remote_code: bool = False
) -> tuple[PreTrainedModel, Any]:
    """(model, tokenizer), ready to run.

    dtype: by default CPUs compute in float32, GPUs in the stored dtype. A model that is cast after it was loaded is
    another: ``.to(bfloat16)`` rounds the frequencies of its rotary positions too, and late ones are then elsewhere.
    """
    chosen = choose_device(device)
    path = resolve(model)
    wanted: Any = dtype or (torch.float32 if chosen.type == "cpu" else "auto")
    device_map = None if chosen.type == "cpu" else {"": chosen.type}
    if path.is_dir() and checkpoint.is_checkpoint(path):
        return checkpoint.load(path, device_map=device_map, dtype=wanted, trust_remote_code=trust_remote_code)
    try:
        if path.is_file():
            opened = AutoModelForCausalLM.from_pretrained(
                path.parent, gguf_file=path.name, dtype=dtype or torch.float32
            )
            tokenizer = load_tokenizer(model, path.parent, gguf_file=path.name)
            return opened.to(chosen).eval(), tokenizer
        load_config(model, path, trust_remote_code)
        check_directory(path)
        opened = AutoModelForCausalLM.from_pretrained(
            path, dtype=wanted, device_map=device_map, trust_remote_code=trust_remote_code
        )
    except Exception as error:
        # Whatever a config.json that makes no sense may lead model code to.
        raise SignbitError(f"{model} cannot be loaded: {first_line(error)}") from error
    return opened.eval(), load_tokenizer(model, path, trust_remote_code=trust_remote_code)


def generate(
    model: str,
    prompt: str,
    *,
    max_tokens: int = 64,
    temperature: float = 0.0,
    seed: int = 0,
    device: str = "auto",
    activations: str = "exact",
    trust_remote_code: bool = False,
) -> str:
    """Continue ``prompt``; returns the new text only. temperature 0 is greedy; activations: see set_activations."""
    check_request(prompt, max_tokens, temperature)
    opened, tokenizer = open_model(model, device=device, trust_remote_code=trust_remote_code)
    set_activations(opened, activations)
    return continue_text(opened, tokenizer, prompt, max_tokens=max_tokens, temperature=temperature, seed=seed)


def check_request(prompt: str, max_tokens: int, temperature: float = 0.0) -> None:
    """Refuse what can be seen to fail before a model is opened."""
    if not prompt:
        raise SignbitError("the prompt is empty")
    if max_tokens < 1 or not 0 <= temperature < math.inf:
        raise SignbitError("max-tokens must be at least 1 and temperature a number of at least 0")


@torch.inference_mode()
def continue_text(
    opened: PreTrainedModel,
    tokenizer: Any,
    prompt: str,
    *,
    max_tokens: int,
    temperature: float = 0.0,
    seed: int = 0,
) -> str:
    """What an opened model writes after ``prompt``."""
    ids = tokenize(tokenizer, prompt, opened.config).unsqueeze(0).to(opened.device)
    check_seqlen(opened.config, ids.shape[1] + max_tokens)
    sampling = {"do_sample": True, "temperature": temperature, "top_k": 0} if temperature > 0 else {"do_sample": False}
    torch.manual_seed(seed)
    tokens = opened.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        max_new_tokens=max_tokens,
        pad_token_id=tokenizer.pad_token_id or tokenizer.eos_token_id,
        **sampling,
    )
    text: str = tokenizer.decode(tokens[0, ids.shape[1] :], skip_special_tokens=True)
    return text
