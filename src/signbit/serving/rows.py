"""Several sequences in one forward, each as if it were alone.

The rows of a batch have different lengths and come and go between steps. They are aligned at their *ends*: each step
appends one column of keys and values to all of them, and a row of n tokens occupies the last n columns. To the model
this is what ``generate`` gives it for prompts that are padded on the left: a padding mask, and positions that count
from each row's own start. So the masks are transformers' own, causal, sliding or whatever an architecture asks for,
and no architecture is known here by name.

    columns      0 1 2 3 4 5 6 7 8 9        end = 8, width = 7
    row 0        . a b c d e f g             length 7
    row 1        . . . . . x y z             length 3

A row that leaves is replaced by the last one, so that the rows in use are always the first ones and a view of them
costs nothing. When the columns run out, or a row joins that is longer than what is left of ``end``, the part in use is
copied to new storage, with room for a quarter more.

What does not fit in there runs one sequence at a time: recurrent states, caches of a kind of their own, and models
whose batched logits turn out to differ from those of the same sequences alone (``open_rows`` tries it). Layers with a
sliding window keep all of their keys here; the mask hides the old ones.
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Sequence
from typing import Any, Protocol

import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

from signbit.cache import RoomyLayer
from signbit.errors import SignbitError

# Columns of room, beyond a quarter of those in use.
_ROOM = 256


class Forward:
    """A causal LM as a function of new tokens and a cache.

    SignbitError for models that keep what they have read in another way than ``past_key_values``.
    """

    def __init__(self, model: PreTrainedModel) -> None:
        accepted = inspect.signature(model.forward).parameters
        if "past_key_values" not in accepted:
            raise SignbitError(
                f"{type(model).__name__} takes no key-value cache and cannot be served: use signbit generate"
            )
        self.model = model
        self.device = model.device
        self.vocabulary: int = model.config.get_text_config().vocab_size
        self._positions = "position_ids" in accepted
        self._last_only = "logits_to_keep" in accepted
        layers = DynamicCache(config=model.config).layers
        self._layers = len(layers)
        # Whether all that is kept of a token is its keys and values.
        self.plain = bool(layers) and all(type(one) in (DynamicLayer, DynamicSlidingWindowLayer) for one in layers)

    def new_cache(self) -> DynamicCache:
        """An empty cache for one sequence."""
        if not self.plain:
            return DynamicCache(config=self.model.config)
        return cache_of([RoomyLayer() for _ in range(self._layers)])

    def read(self, tokens: Sequence[int], cache: DynamicCache, length: int, *, every: bool = False) -> Tensor:
        """Append ``tokens`` to the one sequence of ``cache``, which has ``length``; logits [tokens or 1, vocabulary].

        every: the logits after each of the tokens, not only after the last.
        """
        ids = torch.tensor([tokens], device=self.device)
        positions = torch.arange(length, length + len(tokens), device=self.device)[None]
        return self(ids, cache, positions, every=every)[0]

    def __call__(
        self, ids: Tensor, cache: DynamicCache, positions: Tensor, mask: Tensor | None = None, *, every: bool = False
    ) -> Tensor:
        """Logits [rows, tokens or 1, vocabulary], in float32 on the CPU."""
        options: dict[str, Any] = {}
        if self._positions:
            options["position_ids"] = positions
        if mask is not None:
            options["attention_mask"] = mask
        if self._last_only:
            options["logits_to_keep"] = 0 if every else 1
        logits: Tensor = self.model(ids, past_key_values=cache, use_cache=True, **options).logits
        if not every:
            logits = logits[:, -1:]
        return logits.to("cpu", torch.float32)


def cache_of(layers: list[Any]) -> DynamicCache:
    """A cache of these layers. It is a DynamicCache because some models look whether theirs is one."""
    cache = DynamicCache()
    cache.layers = layers
    return cache


class Rows(Protocol):
    """Sequences that each get one token a step."""

    lengths: list[int]

    def join(self, cache: DynamicCache, length: int, copies: int) -> None:
        """Add a sequence that was read into a cache of its own, as the last ``copies`` rows."""
        ...

    def leave(self, row: int) -> None:
        """Remove a row; the last one takes its place."""
        ...

    def step(self, tokens: Sequence[int]) -> Tensor:
        """Append one token to each row; the logits after it, [rows, vocabulary]."""
        ...


class AloneRows:
    """Each sequence in a cache and a forward of its own: right for every model, no faster for many than for one."""

    def __init__(self, forward: Forward) -> None:
        self.lengths: list[int] = []
        self._forward = forward
        self._caches: list[DynamicCache] = []

    def join(self, cache: DynamicCache, length: int, copies: int) -> None:
        self._caches += [cache, *(copy.deepcopy(cache) for _ in range(copies - 1))]
        self.lengths += [length] * copies

    def leave(self, row: int) -> None:
        self._caches[row], self.lengths[row] = self._caches[-1], self.lengths[-1]
        self._caches.pop()
        self.lengths.pop()

    def step(self, tokens: Sequence[int]) -> Tensor:
        rows = zip(tokens, self._caches, self.lengths, strict=True)
        logits = [self._forward.read([token], cache, length) for token, cache, length in rows]
        self.lengths = [length + 1 for length in self.lengths]
        return torch.cat(logits)


class _Layer(DynamicLayer):
    """Keys and values of all rows in one layer. What the model sees of them is set before each step."""

    def __init__(self) -> None:
        super().__init__()
        self.storage: tuple[Tensor, Tensor] | None = None
        self.is_initialized = True

    def show(self, rows: int, start: int, end: int) -> None:
        assert self.storage is not None
        self._rows, self._start, self._end = rows, start, end
        self.keys, self.values = (one[:rows, :, start:end] for one in self.storage)

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        assert self.storage is not None
        seen = []
        for storage, new in zip(self.storage, (key_states, value_states), strict=True):
            storage[: self._rows, :, self._end : self._end + 1] = new
            seen.append(storage[: self._rows, :, self._start : self._end + 1])
        return seen[0], seen[1]

    def grow(self, like_keys: Tensor, like_values: Tensor, tokens: int) -> tuple[Tensor, Tensor, int]:
        """As RoomyLayer's: where the one token of a step goes (decoding.py)."""
        assert self.storage is not None
        keys, values = (one[: self._rows, :, self._start :] for one in self.storage)
        return keys, values, self._end - self._start


