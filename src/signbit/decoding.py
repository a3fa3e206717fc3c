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

from functools import partial
from itertools import chain
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn.modules.module import _has_any_global_hook
from transformers import DynamicCache, PreTrainedModel
from transformers.activations import ACT2FN

from signbit.cache import RoomyLayer
from signbit.kernels import cpu
from signbit.layouts.base import Watched
from signbit.modules import QuantizedLinear

# Layers of one and the same structure; the last two may have norms of queries and keys, or biases.
_KNOWN = {
    f"transformers.models.{family}.modeling_{family}.{name}DecoderLayer"
    for family, name in (("llama", "Llama"), ("mistral", "Mistral"), ("qwen2", "Qwen2"), ("qwen3", "Qwen3"))
}
_SILU = (nn.SiLU, type(ACT2FN["silu"]))


def attach(model: PreTrainedModel) -> None:
    """Let the layers of ``model`` that are known, and a dense head, take one token in one call."""
    for layer in model.modules():
        if f"{type(layer).__module__}.{type(layer).__qualname__}" in _KNOWN:
            layer.forward = LayerForward(layer)
    head = model.get_output_embeddings()
    if type(head) is nn.Linear:
        head.forward = partial(_head_forward, head)  # type: ignore[method-assign]


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


class LayerForward:
    """The ``forward`` of one decoder layer."""

    def __init__(self, layer: nn.Module) -> None:
        self.layer = layer
        self._parts: _Parts | None = None

    def __getstate__(self) -> dict[str, Any]:
        # What is made of addresses does not go along with a copy.
        return {"layer": self.layer, "_parts": None}

    def __call__(
        self,
        hidden_states: Tensor,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Any = None,
        use_cache: bool | None = False,
        position_embeddings: tuple[Tensor, Tensor] | None = None,
        **others: Any,
    ) -> Any:
        layer = self.layer
        if (
            attention_mask is None
            and position_embeddings is not None
            and isinstance(past_key_values, DynamicCache)
            and _is_one_token(hidden_states)
            and not layer.training
            and not others.get("output_attentions")
            and (decoder := self._decoder()) is not None
            and (y := decoder.step(hidden_states, position_embeddings, past_key_values)) is not None
        ):
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

    def _decoder(self) -> _Decoder | None:
        """The layer as C++ knows it, if that can be: as it is now."""
        parts = self._parts
        if parts is None or not parts.are_those_of(self.layer):
            parts = self._parts = _Parts(self.layer)
        return None if parts.are_watched() else parts.decoder()


class _Parts:
    """The modules inside of a layer, and what was made of them."""

    def __init__(self, layer: Any) -> None:
        self.layer = layer
        self.holders = [layer._modules, layer.self_attn._modules, layer.mlp._modules]
        self.ids = self._ids()
        self.modules = [cast(nn.Module, module) for held in self.holders for module in held.values()]
        self.linears = [module for module in self.modules if isinstance(module, QuantizedLinear)]
        self.parameters = [module._parameters for module in self.modules if module._parameters]
        self.hooks = [hooks for m in self.modules for hooks in (m._forward_hooks, m._forward_pre_hooks)]
        self.made: tuple[int, list[int], list[int], _Decoder | None] | None = None

    def _ids(self) -> list[int]:
        return [*map(id, chain.from_iterable(map(dict.values, self.holders)))]

    def are_those_of(self, layer: nn.Module) -> bool:
        return self.ids == self._ids()

    def are_watched(self) -> bool:
        """Whether anybody has put hooks on a module that would not run, or another forward."""
        return _has_any_global_hook() or any(self.hooks) or any("forward" in m.__dict__ for m in self.modules)

    def decoder(self) -> _Decoder | None:
        """Made anew when a tensor is not where it was, or a linear takes its inputs otherwise."""
        dense = [p.data_ptr() for held in self.parameters for p in held.values() if p is not None]
        made = self.made
        changes = Watched.changes
        if made is not None and made[0] == changes and made[1] == dense:
            return made[3]
        packed = [int(one.int8) for one in self.linears]
        packed += [tensor.data_ptr() for one in self.linears for tensor in one.packed.buffers()]
        same = made is not None and made[1:3] == (dense, packed)
        decoder = made[3] if same and made is not None else _Decoder(self.layer) if self._have_kernels() else None
        self.made = changes, dense, packed, decoder
        return decoder

    def _have_kernels(self) -> bool:
        return (
            all(type(one) is nn.Linear or isinstance(one, QuantizedLinear) for one in _linears_of(self.layer))
            and all(cpu.has_kernel(one.packed) for one in self.linears)
            and all(_is_plain(p) for held in self.parameters for p in held.values() if p is not None)
            and isinstance(self.layer.mlp.act_fn, _SILU)
            and self.layer.self_attn.config._attn_implementation == "sdpa"
        )


