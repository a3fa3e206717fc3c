"""A key-value cache with room to grow.

transformers offers two caches for plain attention, and on a CPU both do work that nobody asked for. ``DynamicCache``
concatenates: each token copies all keys and values of the context. ``StaticCache`` allocates the longest context and
attends over all of it, masked, which is what torch.compile needs. Keys, values and attention of one layer of
32 heads of 128 features, in microseconds for one token (2 threads, the best of 80):

| tokens so far | dynamic | static, 640 | static, 4096 | this |
|---|---|---|---|---|
| 32 | 140 | 1015 | 6310 | 63 |
| 512 | 2510 | 1030 | 6440 | 860 |

Here keys and values are written to storage that is allocated ahead, as a static cache's, and attention is given a view
of the part that is filled, as a dynamic cache's. Pages that nothing was written to take no memory.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel
from transformers.cache_utils import DynamicLayer

# Tokens of room, beyond a quarter of the context: what is copied when it is used up is then a few tokens' worth each.
_ROOM = 256


class RoomyLayer(DynamicLayer):
    """Keys and values of one layer, at the start of storage that has room for more."""

    _storage: tuple[Tensor, Tensor] | None = None
    _returned: tuple[Tensor | None, Tensor | None] = None, None

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        if torch.compiler.is_compiling() or (torch.is_grad_enabled() and key_states.requires_grad):
            return super().update(key_states, value_states, *args, **kwargs)
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        tokens = key_states.shape[-2]
        keys, values, length = self.grow(key_states, value_states, tokens)
        keys.narrow(2, length, tokens).copy_(key_states)
        values.narrow(2, length, tokens).copy_(value_states)
        assert self.keys is not None and self.values is not None
        return self.keys, self.values

    def grow(self, like_keys: Tensor, like_values: Tensor, tokens: int) -> tuple[Tensor, Tensor, int]:
        """Have so many ``tokens`` more, whose keys and values are for the caller to write.

        The storage of keys and of values, [batch, heads, room, features], contiguous, and where in the room the new
        ones begin. ``like_keys``, ``like_values``: what keys and values are like, but in number.
        """
        length = self.get_seq_length()
        total = length + tokens
        storage = self._storage
        if storage is None or storage[0].shape[-2] < total or not self._in_storage(storage):
            storage = self._move(like_keys, like_values, length, total + _ROOM + total // 4)
        self.keys, self.values = self._returned = storage[0].narrow(2, 0, total), storage[1].narrow(2, 0, total)
        return *storage, length

    def _in_storage(self, storage: tuple[Tensor, Tensor]) -> bool:
        """Whether keys and values still are where update left them: beams are reordered by replacing them."""
        keys, values = self.keys, self.values
        assert keys is not None and values is not None
        if keys.data_ptr() != storage[0].data_ptr() or values.data_ptr() != storage[1].data_ptr():
            return False
        if keys is self._returned[0] and values is self._returned[1]:
            return True  # nothing was replaced, nearly always; shapes take some microseconds to compare
        pairs = (keys, storage[0]), (values, storage[1])
        return all(own.shape[:2] == all_.shape[:2] and own.stride() == all_.stride() for own, all_ in pairs)

    def _move(self, like_keys: Tensor, like_values: Tensor, length: int, room: int) -> tuple[Tensor, Tensor]:
        moved = []
        for old, like in ((self.keys, like_keys), (self.values, like_values)):
            batch, heads, _, features = like.shape
            storage = like.new_empty(batch, heads, room, features)
            if length:
                storage[:, :, :length] = old
            moved.append(storage)
        self._storage = moved[0], moved[1]
        return self._storage


def give_room(module: PreTrainedModel, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """A forward pre-hook: plain layers of a dynamic cache get room.

    ``generate`` makes a dynamic cache of its own, which nobody can choose from outside; so it is met on its way in. In
    early versions of transformers 5 that is on the way of the second token, with the prompt in it.
    """
    cache = kwargs.get("past_key_values")
    if not isinstance(cache, DynamicCache):
        return
    plain = [i for i, layer in enumerate(cache.layers) if type(layer) is DynamicLayer]
    growing = cache.layer_class_to_replicate is DynamicLayer
    # Asked last: to find its device, a module looks for its first parameter, which takes it 30 microseconds a token.
    if not (plain or growing) or module.device.type != "cpu":
        return
    if growing:
        cache.layer_class_to_replicate = RoomyLayer
    for index in plain:
        roomy = RoomyLayer()
        roomy.__dict__.update(cache.layers[index].__dict__)
        cache.layers[index] = roomy
