"""One token through a decoder layer, in one call.

A layer of the Llama kind, asked for one token, computes seven products and next to nothing between them. In torch that
little is some 40 operators and 15 modules, which take a third of the time of a layer of packed weights in the shape of
Llama 2 7B, and most of it in small models. Here it is one call of C++ (kernels/cpu/decoder.h), which gives what the
layer gives, but for the rounding of sums.

:func:`attach` gives the layers that are known another ``forward``, which takes that way when it can: one token of one
sequence, on a CPU, in float32, without gradients, without a mask, and with a cache that says where the token goes
(``grow``, cache.py). Anything else goes the layer's own way: prompts, batches, masks, hooks on the modules inside,
modules of other classes, torch.compile.

C++ is given addresses. That they are still those of the layer's tensors is seen by looking for each token at which
objects there are: what was replaced is another object, which the old one, being kept, cannot be mistaken for.
"""

from __future__ import annotations

import sys
import weakref
from itertools import chain
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn.modules.module import _has_any_global_hook
from transformers import DynamicCache, PreTrainedModel
from transformers.activations import ACT2FN

from signbit.kernels import cpu, is_traced
from signbit.modules import QuantizedLinear

# Families whose layers have one and the same structure; there may be norms of queries and keys, and biases.
_KNOWN = {
    f"transformers.models.{family}.modeling_{family}.{name}DecoderLayer"
    for family, name in (("llama", "Llama"), ("mistral", "Mistral"), ("qwen2", "Qwen2"), ("qwen3", "Qwen3"))
}
_SILU = (nn.SiLU, type(ACT2FN["silu"]))
# transformers puts hooks on attention when outputs are captured for the first time, and leaves them there.
_CAPTURING = "transformers.utils.output_capturing"


def attach(model: PreTrainedModel) -> None:
    """Let the layers of ``model`` that are known, and a dense head, take one token in one call.

    Whatever has a forward of its own already, as accelerate gives to what it offloads, keeps it.
    """
    for layer in model.modules():
        if f"{type(layer).__module__}.{type(layer).__qualname__}" in _KNOWN and "forward" not in layer.__dict__:
            layer.forward = LayerForward(layer)
    head = model.get_output_embeddings()
    if type(head) is nn.Linear and "forward" not in head.__dict__:
        head.forward = HeadForward(head)  # type: ignore[assignment, method-assign]


class _Forward:
    """A ``forward`` of one module, which it does not keep alive, and whose copies' is their own."""

    def __init__(self, module: nn.Module) -> None:
        self._module = weakref.ref(module)

    @property
    def module(self) -> Any:
        return self._module()

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self.module,)


class HeadForward(_Forward):
    """Rows of a dense head are read as fast as memory gives them, which torch's product for one token does not do."""

    def __call__(self, hidden_states: Tensor) -> Tensor:
        head = self.module
        weight, bias = head._parameters.get("weight"), head._parameters.get("bias")
        if (
            weight is not None
            and bias is None
            and _is_one_token(hidden_states, weight.shape[-1])
            and _is_plain(weight)
            and weight.numel()
        ):
            return cpu.dense_product(hidden_states, weight)
        return nn.Linear.forward(head, hidden_states)


def _is_one_token(x: Tensor, width: int) -> bool:
    return (
        not is_traced(x)
        and x.shape[:-1].numel() == 1
        and x.shape[-1] == width
        and x.is_cpu
        and x.dtype == torch.float32
        and not torch.is_grad_enabled()
        and not x.is_neg()
        and cpu.instruction_set() is not None
    )


def _is_plain(x: Tensor) -> bool:
    return x.is_cpu and x.dtype == torch.float32 and x.is_contiguous()