def _linears_of(layer: Any) -> list[Any]:
    attention, mlp = layer.self_attn, layer.mlp
    of_attention = [attention.q_proj, attention.k_proj, attention.v_proj, attention.o_proj]
    return [*of_attention, mlp.gate_proj, mlp.up_proj, mlp.down_proj]


class _Decoder:
    """A layer as C++ knows it: addresses of the tensors that it had when this was made."""

    def __init__(self, layer: Any) -> None:
        attention = layer.self_attn
        self._index: int = attention.layer_idx
        self._features: int = attention.head_dim
        self._key_heads: int = attention.k_proj.out_features // self._features
        self._kept: list[Any] = []  # what the addresses are of
        norms = [layer.input_layernorm, layer.post_attention_layernorm]
        norms += [getattr(attention, name, None) for name in ("q_norm", "k_norm")]
        self._step = cpu.native.DecoderLayer(
            attention.q_proj.out_features // self._features,
            self._key_heads,
            self._features,
            attention.scaling,
            *map(self._norm, norms),
            *map(self._linear, _linears_of(layer)),
        ).step

    def _norm(self, norm: Any) -> Any:
        if norm is None:
            return cpu.native.Norm()
        self._kept.append(norm.weight.data)
        return cpu.native.Norm(norm.weight.data_ptr(), norm.variance_epsilon)

    def _linear(self, linear: Any) -> Any:
        biases = [] if linear.bias is None else [linear.bias.data.unsqueeze(1)]
        if not isinstance(linear, QuantizedLinear):
            matrix = cpu.dense(linear.weight)
            self._kept += [matrix, linear.weight.data, biases]
            return cpu.native.Linear([[matrix]], False, False, [cpu.coefficients(bias) for bias in biases])
        packed = linear.packed
        chains = cpu.chains_of(packed)
        assert chains is not None
        if packed.spec.bias:
            biases.insert(0, packed.get_buffer("bias").unsqueeze(1))
        self._kept += [packed.prepared, [*packed.buffers()], biases]
        matrices = [[matrix for matrix, _ in chain] for chain in chains]
        return cpu.native.Linear(matrices, linear.int8, packed.spec.norm, [cpu.coefficients(bias) for bias in biases])

    def step(self, x: Tensor, position: tuple[Tensor, Tensor], cache: DynamicCache) -> Tensor | None:
        """The layer's output for x [1, 1, width]; None if the cache is none of ours."""
        layers = cache.layers
        own = layers[self._index] if self._index < len(layers) else None
        if type(own) is not RoomyLayer or not own.is_initialized:
            return None
        keys, values = own.keys, own.values
        assert keys is not None and values is not None
        batch, heads, _, features = keys.shape
        if (batch, heads, features) != (1, self._key_heads, self._features) or keys.shape != values.shape:
            return None
        cosines, sines = position
        if keys.dtype != torch.float32 or cosines.dtype != torch.float32 or cosines.shape[-1] != features:
            return None
        keys, values, tokens = own.grow(keys, values, 1)
        x, cosines, sines = x.contiguous(), cosines.contiguous(), sines.contiguous()
        y = torch.empty_like(x)
        self._step(
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
