"""Text that the model itself writes: calibration without any data (LLM-QAT, arXiv 2305.17888, section 3.1).

Each sequence starts from a random token; the next few are the most likely ones, which finds a sensible beginning, and
the rest is sampled from the model's full distribution, which keeps the text as varied as the model is. All sequences
grow together, one batched step a token.
"""

from __future__ import annotations

import torch
from torch import Tensor
from transformers import PreTrainedModel

from signbit.progress import Progress

GREEDY_TOKENS = 4


@torch.inference_mode()
def write_tokens(model: PreTrainedModel, samples: int, seqlen: int, seed: int, progress: Progress) -> Tensor:
    """``samples`` sequences of ``seqlen`` tokens, [samples, seqlen], on the CPU; the same for the same seed."""
    generator = torch.Generator().manual_seed(seed)
    device = model.device
    named = (getattr(model.config, name, None) for name in ("bos_token_id", "eos_token_id", "pad_token_id"))
    special = {i for ids in named for i in (ids if isinstance(ids, list | tuple) else [ids])}
    vocabulary = torch.tensor([i for i in range(model.config.get_text_config().vocab_size) if i not in special])
    first = vocabulary[torch.randint(len(vocabulary), (samples, 1), generator=generator)]
    columns, cache = [first], None
    with progress.task("writing calibration text", seqlen) as task:
        task.advance()
        for position in range(1, seqlen):
            output = model(input_ids=columns[-1].to(device), past_key_values=cache, use_cache=True)
            cache = output.past_key_values
            logits = output.logits[:, -1].float().cpu()
            if position <= GREEDY_TOKENS:
                following = logits.argmax(-1, keepdim=True)
            else:
                following = torch.multinomial(logits.softmax(-1), 1, generator=generator)
            columns.append(following)
            task.advance()
    return torch.cat(columns, dim=1)
