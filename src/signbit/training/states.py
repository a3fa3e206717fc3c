"""What a model computes on the way to its logits: the hidden states behind its blocks, and the last one.

Losses are taken over these. The head is applied by the loss itself, to a few positions at a time: with a vocabulary of
50,000 to 150,000 the logits of a batch are larger than everything else in it.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel

from signbit.errors import SignbitError
from signbit.finite import all_finite


@dataclass
class States:
    """hidden: of all blocks but the last [batch, tokens, width], or none where they are not asked for; last: what the
    head is given [batch, tokens, width]."""

    hidden: list[Tensor] = field(default_factory=list)
    last: Tensor | None = None


class StatesOf(nn.Module):
    """``model`` without its head, returning :class:`States`'s fields; a module, so that it can be spread over
    processes.

    blocks: the name of its list of decoder blocks. hidden: whether states behind blocks are asked for. learning:
    whether the last state has a gradient; if no loss is taken of it, DDP would wait for one. checkpointing: compute a
    block again in the backward pass instead of keeping what is inside it. The model stays in eval mode, so dropout is
    off, as in the teacher.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        blocks: str,
        *,
        hidden: bool,
        learning: bool = True,
        checkpointing: bool = False,
    ) -> None:
        super().__init__()
        self.model = model.eval()
        self.blocks = list(model.get_submodule(blocks).children())
        self._hidden, self.learning = hidden, learning
        if checkpointing:
            for block in self.blocks:
                _checkpoint(block)

    def forward(self, ids: Tensor) -> tuple[list[Tensor], Tensor]:
        with self._watching() as found:
            last = self.model.base_model(input_ids=ids, use_cache=False)[0]
        return found, last if self.learning else last.detach()

    @contextmanager
    def _watching(self) -> Iterator[list[Tensor]]:
        found: list[Tensor] = []

        def keep(module: nn.Module, inputs: Any, output: Any) -> None:
            found.append(output[0] if isinstance(output, tuple) else output)

        handles = [block.register_forward_hook(keep) for block in self.blocks[:-1]] if self._hidden else []
        try:
            yield found
        finally:
            for handle in handles:
                handle.remove()


def _checkpoint(block: nn.Module) -> None:
    inside = block.forward

    def forward(*args: Any, **kwargs: Any) -> Any:
        return checkpoint(inside, *args, use_reentrant=False, **kwargs)

    block.forward = forward


class Head:
    """Last hidden states [..., width] to logits [..., vocabulary], float32, as ``model`` computes them.

    What models do beside a product with the head is found in their configuration, and checked against the model
    (:meth:`check`). ``dtype`` is that of the product.
    """

    def __init__(self, model: PreTrainedModel, dtype: torch.dtype) -> None:
        module = model.get_output_embeddings()
        if module is None:
            raise SignbitError(f"{type(model).__name__} has no output head: it cannot be trained")
        config = model.config.get_text_config()
        self._module, self._dtype = module, dtype
        self._weight = module.weight.detach().to(dtype) if isinstance(module, nn.Linear) else None
        self._cap = getattr(config, "final_logit_softcapping", None)  # Gemma 2
        scale, divisor = getattr(config, "logit_scale", None), getattr(config, "logits_scaling", None)
        # Cohere, Granite
        self._scale = (scale if isinstance(scale, int | float) else 1.0) / (divisor or 1.0)

    def __call__(self, hidden: Tensor) -> Tensor:
        if self._weight is None:
            logits = self._module(hidden.float()).float()
        else:
            bias = None if self._module.bias is None else self._module.bias.to(self._dtype)
            logits = F.linear(hidden.to(self._dtype), self._weight, bias).float()
        if self._scale != 1:
            logits = logits * self._scale
        return logits if self._cap is None else torch.tanh(logits / self._cap) * self._cap

    @torch.no_grad()
    def check(self, states: StatesOf, ids: Tensor) -> None:
        """SignbitError if the model's own logits for ``ids`` [1, tokens] are others, or no numbers."""
        wanted = states.model(input_ids=ids, use_cache=False).logits.float()
        if not all_finite(wanted):
            raise SignbitError(
                f"{type(states.model).__name__} has logits that are NaN or infinite, where it starts or as its last "
                "snapshot has it: start anew with --overwrite, from another start or with a lower lr"
            )
        found = self(states(ids)[1])
        if found.shape != wanted.shape or not torch.allclose(found, wanted, rtol=0.05, atol=0.05 * float(wanted.std())):
            raise SignbitError(
                f"{type(states.model).__name__} does more to its logits than signbit knows of: it cannot be trained"
            )
