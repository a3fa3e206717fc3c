"""One token through a layer in one call: the layer's own outputs, and its own way for everything else."""

import copy
import itertools
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, DynamicCache, PreTrainedModel

from signbit import decoding
from signbit.cache import give_room
from signbit.kernels import cpu
from signbit.modules import QuantizedLinear, set_activations

pytestmark = pytest.mark.skipif(cpu.instruction_set() is None, reason="needs the C++ kernels")

FAMILIES = ["llama", "mistral", "qwen2", "qwen3"]
# Each layout, and what may follow a product.
RECIPES: dict[str, dict[str, Any]] = {
    "billm": {"method": "billm"},
    "bias": {"method": "xnor", "planes": 2, "bias_correction": True},
    "norm": {"method": "onebit", "group_size": 0},
    "factors": {"method": "sign-factors", "bits": 4.0, "iterations": 3, "group_size": 0},
    "partial": {"method": "pb-llm"},
    "structured": {"method": "stbllm", "keep": 4, "allocation": "uniform"},
    "haar": {"method": "hbllm"},
    "integers": {"method": "rtn", "bits": 4},
    "skip": {"method": "xnor", "skip": ["*.q_proj", "*.down_proj"]},
}


class Calls:
    """How often a layer took the one call."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.count = 0
        step = decoding._Decoder.step

        def counted(decoder: Any, *args: Any) -> Tensor | None:
            y = step(decoder, *args)
            self.count += y is not None
            return y

        monkeypatch.setattr(decoding._Decoder, "step", counted)


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> Calls:
    return Calls(monkeypatch)


def plain(model: PreTrainedModel) -> PreTrainedModel:
    """The same model without what is attached to it."""
    twin = copy.deepcopy(model)
    for module in twin.modules():
        module.__dict__.pop("forward", None)
    return twin


@torch.no_grad()
def logits_of(model: PreTrainedModel, prompt: int = 5, tokens: int = 8, batch: int = 1, **options: Any) -> Tensor:
    """Of each token after a prompt, [batch, tokens, vocabulary]."""
    ids = torch.arange(3, 3 + batch * (prompt + tokens)).view(batch, -1)
    cache = DynamicCache(config=model.config)
    give_room(model, (), {"past_key_values": cache})
    model(ids[:, :prompt], past_key_values=cache)
    steps = [model(ids[:, i : i + 1], past_key_values=cache, **options) for i in range(prompt, prompt + tokens)]
    return torch.cat([step.logits for step in steps], dim=1)


def assert_same(found: Tensor, wanted: Tensor) -> None:
    assert (found - wanted).abs().max() <= 2e-5 * wanted.abs().max()


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("recipe", RECIPES)
def test_a_token_gets_what_the_layer_gives(
    family: str, recipe: str, packed_dir: Callable[..., Path], calls: Calls
) -> None:
    model = AutoModelForCausalLM.from_pretrained(packed_dir(family, **RECIPES[recipe]))
    found = logits_of(model)
    expected = 8 * len(model.model.layers)
    assert calls.count == (0 if family == "mistral" else expected)  # which has windows
    assert_same(found, logits_of(plain(model)))
    assert calls.count in (0, expected)


def test_a_window_that_is_not_reached(packed_dir: Callable[..., Path], calls: Calls) -> None:
    model = AutoModelForCausalLM.from_pretrained(packed_dir("mistral"))
    model.config.sliding_window = None
    found = logits_of(model)
    assert calls.count == 8 * len(model.model.layers)
    assert_same(found, logits_of(plain(model)))


@pytest.mark.parametrize("name", cpu.instruction_sets())
def test_every_instruction_set(name: str, packed_dir: Callable[..., Path], calls: Calls) -> None:
    best = cpu.instruction_set()
    assert best is not None
    model = AutoModelForCausalLM.from_pretrained(packed_dir("qwen3"))
    cpu.use(name)
    try:
        assert_same(logits_of(model, prompt=90, tokens=3), logits_of(plain(model), prompt=90, tokens=3))
    finally:
        cpu.use(best)
    assert calls.count


def test_activations_in_8_bits(packed_dir: Callable[..., Path], calls: Calls) -> None:
    model = AutoModelForCausalLM.from_pretrained(packed_dir("llama"))
    exact = logits_of(model)
    set_activations(model, "int8")
    rounded, wanted = logits_of(model), logits_of(plain(model))
    # An activation on the edge between two steps may fall to either side.
    assert (rounded - wanted).norm() < 0.2 * (rounded - exact).norm()
    assert calls.count


def test_the_number_of_threads_changes_nothing(packed_dir: Callable[..., Path]) -> None:
    model = AutoModelForCausalLM.from_pretrained(packed_dir("llama"))
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        alone = logits_of(model, prompt=100, tokens=2)
        torch.set_num_threads(3)
        assert torch.equal(logits_of(model, prompt=100, tokens=2), alone)
    finally:
        torch.set_num_threads(threads)


def test_generate_and_what_comes_after(packed_dir: Callable[..., Path], calls: Calls) -> None:
    model = AutoModelForCausalLM.from_pretrained(packed_dir("qwen2"))
    prompt = torch.arange(3, 13).unsqueeze(0)
    options: dict[str, Any] = {"max_new_tokens": 12, "do_sample": False, "pad_token_id": 2, "eos_token_id": None}
    written = model.generate(prompt, **options)
    assert calls.count == 11 * len(model.model.layers)
    assert torch.equal(plain(model).generate(prompt, **options), written)


def changes() -> Iterator[tuple[str, Callable[[PreTrainedModel], Any]]]:
    yield "moved scales", lambda model: _scale(model.model.layers[0].mlp.up_proj)
    yield (
        "another norm",
        lambda model: setattr(
            model.model.layers[1].input_layernorm, "weight", torch.nn.Parameter(torch.rand(72) + 0.5)
        ),
    )
    yield (
        "another linear",
        lambda model: setattr(model.model.layers[1].mlp, "down_proj", torch.nn.Linear(100, 72, bias=True)),
    )
    yield "in place", lambda model: model.model.layers[1].post_attention_layernorm.weight.data.mul_(1.5)


def _scale(linear: QuantizedLinear) -> None:
    linear.packed.scales = linear.packed.get_buffer("scales") * 2


@pytest.mark.parametrize("change", [pytest.param(change, id=name) for name, change in changes()])
def test_it_follows_when_tensors_are_replaced(
    change: Callable[[PreTrainedModel], Any], packed_dir: Callable[..., Path], calls: Calls
) -> None:
    model = AutoModelForCausalLM.from_pretrained(packed_dir("llama", method="xnor"))
    before = logits_of(model)
    with torch.no_grad():
        change(model)
    calls.count = 0
    found = logits_of(model)
    assert calls.count == 8 * len(model.model.layers)
    assert not torch.allclose(found, before)
    assert_same(found, logits_of(plain(model)))


def test_a_copy_goes_its_own_way(packed_dir: Callable[..., Path], calls: Calls) -> None:
    model = AutoModelForCausalLM.from_pretrained(packed_dir("llama"))
    before = logits_of(model)
    twin = copy.deepcopy(model)
    twin.model.layers[0].input_layernorm.weight.data.zero_()
    assert not torch.allclose(logits_of(twin), before)
    assert torch.equal(logits_of(model), before)


def other_ways() -> Iterator[tuple[str, Callable[[PreTrainedModel], Any]]]:
    yield "two sequences", lambda model: logits_of(model, batch=2)
    yield "attentions", lambda model: logits_of(model, output_attentions=True)
    yield "a mask", lambda model: logits_of(model, attention_mask=torch.zeros(1, 1, 1, 6), tokens=1)
    yield "training", lambda model: logits_of(model.train())
    yield "bfloat16", lambda model: logits_of(model.bfloat16())
    yield "eager attention", lambda model: (model.set_attn_implementation("eager"), logits_of(model))
    yield (
        "a hook inside",
        lambda model: (
            model.model.layers[0].mlp.register_forward_hook(lambda *_: None),
            model.model.layers[1].self_attn.q_proj.register_forward_pre_hook(lambda *_: None),
            logits_of(model),
        ),
    )
    yield "gradients", _with_gradients


def _with_gradients(model: PreTrainedModel) -> None:
    cache = DynamicCache(config=model.config)
    give_room(model, (), {"past_key_values": cache})
    with torch.no_grad():
        model(torch.tensor([[3, 4, 5]]), past_key_values=cache)
    model(torch.tensor([[6]]), past_key_values=cache).logits.sum().backward()
    assert model.model.layers[0].input_layernorm.weight.grad is not None


@pytest.mark.parametrize("way", [pytest.param(way, id=name) for name, way in other_ways()])
def test_everything_else_goes_the_layers_own_way(
    way: Callable[[PreTrainedModel], Any], packed_dir: Callable[..., Path], calls: Calls
) -> None:
    way(AutoModelForCausalLM.from_pretrained(packed_dir("llama")))
    assert calls.count == 0


def test_hidden_states_are_captured(packed_dir: Callable[..., Path]) -> None:
    model = AutoModelForCausalLM.from_pretrained(packed_dir("llama"))
    ids, states = torch.tensor([[3, 4, 5]]), []
    for one in (model, plain(model)):
        cache = DynamicCache(config=model.config)
        give_room(one, (), {"past_key_values": cache})
        with torch.no_grad():
            one(ids, past_key_values=cache)
            states.append(one(ids[:, :1], past_key_values=cache, output_hidden_states=True).hidden_states)
    for found, wanted in zip(*states, strict=True):
        assert_same(found, wanted)


def test_a_single_token_is_where_a_cache_begins(packed_dir: Callable[..., Path]) -> None:
    model = AutoModelForCausalLM.from_pretrained(packed_dir("llama"))
    assert_same(logits_of(model, prompt=1), logits_of(plain(model), prompt=1))


def test_dense_products() -> None:
    generator = torch.Generator().manual_seed(0)
    for n, m in itertools.product((1, 100, 4097), (1, 33, 576)):
        weight, x = torch.randn(n, m, generator=generator), torch.randn(1, 1, m, generator=generator)
        wanted = x.double() @ weight.double().T
        assert (cpu.dense_product(x, weight) - wanted).abs().max() <= 1e-6 * m**0.5 * wanted.abs().max()
