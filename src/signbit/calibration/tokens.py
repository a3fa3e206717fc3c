"""Token batches: text to the sequences that calibration runs on."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedConfig

from signbit.errors import SignbitError


def tokenize(tokenizer: Any, text: str, config: PreTrainedConfig, *, special: bool = True) -> Tensor:
    """All of ``text`` as one sequence of ids [tokens], with what special tokens the tokenizer adds by default, or none.

    SignbitError if the tokenizer is not the model's: if it knows ids that the model of ``config`` does not.
    """
    try:
        # verbose=False: the whole text is longer than any context, which is no reason to warn.
        ids = tokenizer(text, verbose=False, add_special_tokens=special)["input_ids"]
        tokens = torch.tensor(ids, dtype=torch.int64)
    except (TypeError, UnicodeError) as error:
        raise SignbitError("the text cannot be tokenized: it is not valid Unicode") from error
    size = config.get_text_config().vocab_size
    if len(tokens) and int(tokens.max()) >= size:
        raise SignbitError(
            f"the tokenizer gives id {int(tokens.max())}, the model knows {size}: they do not belong together"
        )
    return tokens


def random_windows(tokens: Tensor, samples: int, seqlen: int, seed: int) -> Tensor:
    """``samples`` windows of ``seqlen`` tokens at random offsets, [samples, seqlen].

    Windows may overlap a little, as in GPTQ's calibration; a text that has less than half of the tokens asked for is
    refused, since its windows would mostly repeat each other.
    """
    if len(tokens) < max(seqlen, samples * seqlen // 2):
        raise SignbitError(
            f"the calibration text has {len(tokens):,} tokens, too few for {samples} samples of {seqlen}: "
            "give a longer text, fewer samples or shorter ones"
        )
    generator = torch.Generator().manual_seed(seed)
    starts = torch.randint(len(tokens) - seqlen + 1, (samples,), generator=generator)
    return torch.stack([tokens[start : start + seqlen] for start in starts.tolist()])


def check_seqlen(config: PreTrainedConfig, seqlen: int) -> None:
    """Refuse sequences longer than the model's positions."""
    limit = getattr(config.get_text_config(), "max_position_embeddings", None)
    if limit is not None and seqlen > limit:
        raise SignbitError(f"seqlen {seqlen} is beyond the model's {limit} positions: use at most {limit}")
