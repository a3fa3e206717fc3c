"""One token through a decoder layer, in one call.

A layer of the Llama kind, asked for one token, computes seven products and next to nothing between them. In torch that
little is some 40 operators and 15 modules, which take a third of the time of a layer of packed weights in the shape of
Llama 2 7B, and most of it in small models. Here it is one call of C++ (kernels/cpu/decoder.h), which gives what the
layer gives, but for the rounding of sums.

:func:`attach` gives the layers that are known another ``forward``, which takes that way when it can: one token of one
sequence, on a CPU, in float32, without gradients, with a cache that has room (cache.py) and no mask. Anything else goes
the layer's own way: prompts, batches, masks, hooks on the modules inside, torch.compile.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Any, cast
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from torch.nn.modules.module import _has_any_global_hook
from transformers import DynamicCache, PreTrainedModel
from transformers.activations import ACT2FN

from signbit.cache import RoomyLayer
from signbit.kernels import cpu
from signbit.modules import QuantizedLinear

# Layers of one and the same structure; the last two put norms on queries and keys, or biases on their linears.
_KNOWN = {
    f"transformers.models.{family}.modeling_{family}.{name}DecoderLayer"
    for family, name in (("llama", "Llama"), ("mistral", "Mistral"), ("qwen2", "Qwen2"), ("qwen3", "Qwen3"))
}
_SILU = (nn.SiLU, type(ACT2FN["silu"]))
_LINEARS = ("q_proj", "k_proj", "v_proj", "o_proj"), ("gate_proj", "up_proj", "down_proj")


def attach(model: PreTrainedModel) -> None:
    """Let the layers of ``model`` that are known, and a dense head, take one token in one call."""
    for layer in model.modules():
        if f"{type(layer).__module__}.{type(layer).__qualname__}" in _KNOWN:
            layer.forward = partial(_layer_forward, layer)
    head = model.get_output_embeddings()
    if type(head) is nn.Linear:
        head.forward = partial(_head_forward, head)  # type: ignore[method-assign]


def _layer_forward(
    layer: nn.Module,
    hidden_states: Tensor,
    attention_mask: Tensor | None = None,
    position_ids: Tensor | None = None,
    past_key_values: Any = None,
    use_cache: bool | None = False,
    position_embeddings: tuple[Tensor, Tensor] | None = None,
    **others: Any,
) -> Any:
    if (
        attention_mask is None
        and position_embeddings is not None
        and isinstance(past_key_values, DynamicCache)
        and _is_one_token(hidden_states)
        and not layer.training
        and not others.get("output_attentions")
    ):
        decoder = _decoder_of(layer)
        if decoder is not None:
            y = decoder.step(hidden_states, position_embeddings, past_key_values)
            if y is not None:
                return y
    return type(layer).forward(
        layer,
        hidden_states,
        attention_mask=attention_mask,
        position_ids=position_ids,
        past_key_values=past_key_values,
        use_cache=use_cache,
        position_embeddings=position_embeddings,
        **others,
    )


def _head_forward(head: nn.Linear, hidden_states: Tensor) -> Tensor:
    """Rows of the dense head are read as fast as memory gives them, which torch's product for one token does not do."""
    if _is_one_token(hidden_states) and head._parameters["bias"] is None and _is_plain(head.weight):
        return cpu.dense_product(hidden_states, head.weight)
    return nn.Linear.forward(head, hidden_states)


def _is_one_token(x: Tensor) -> bool:
    return (
        x.shape[:-1].numel() == 1
        and x.is_cpu
        and x.dtype == torch.float32
        and not torch.is_grad_enabled()
        and not torch.compiler.is_compiling()
        and cpu.instruction_set() is not None
    )


def _is_plain(x: Tensor) -> bool:
    return x.is_cpu and x.dtype == torch.float32 and x.is_contiguous()


