"""The harness's model for Hugging Face models around ours, asked only what was not answered before.

Log-likelihoods are the harness's own (``HFLM``): how context and continuation are tokenised, what is cut, what is
summed. Added are three things. Answers are kept as they come, through the hook that the harness has for its own cache
(which is SQLite with pickles, so not used). Batches are cut by memory. Progress goes where signbit's goes.

This module imports lm_eval, and so is imported only once tasks are evaluated.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from lm_eval.api.model import LM
from lm_eval.models.huggingface import HFLM
from transformers import PreTrainedModel

from signbit.errors import SignbitError
from signbit.evaluation.store import Store, hash_of
from signbit.progress import Progress, Task

# Logits and their log-softmax, in bytes: all that grows with the vocabulary. On a CPU larger batches are no faster.
_CPU_LOGITS = 1 << 29
_GPU_SHARE = 0.4
_MOST_TOKENS = 1 << 16


class KeptAnswers(LM):
    """What the harness asks. opened: gives (model, tokenizer) when first needed, which may be never."""

    def __init__(self, opened: Callable[[], tuple[PreTrainedModel, Any]], store: Store, progress: Progress) -> None:
        super().__init__()
        self.task = ""  # what is evaluated, for people
        self._opened, self._store, self._progress = opened, store, progress
        self._model: _BoundedModel | None = None

    def loglikelihood(self, requests: Sequence[Any]) -> list[tuple[float, bool]]:
        return [(value, greedy) for value, greedy in self._answer("loglikelihood", requests)]

    def loglikelihood_rolling(self, requests: Sequence[Any]) -> list[float]:
        return self._answer("loglikelihood_rolling", requests)

    def generate_until(self, requests: Sequence[Any]) -> list[str]:
        if any(request.args[1].get("do_sample") for request in requests):
            # Drawn anew each time: an answer that is kept would be the same for each repeat.
            sampled: list[str] = self._open().generate_until(list(requests), disable_tqdm=True)
            return sampled
        return self._answer("generate_until", requests)

    def _answer(self, kind: str, requests: Sequence[Any]) -> list[Any]:
        keys = [hash_of([kind, *request.args]) for request in requests]
        asked = {key: request for key, request in zip(keys, requests, strict=True) if key not in self._store}
        with self._progress.task(self.task, len(keys)) as task:
            if len(asked) < len(keys):
                task.advance(len(keys) - len(asked))
            while missing := [request for key, request in asked.items() if key not in self._store]:
                self._ask(kind, missing, task)
        return [self._store[key] for key in keys]

    def _ask(self, kind: str, requests: list[Any], task: Task) -> None:
        """Answers to some of the requests: all, unless memory was too small for a batch."""
        model = self._open()
        model.set_cache_hook(_Keep(self._store, task))
        try:
            getattr(model, kind)(requests, disable_tqdm=True)
        except torch.OutOfMemoryError as error:
            if model.batch_tokens < 2:
                raise SignbitError(f"{self.task}: the GPU's memory is too small for one question") from error
            model.batch_tokens //= 2
        except AssertionError as error:
            # The harness asserts that there is something to score and that it fits.
            raise SignbitError(f"{self.task}: an answer is empty, or longer than the model's context") from error
        torch.cuda.empty_cache()  # nothing happens where there is no GPU

    def _open(self) -> _BoundedModel:
        if self._model is None:
            self._model = _BoundedModel(*self._opened())
        return self._model


class _Keep:
    """The harness's hook for a cache: called with each answer."""

    def __init__(self, store: Store, task: Task) -> None:
        self._store, self._task = store, task

    def add_partial(self, kind: str, arguments: Sequence[Any], answer: Any) -> None:
        value = answer[0] if isinstance(answer, tuple) else answer
        if isinstance(value, float) and math.isnan(value):
            raise SignbitError("the model's output contains NaN or infinite values: it cannot be scored")
        self._store.put(hash_of([kind, *arguments]), answer)
        self._task.advance()


class _BoundedModel(HFLM):
    """HFLM with batches of about ``batch_tokens`` tokens in place of its search, which on a CPU would end in swapping
    and prints to stdout."""

    def __init__(self, model: PreTrainedModel, tokenizer: Any) -> None:
        super().__init__(pretrained=model, tokenizer=tokenizer, backend="causal", batch_size="auto")
        vocabulary = model.config.get_text_config().vocab_size
        if model.device.type == "cuda":
            room = int(torch.cuda.mem_get_info(model.device)[0] * _GPU_SHARE)
        else:
            room = _CPU_LOGITS
        self.batch_tokens = min(_MOST_TOKENS, max(1, room // (2 * vocabulary * model.dtype.itemsize)))

    def _rows(self, length: int) -> int:
        return max(1, self.batch_tokens // length)

    def _batch_scheduler(self, pos: int, n_reordered_requests: Sequence[tuple[Any, list[int], list[int]]]) -> int:
        """Rows of the batch that the request at ``pos`` is in. They come by falling length, so it only grows."""
        _, context, continuation = n_reordered_requests[pos]
        return self._rows(min(len(context) + len(continuation), self.max_length))

    def _detect_batch_size(self, requests: Sequence[Any] | None = None, pos: int = 0) -> int:
        """Rows of a batch whose lengths are not known."""
        return self._rows(self.max_length)

    def _loglikelihood_tokens(self, requests: Any, disable_tqdm: bool = False, override_bs: int | None = None) -> Any:
        return super()._loglikelihood_tokens(requests, disable_tqdm=True, override_bs=override_bs)