class BatchedRows:
    """Up to ``capacity`` sequences in one cache and one forward."""

    def __init__(self, forward: Forward, capacity: int) -> None:
        self.lengths: list[int] = []
        self._forward, self._capacity = forward, capacity
        self._empty()

    def _empty(self) -> None:
        """No rows, no memory."""
        self._cache = cache_of([])
        self._end = self._room = 0

    def join(self, cache: DynamicCache, length: int, copies: int) -> None:
        if not self.lengths:
            self._cache = cache_of([_Layer() for _ in cache.layers])
        self._make_room(max(length, *self.lengths, 0), like=cache)
        rows = slice(len(self.lengths), len(self.lengths) + copies)
        start = self._end - length
        for mine, theirs in zip(self._cache.layers, cache.layers, strict=True):
            for storage, one in zip(mine.storage, (theirs.keys, theirs.values), strict=True):
                storage[rows, :, start : self._end] = one
                # What is masked is still multiplied, by zero: whatever an earlier row left here must be a number.
                storage[rows, :, :start] = 0
        self.lengths += [length] * copies

    def leave(self, row: int) -> None:
        last = len(self.lengths) - 1
        if row < last:
            for layer in self._cache.layers:
                for storage in layer.storage:
                    storage[row, :, : self._end] = storage[last, :, : self._end]
            self.lengths[row] = self.lengths[last]
        self.lengths.pop()
        if not self.lengths:
            self._empty()

    def step(self, tokens: Sequence[int]) -> Tensor:
        width = max(self.lengths)
        self._make_room(width)
        for layer in self._cache.layers:
            layer.show(len(self.lengths), self._end - width, self._end)
        device = self._forward.device
        lengths = torch.tensor(self.lengths, device=device)[:, None]
        mask = None
        if min(self.lengths) < width:
            mask = (torch.arange(width + 1, device=device) >= width - lengths).long()
        logits = self._forward(torch.tensor(tokens, device=device)[:, None], self._cache, lengths, mask)
        self._end += 1
        self.lengths = [length + 1 for length in self.lengths]
        return logits[:, 0]

    def _make_room(self, width: int, like: DynamicCache | None = None) -> None:
        """See to it that there are ``width`` columns before ``end`` and one after it."""
        if width <= self._end < self._room:
            return
        used = max(self.lengths, default=0)
        room = width + _ROOM + width // 4
        rows = len(self.lengths)
        for index, layer in enumerate(self._cache.layers):
            old = layer.storage
            shaped = old or (like.layers[index].keys, like.layers[index].values)  # type: ignore[union-attr]
            moved = []
            for number, one in enumerate(shaped):
                storage = one.new_zeros(self._capacity, one.shape[1], room, one.shape[3])
                if old is not None and used:
                    storage[:rows, :, width - used : width] = old[number][:rows, :, self._end - used : self._end]
                moved.append(storage)
            layer.storage = moved[0], moved[1]
        self._end, self._room = width, room


@torch.inference_mode()
def open_rows(forward: Forward, capacity: int) -> Rows:
    """Rows for this model: batched if its logits are then those of each sequence alone, or one at a time."""
    if capacity > 1 and forward.plain and _batches(forward):
        return BatchedRows(forward, capacity)
    return AloneRows(forward)


def _batches(forward: Forward) -> bool:
    """Whether two random sequences of different length, read and continued together, come out as they do alone."""
    alone, together = AloneRows(forward), BatchedRows(forward, 2)
    generator = torch.Generator().manual_seed(0)
    try:
        for length in (3, 8):
            prompt = torch.randint(forward.vocabulary, (length,), generator=generator).tolist()
            for rows in (alone, together):
                cache = forward.new_cache()
                forward.read(prompt, cache, 0)
                rows.join(cache, length, 1)
        for _ in range(2):
            tokens = torch.randint(forward.vocabulary, (2,), generator=generator).tolist()
            expected, found = alone.step(tokens), together.step(tokens)
    except (RuntimeError, ValueError, TypeError, IndexError, AttributeError):
        return False  # its caches are of some other shape
    spread = expected.amax(-1) - expected.amin(-1)
    # Rounding in bfloat16 comes to a hundredth of the spread; a wrong mask or position to a tenth and more.
    return bool(((found - expected).abs().amax(-1) <= 0.03 * spread).all())