class _Decoder:
    """A layer as C++ knows it: addresses, which are good as long as :func:`_addresses` finds the same."""

    def __init__(self, layer: Any, found: list[int]) -> None:
        attention, mlp = layer.self_attn, layer.mlp
        self.addresses = found
        self.layer_index: int = attention.layer_idx
        self._features: int = attention.head_dim
        self._key_heads: int = attention.k_proj.out_features // self._features
        self._kept: list[Any] = []  # what was made for the addresses
        norms = [layer.input_layernorm, layer.post_attention_layernorm]
        norms += [getattr(attention, name, None) for name in ("q_norm", "k_norm")]
        self._native = cpu.native.DecoderLayer(
            attention.q_proj.out_features // self._features,
            self._key_heads,
            self._features,
            attention.scaling,
            *(
                cpu.native.Norm() if n is None else cpu.native.Norm(n.weight.data_ptr(), n.variance_epsilon)
                for n in norms
            ),
            *(self._linear(getattr(attention, name)) for name in _LINEARS[0]),
            *(self._linear(getattr(mlp, name)) for name in _LINEARS[1]),
        )

    def _linear(self, linear: Any) -> Any:
        biases = [] if linear.bias is None else [cpu.coefficients(linear.bias.unsqueeze(1))]
        if not isinstance(linear, QuantizedLinear):
            matrix = cpu.dense(linear.weight)
            self._kept.append(matrix)
            return cpu.native.Linear([[matrix]], False, False, biases)
        packed = linear.packed
        chains = cpu.chains_of(packed)
        assert chains is not None
        self._kept.append(packed.prepared)
        if packed.spec.bias:
            biases.insert(0, cpu.coefficients(packed.get_buffer("bias").unsqueeze(1)))
        matrices = [[matrix for matrix, _ in chain] for chain in chains]
        return cpu.native.Linear(matrices, linear.int8, packed.spec.norm, biases)

    def step(self, x: Tensor, position: tuple[Tensor, Tensor], cache: DynamicCache) -> Tensor | None:
        """The layer's output for x [1, 1, width]; None if the cache is none of ours."""
        layers = cache.layers
        own = layers[self.layer_index] if self.layer_index < len(layers) else None
        if type(own) is not RoomyLayer or not own.is_initialized:
            return None
        keys, values = own.keys, own.values
        assert keys is not None and values is not None
        fits = (1, self._key_heads, self._features) == (*keys.shape[:2], keys.shape[-1]) and keys.shape == values.shape
        cosines, sines = position
        if not fits or keys.dtype != torch.float32 or cosines.dtype != torch.float32:
            return None
        if cosines.shape[-1] != self._features:
            return None
        keys, values, tokens = own.grow(keys, values, 1)
        x, cosines, sines = x.contiguous(), cosines.contiguous(), sines.contiguous()
        y = torch.empty_like(x)
        self._native.step(
            x.data_ptr(),
            y.data_ptr(),
            cosines.data_ptr(),
            sines.data_ptr(),
            keys.data_ptr(),
            values.data_ptr(),
            keys.stride(1),
            tokens,
            torch.get_num_threads(),
        )
        return y


# By layer, and not on it: what is made of addresses must not be copied along with a model. None: goes its own way.
_decoders: WeakKeyDictionary[nn.Module, tuple[list[int], _Decoder | None]] = WeakKeyDictionary()


def _decoder_of(layer: nn.Module) -> _Decoder | None:
    inside = _inside(layer)
    if _has_any_global_hook() or any(map(_is_watched, inside)):
        return None
    found = _addresses(inside)
    known = _decoders.get(layer)
    if known is None or known[0] != found:
        known = _decoders[layer] = found, _Decoder(layer, found) if _has_kernels(layer, inside) else None
    return known[1]


def _is_watched(module: nn.Module) -> bool:
    """Whether anybody has put hooks, or another forward, on it."""
    return bool(module._forward_hooks or module._forward_pre_hooks or "forward" in module.__dict__)


def _inside(layer: nn.Module) -> list[nn.Module]:
    """The modules of a layer that do not run when it is done in one call."""
    modules = layer._modules
    attention, mlp = modules["self_attn"], modules["mlp"]
    parts = (modules, attention._modules, mlp._modules)  # type: ignore[union-attr]
    return [cast(nn.Module, module) for part in parts for module in part.values()]


def _addresses(inside: list[nn.Module]) -> list[int]:
    """Where everything is that a :class:`_Decoder` points to, and how linears take their inputs."""
    found: list[int] = []
    for module in inside:
        if isinstance(module, QuantizedLinear):
            found.append(module.int8)
            found.extend(tensor.data_ptr() for tensor in _buffers(module))
        found.extend(parameter.data_ptr() for parameter in module._parameters.values() if parameter is not None)
    return found


def _buffers(linear: QuantizedLinear) -> Iterator[Tensor]:
    return iter(linear._modules["packed"]._buffers.values())  # type: ignore[union-attr,arg-type]


def _has_kernels(layer: Any, inside: list[nn.Module]) -> bool:
    linears = [
        getattr(part, name)
        for part, names in zip((layer.self_attn, layer.mlp), _LINEARS, strict=True)
        for name in names
    ]
    parameters = [p for module in inside for p in module._parameters.values() if p is not None]
    return (
        all(type(one) is nn.Linear or isinstance(one, QuantizedLinear) for one in linears)
        and all(cpu.has_kernel(one.packed) for one in linears if isinstance(one, QuantizedLinear))
        and all(_is_plain(parameter) for parameter in parameters)
        and isinstance(layer.mlp.act_fn, _SILU)
        and layer.self_attn.config._attn_implementation == "sdpa"
    )
