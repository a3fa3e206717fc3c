"""One token through a layer in one call: the layer's own outputs, and its own way for everything else."""

import copy
import gc
import itertools
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.utils import parametrize
from transformers import AutoModelForCausalLM, DynamicCache, PreTrainedModel
from transformers.models.llama.modeling_llama import LlamaAttention

from signbit import decoding
from signbit.cache import give_room
from signbit.kernels import cpu
from signbit.modules import QuantizedLinear, set_activations
from signbit.serving.rows import BatchedRows, Forward

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


CHANGES: dict[str, Callable[[PreTrainedModel], Any]] = {
    "scales": lambda model: _scale(model.model.layers[0].mlp.up_proj),
    "a buffer": lambda model: _set_buffer(model.model.layers[0].mlp.up_proj),
    "another norm": lambda model: setattr(
        model.model.layers[1].input_layernorm, "weight", torch.nn.Parameter(torch.rand(72) + 0.5)
    ),
    "another linear": lambda model: setattr(model.model.layers[1].mlp, "down_proj", torch.nn.Linear(100, 72)),
    "in place": lambda model: model.model.layers[1].post_attention_layernorm.weight.data.mul_(1.5),
    "scaling": lambda model: setattr(model.model.layers[1].self_attn, "scaling", 0.9),
    "epsilon": lambda model: setattr(model.model.layers[1].input_layernorm, "variance_epsilon", 0.5),
    "layers swapped": lambda model: _swap_layers(model),
}


def _scale(linear: QuantizedLinear) -> None:
    linear.packed.scales = linear.packed.get_buffer("scales") * 2


def _set_buffer(linear: QuantizedLinear) -> None:
    linear.packed._buffers["scales"] = linear.packed.get_buffer("scales") * 2


def _swap_layers(model: PreTrainedModel) -> None:
    layers = model.model.layers
    layers[0], layers[1] = layers[1], layers[0]
    for index, layer in enumerate(layers):
        layer.self_attn.layer_idx = index


@pytest.mark.parametrize("change", CHANGES)
def test_it_follows_when_something_is_replaced(change: str, packed_dir: Callable[..., Path], calls: Calls) -> None:
    model = AutoModelForCausalLM.from_pretrained(packed_dir("llama", method="xnor"))
    before = logits_of(model)
    with torch.no_grad():
        CHANGES[change](model)
    calls.count = 0
    found = logits_of(model)
    assert calls.count == 8 * len(model.model.layers)
    assert not torch.allclose(found, before)
    assert_same(found, logits_of(plain(model)))


@pytest.mark.parametrize("recipe", ["billm", "structured", "haar"])
def test_it_follows_when_a_state_is_loaded(recipe: str, packed_dir: Callable[..., Path], calls: Calls) -> None:
    """In place: addresses stay, what kernels have made of the tensors does not."""
    model = AutoModelForCausalLM.from_pretrained(packed_dir("llama", **RECIPES[recipe]))
    other = AutoModelForCausalLM.from_pretrained(packed_dir("llama", seed=1, **RECIPES[recipe]))
    logits_of(model)
    states = model.state_dict()
    if all(states[name].shape == tensor.shape for name, tensor in other.state_dict().items()):
        model.load_state_dict(other.state_dict())
    else:  # other columns are salient
        for name, module in model.named_modules():
            if isinstance(module, QuantizedLinear):
                module.packed = other.get_submodule(name).packed
    calls.count = 0
    assert_same(logits_of(model), logits_of(plain(model)))
    assert calls.count


def test_a_copy_goes_its_own_way(packed_dir: Callable[..., Path], calls: Calls) -> None:
    model = AutoModelForCausalLM.from_pretrained(packed_dir("llama"))
    before = logits_of(model)
    twin = copy.deepcopy(model)
    twin.model.layers[0].input_layernorm.weight.data.zero_()
    assert not torch.allclose(logits_of(twin), before)
    assert torch.equal(logits_of(model), before)


class Doubled(torch.nn.Module):
    def forward(self, weight: Tensor) -> Tensor:
        return 2 * weight


class OtherAttention(LlamaAttention):
    def forward(self, *args: Any, **kwargs: Any) -> Any:
        out, weights = super().forward(*args, **kwargs)
        return 2 * out, weights


class OtherCache(DynamicCache):
    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> Any:
        return super().update(key_states, 2 * value_states, *args, **kwargs)


def eager_attention(model: PreTrainedModel) -> None:
    model.set_attn_implementation("eager")
    logits_of(model)


def hooks_inside(model: PreTrainedModel) -> None:
    model.model.layers[0].mlp.register_forward_hook(lambda *_: None)
    model.model.layers[1].self_attn.q_proj.register_forward_pre_hook(lambda *_: None)
    logits_of(model)


def parametrized_norms(model: PreTrainedModel) -> None:
    for layer in model.model.layers:
        parametrize.register_parametrization(layer.input_layernorm, "weight", Doubled())
    logits_of(model)


def other_norms(model: PreTrainedModel) -> None:
    for layer in model.model.layers:
        layer.input_layernorm = torch.nn.RMSNorm(72)
    logits_of(model)


def other_attention(model: PreTrainedModel) -> None:
    for layer in model.model.layers:
        layer.self_attn.__class__ = OtherAttention
    logits_of(model)


@torch.no_grad()
def another_cache(model: PreTrainedModel) -> None:
    cache = OtherCache(config=model.config)
    give_room(model, (), {"past_key_values": cache})
    model(torch.tensor([[3, 4, 5]]), past_key_values=cache)
    model(torch.tensor([[6]]), past_key_values=cache)


