"""The cache with room: what it returns is what a dynamic cache returns, and nothing is copied for a token."""

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, DynamicCache
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

from signbit.cache import RoomyLayer, give_room


def states(tokens: int, seed: int, batch: int = 2) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(batch, 3, tokens, 4, generator=generator), torch.randn(batch, 3, tokens, 4, generator=generator)


def feed(layers: list[DynamicLayer], tokens: int, seed: int, batch: int = 2) -> None:
    keys, values = states(tokens, seed, batch)
    found = [layer.update(keys, values) for layer in layers]
    for one in found[1:]:
        assert torch.equal(one[0], found[0][0])
        assert torch.equal(one[1], found[0][1])


def test_it_returns_what_a_dynamic_layer_returns() -> None:
    layers = [DynamicLayer(), RoomyLayer()]
    for seed, tokens in enumerate([5, 1, 1, 400, 1, 1]):
        feed(layers, tokens, seed)
    assert layers[1].get_seq_length() == 409


def test_a_token_moves_nothing() -> None:
    layer = RoomyLayer()
    keys = layer.update(*states(5, 0))[0]
    assert layer.update(*states(1, 1))[0].data_ptr() == keys.data_ptr()


@pytest.mark.parametrize("change", ["reorder", "repeat", "select", "crop"])
def test_it_follows_when_keys_are_replaced(change: str) -> None:
    layers: list[DynamicLayer] = [DynamicLayer(), RoomyLayer()]
    feed(layers, 5, 0)
    batch = 2
    for layer in layers:
        if change == "reorder":
            layer.reorder_cache(torch.tensor([1, 1]))
        elif change == "repeat":
            layer.batch_repeat_interleave(2)
            batch = 4
        elif change == "select":
            layer.batch_select_indices(torch.tensor([1]))
            batch = 1
        else:
            layer.crop(-2)
    feed(layers, 3, 1, batch)


def test_a_copy_goes_its_own_way() -> None:
    layer = RoomyLayer()
    layer.update(*states(5, 0))
    twin = copy.deepcopy(layer)
    feed([layer], 1, 1)
    plain = DynamicLayer()
    plain.update(*states(5, 0))
    feed([plain, twin], 1, 2)
    feed([plain, twin], 1, 3)


def test_it_follows_when_only_values_are_replaced() -> None:
    layers: list[DynamicLayer] = [DynamicLayer(), RoomyLayer()]
    feed(layers, 5, 0)
    for layer in layers:
        assert layer.values is not None
        layer.values = layer.values.flip(0)
    feed(layers, 1, 1)


def test_a_cache_used_again_after_a_reset() -> None:
    layers: list[DynamicLayer] = [DynamicLayer(), RoomyLayer()]
    feed(layers, 5, 0)
    for layer in layers:
        layer.reset()
    if layers[0].get_seq_length() == 0:  # before 5.20 or so, a reset zeroes and keeps the length
        feed(layers, 2, 1)


def test_gradients_flow_as_ever() -> None:
    layer = RoomyLayer()
    keys, values = (part.requires_grad_() for part in states(5, 0))
    layer.update(keys, values)
    layer.update(*(part.requires_grad_() for part in states(1, 1)))[0].sum().backward()
    assert keys.grad is not None


class OnCpu(nn.Module):
    device = torch.device("cpu")


def test_only_plain_layers_are_given_room() -> None:
    used, window = DynamicLayer(), DynamicSlidingWindowLayer(sliding_window=8)
    used.update(*states(2, 0))
    cache = DynamicCache()
    cache.layers = [used, window, DynamicLayer()]
    give_room(OnCpu(), (), {"past_key_values": cache})
    assert [type(layer) for layer in cache.layers] == [RoomyLayer, DynamicSlidingWindowLayer, RoomyLayer]
    assert cache.layer_class_to_replicate is RoomyLayer
    give_room(OnCpu(), (), {"past_key_values": None})
    # What was in it still is.
    feed([used, cache.layers[0]], 1, 1)
    feed([used, cache.layers[0]], 3, 2)


def test_a_cache_that_has_room_is_let_through_without_a_look_at_the_model() -> None:
    cache = DynamicCache()
    give_room(OnCpu(), (), {"past_key_values": cache})
    cache.update(*states(2, 0), 0)
    assert [type(layer) for layer in cache.layers] == [RoomyLayer]
    give_room(nn.Module(), (), {"past_key_values": cache})  # which has no device


@pytest.mark.parametrize("family", ["llama", "gemma3"])
@pytest.mark.parametrize("beams", [1, 2])
def test_a_loaded_checkpoint_writes_the_same_with_it(
    family: str, beams: int, packed_dir: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    model = AutoModelForCausalLM.from_pretrained(packed_dir(family))
    prompt = torch.arange(3, 23).view(2, 10)
    options: dict[str, Any] = {"max_new_tokens": 12, "num_beams": beams, "do_sample": False, "pad_token_id": 2}
    options |= {"return_dict_in_generate": True, "eos_token_id": None}
    written = model.generate(prompt, **options)
    assert RoomyLayer in {type(layer) for layer in written.past_key_values.layers}
    model._forward_pre_hooks.clear()
    model._forward_pre_hooks_with_kwargs.clear()
    assert torch.equal(model.generate(prompt, **options).sequences, written.sequences)