class LayerForward(_Forward):
    """The ``forward`` of a decoder layer."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__(layer)
        self._made: tuple[list[Any], _Decoder | None] | None = None

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
        layer = self.module
        if (
            attention_mask is None
            and position_embeddings is not None
            and isinstance(past_key_values, DynamicCache)
            and type(past_key_values).update is DynamicCache.update
            and not layer.training
            and not others.get("output_attentions")
            and (decoder := self._decoder(layer)) is not None
            and _is_one_token(hidden_states, decoder.width)
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

    def _decoder(self, layer: Any) -> _Decoder | None:
        """The layer as C++ knows it, as it is now; None if that cannot be."""
        modules = layer._modules
        held = modules, modules["self_attn"]._modules, modules["mlp"]._modules
        inside = [*chain.from_iterable(map(dict.values, held))]
        if _are_watched(inside):
            return None
        state = _state_of(layer, inside)
        if self._made is None or self._made[0] != state:
            possible = _is_known(layer) and _has_kernels(inside)
            # Looked at again, since kernels may have been prepared.
            self._made = _state_of(layer, inside), _Decoder(layer) if possible else None
        return self._made[1]


def _are_watched(inside: list[nn.Module]) -> bool:
    """Whether anybody has put hooks on modules that would not run, or another forward."""
    if _has_any_global_hook() or any("forward" in module.__dict__ for module in inside):
        return True
    hooks = [
        hook for m in inside for kind in (m._forward_hooks, m._forward_pre_hooks) if kind for hook in kind.values()
    ]
    return bool(hooks) and (_is_capturing() or any(hook.__module__ != _CAPTURING for hook in hooks))


def _is_capturing() -> bool:
    """Whether transformers is capturing outputs right now, as far as can be told."""
    collector = getattr(sys.modules.get(_CAPTURING), "_active_collector", None)
    return collector is None or bool(collector.get())


def _state_of(layer: Any, inside: list[Any]) -> list[Any]:
    """What a :class:`_Decoder` is made of: it is good as long as this is the same."""
    attention = layer._modules["self_attn"].__dict__
    linears = [module for module in inside if type(module) is QuantizedLinear]
    packed: list[Any] = [linear._modules["packed"] for linear in linears]
    return [
        attention.get("layer_idx"),
        attention.get("head_dim"),
        attention.get("scaling"),
        attention["config"]._attn_implementation,
        *map(id, inside),
        *[module.__dict__.get("variance_epsilon") for module in inside],
        *[linear.int8 for linear in linears],
        *map(id, packed),
        *[id(one.__dict__.get("prepared")) for one in packed],
        *map(id, chain.from_iterable([one._buffers.values() for one in packed])),
        # A cast of a model puts other memory into the same parameters.
        *[p.data_ptr() for module in inside for p in module._parameters.values() if p is not None],
    ]


def _is_known(layer: Any) -> bool:
    """Whether everything inside is of the classes, and has the widths, that such a layer is made with."""
    attention, mlp = layer.self_attn, layer.mlp
    prefix = type(layer).__qualname__.removesuffix("DecoderLayer")
    norms = [layer.input_layernorm, layer.post_attention_layernorm]
    norms += [getattr(attention, name) for name in ("q_norm", "k_norm") if hasattr(attention, name)]
    classes = [(attention, "Attention"), (mlp, "MLP"), *((norm, "RMSNorm") for norm in norms)]
    if any(
        (type(m).__module__, type(m).__qualname__) != (type(layer).__module__, prefix + name) for m, name in classes
    ):
        return False
    if any(type(one) not in (nn.Linear, QuantizedLinear) for one in _linears_of(layer)):
        return False
    width, inner, features = len(layer.input_layernorm.weight), mlp.gate_proj.out_features, attention.head_dim
    queries, keys = attention.q_proj.out_features, attention.k_proj.out_features
    shapes = [(one.out_features, one.in_features) for one in _linears_of(layer)]
    wanted = [(queries, width), (keys, width), (keys, width), (width, queries)]
    wanted += [(inner, width), (inner, width), (width, inner)]
    return (
        shapes == wanted
        and [len(norm.weight) for norm in norms] == [width, width, features, features][: len(norms)]
        and queries % keys == keys % features == features % 2 == 0
        and type(mlp.act_fn) in _SILU
        and attention.config._attn_implementation == "sdpa"
    )


def _has_kernels(inside: list[nn.Module]) -> bool:
    parameters = [p for module in inside for p in module._parameters.values() if p is not None]
    packed = [cast(Any, module).packed for module in inside if type(module) is QuantizedLinear]
    return all(map(_is_plain, parameters)) and all(map(cpu.has_kernel, packed))


def _linears_of(layer: Any) -> list[Any]:
    attention, mlp = layer.self_attn, layer.mlp
    of_attention = [attention.q_proj, attention.k_proj, attention.v_proj, attention.o_proj]
    return [*of_attention, mlp.gate_proj, mlp.up_proj, mlp.down_proj]


class _Decoder:
    """A layer as C++ knows it: addresses of the tensors that it had when this was made."""

    def __init__(self, layer: Any) -> None:
        attention = layer.self_attn
        self.width = len(layer.input_layernorm.weight)
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
        if type(linear) is nn.Linear:
            matrix = cpu.dense(linear.weight)
            self._kept += [matrix, linear.weight.data, biases]
            return cpu.native.Linear([[matrix]], False, False, [cpu.coefficients(bias) for bias in biases])
        packed = linear.packed
        chains = cpu.chains_of(packed)
        assert chains is not None
        if packed.spec.bias:
            biases.insert(0, packed.get_buffer("bias").unsqueeze(1))
        self._kept += [packed, packed.prepared, [*packed.buffers()], biases]
        matrices = [[matrix for matrix, _ in chain] for chain in chains]
        return cpu.native.Linear(matrices, linear.int8, packed.spec.norm, [cpu.coefficients(bias) for bias in biases])

    def step(self, x: Tensor, position: tuple[Tensor, Tensor], cache: DynamicCache) -> Tensor | None:
        """The layer's output for x [1, 1, width]; None if the cache's layers do not say where a token goes."""
        layers = cache.layers
        own: Any = layers[self._index] if self._index < len(layers) else None
        # A class that has inherited it may have another way of taking tokens in.
        if "grow" not in type(own).__dict__ or not own.is_initialized:
            return None
        keys, values = own.keys, own.values
        shape, (cosines, sines) = keys.shape, position
        if len(shape) != 4 or (shape[0], shape[1], shape[3]) != (1, self._key_heads, self._features):
            return None
        if values.shape != shape or cosines.shape[-1] != self._features or cosines.shape != sines.shape:
            return None
        if any(one.dtype != torch.float32 or not one.is_cpu for one in (keys, values, cosines, sines)):
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