@torch.no_grad()
def a_cache_set_up_and_empty(model: PreTrainedModel) -> None:
    cache = DynamicCache(config=model.config)
    give_room(model, (), {"past_key_values": cache})
    for layer in cache.layers:
        layer.lazy_initialization(torch.zeros(1, 6, 1, 12), torch.zeros(1, 6, 1, 12))
    model(torch.tensor([[6]]), past_key_values=cache)


def gradients(model: PreTrainedModel) -> None:
    cache = DynamicCache(config=model.config)
    give_room(model, (), {"past_key_values": cache})
    with torch.no_grad():
        model(torch.tensor([[3, 4, 5]]), past_key_values=cache)
    model(torch.tensor([[6]]), past_key_values=cache).logits.sum().backward()
    assert model.model.layers[0].input_layernorm.weight.grad is not None


OTHER_WAYS: dict[str, Callable[[PreTrainedModel], Any]] = {
    "two sequences": lambda model: logits_of(model, batch=2),
    "attentions": lambda model: logits_of(model, output_attentions=True),
    "a mask": lambda model: logits_of(model, attention_mask=torch.zeros(1, 1, 1, 6), tokens=1),
    "training": lambda model: logits_of(model.train()),
    "bfloat16": lambda model: logits_of(model.bfloat16()),
    **{way.__name__: way for way in (eager_attention, hooks_inside, parametrized_norms, other_norms, other_attention)},
    **{way.__name__: way for way in (another_cache, a_cache_set_up_and_empty, gradients)},
}


@pytest.mark.parametrize("way", OTHER_WAYS)
def test_everything_else_goes_the_layers_own_way(way: str, packed_dir: Callable[..., Path], calls: Calls) -> None:
    OTHER_WAYS[way](AutoModelForCausalLM.from_pretrained(packed_dir("llama")))
    assert calls.count == 0


@torch.inference_mode()
def test_a_server_takes_it_for_a_lone_answer(packed_dir: Callable[..., Path], calls: Calls) -> None:
    model = AutoModelForCausalLM.from_pretrained(packed_dir("llama"))
    found = []
    for one in (model, plain(model)):
        forward = Forward(one)
        rows = BatchedRows(forward, 3)
        logits = []
        for joining in ([4, 5, 6, 7, 8], [9, 10]):  # a second one comes, and the first one leaves
            cache = forward.new_cache()
            forward.read(joining, cache, 0)
            calls.count = 0
            rows.join(cache, len(joining), 1)
            for token in range(3):
                logits.append(rows.step([20 + token] * len(rows.lengths)))
            assert calls.count == (3 * len(one.model.layers) if one is model and len(rows.lengths) == 1 else 0)
        rows.leave(0)
        logits += [rows.step([30]), rows.step([31])]
        assert rows.lengths == [7]
        found.append(torch.cat(logits))
    assert calls.count == 0
    assert_same(*found)


def test_captured_outputs_and_the_one_call_after_them(packed_dir: Callable[..., Path], calls: Calls) -> None:
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
    # transformers leaves its hooks where they are.
    calls.count = 0
    logits_of(model)
    assert calls.count == 8 * len(model.model.layers)


def test_what_is_offloaded_keeps_its_forward(packed_dir: Callable[..., Path], tmp_path: Path, calls: Calls) -> None:
    directory = packed_dir("llama")
    places = {"model.embed_tokens": "cpu", "model.layers.0": "cpu", "model.layers.1": "disk", "model.norm": "cpu"}
    places |= {"model.rotary_emb": "cpu", "lm_head": "disk"}
    model = AutoModelForCausalLM.from_pretrained(directory, device_map=places, offload_folder=tmp_path)
    assert_same(logits_of(model), logits_of(AutoModelForCausalLM.from_pretrained(directory)))
    assert calls.count == 8 * 2  # of the other model


def test_a_model_goes_when_nobody_has_it(packed_dir: Callable[..., Path]) -> None:
    model = AutoModelForCausalLM.from_pretrained(packed_dir("llama"))
    logits_of(model)
    gc.collect()
    gc.disable()
    try:
        layer = weakref.ref(model.model.layers[0])
        del model
        assert layer() is None
    finally:
        gc.enable()


@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning")
def test_a_head_that_is_looked_at(packed_dir: Callable[..., Path]) -> None:
    head = AutoModelForCausalLM.from_pretrained(packed_dir("llama")).lm_head
    x = torch.randn(1, 1, 72)
    with torch.no_grad():
        wanted = torch.nn.functional.linear(x, head.weight)
        assert_same(torch.jit.trace(head, torch.zeros_like(x))(x), wanted)
        assert_same(torch.jit.trace(head, torch.zeros_like(x))(x), wanted)
        assert_same(torch.vmap(head)(x), wanted)
        with FakeTensorMode(allow_non_fake_inputs=True) as mode:
            assert head(mode.from_tensor(x)).shape == (1, 1, 300)
        with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
            head(x[..., :5])


def test_a_single_token_is_where_a_cache_begins(packed_dir: Callable[..., Path]) -> None:
    model = AutoModelForCausalLM.from_pretrained(packed_dir("llama"))
    assert_same(logits_of(model, prompt=1), logits_of(plain(model), prompt=1))


def test_dense_products() -> None:
    generator = torch.Generator().manual_seed(0)
    for n, m in itertools.product((1, 100, 4097), (1, 33, 576)):
        weight, x = torch.randn(n, m, generator=generator), torch.randn(1, 1, m, generator=generator)
        wanted = x.double() @ weight.double().T
        assert (cpu.dense_product(x, weight) - wanted).abs().max() <= 1e-6 * m**0.5 * wanted.abs().max()
