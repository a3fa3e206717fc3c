"""What vLLM is told of signbit: which layers are packed, how they are loaded, and how they are multiplied.

Modules are replaced by name, as quantization_config in config.json has them. vLLM joins some (``qkv_proj`` is q_proj,
k_proj and v_proj); it says which, and hands each tensor to the loader of its parameter with the shard that it belongs
to. The multiplication is signbit's own, with its C++ kernels on CPUs and in plain torch elsewhere.
"""

from __future__ import annotations

import re
from typing import Any

import torch
from torch import Tensor, nn
from vllm.model_executor.layers.linear import LinearBase, LinearMethodBase, UnquantizedLinearMethod
from vllm.model_executor.layers.quantization import register_quantization_config
from vllm.model_executor.layers.quantization.base_config import QuantizationConfig, QuantizeMethodBase
from vllm.model_executor.layers.vocab_parallel_embedding import (
    ParallelLMHead,
    UnquantizedEmbeddingMethod,
    VocabParallelEmbedding,
)

from signbit.checkpoint import METHOD_NAME, check_version
from signbit.errors import SignbitError
from signbit.integrations.vllm.shards import Description, Shards
from signbit.layouts import Integers, parse_spec

# What checkpoints call the linears of experts; vLLM's names for those layers differ by architecture.
_OF_EXPERT = re.compile(r"\.experts\.\d+\.")


@register_quantization_config(METHOD_NAME)
class SignbitConfig(QuantizationConfig):
    """quantization_config of a checkpoint. embeddings: the name of the module that looks tokens up."""

    def __init__(self, layers: dict[str, dict[str, Any]], embeddings: str) -> None:
        super().__init__()
        self.layers, self._embeddings = layers, embeddings

    @classmethod
    def get_name(cls) -> str:
        return METHOD_NAME

    @classmethod
    def get_supported_act_dtypes(cls) -> list[torch.dtype]:
        return [torch.float32, torch.bfloat16, torch.float16]

    @classmethod
    def get_min_capability(cls) -> int:
        return 0  # plain torch runs anywhere

    @staticmethod
    def get_config_filenames() -> list[str]:
        return []

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> SignbitConfig:
        check_version(config, "config.json")
        experts = next((name for name in config["layers"] if _OF_EXPERT.search(name)), None)
        if experts is not None:
            raise SignbitError(
                f"{experts} belongs to an expert, and packed experts do not run in vLLM: use signbit serve, or "
                "export to dense"
            )
        return cls(config["layers"], next(iter(config["outer_modules"]), ""))

    def apply_vllm_mapper(self, hf_to_vllm_mapper: Any) -> None:
        self.layers = hf_to_vllm_mapper.apply_dict(self.layers)
        self._embeddings = next(iter(hf_to_vllm_mapper.apply_list([self._embeddings])), "")

    def get_quant_method(self, layer: nn.Module, prefix: str) -> QuantizeMethodBase | None:
        if isinstance(layer, VocabParallelEmbedding) and not isinstance(layer, ParallelLMHead):
            prefix = self._embeddings  # which vLLM's llama keeps to itself
        described = self._described(prefix)
        if isinstance(layer, VocabParallelEmbedding):
            if described:
                return PackedEmbeddingMethod(described)
            return TyingHeadMethod() if isinstance(layer, ParallelLMHead) else UnquantizedEmbeddingMethod()
        if isinstance(layer, LinearBase):
            return PackedLinearMethod(described) if described else UnquantizedLinearMethod()
        return None

    def _described(self, prefix: str) -> list[Description]:
        """The packed matrices of the layer at ``prefix``; none if it is not packed."""
        parent, dot, leaf = prefix.rpartition(".")
        joined = self.packed_modules_mapping.get(leaf, [])
        names = [prefix] if prefix in self.layers or not joined else [f"{parent}{dot}{part}" for part in joined]
        packed = [name for name in names if name in self.layers]
        if packed and len(packed) < len(names):
            left = next(name for name in names if name not in self.layers)
            raise SignbitError(
                f"vLLM joins {packed[0]}, which is packed, and {left}, which is not: quantize both, or skip both"
            )
        return [(name, *parse_spec(name, self.layers[name])) for name in packed]


class _PackedMethod:
    """What linears and embeddings share: loading, and the product."""

    def __init__(self, described: list[Description]) -> None:
        self._described = described

    def _create(self, layer: Any, columns: int, rows: int) -> None:
        if layer.tp_size > 1:
            raise SignbitError("signbit does not split packed matrices in vLLM: use --tensor-parallel-size 1")
        shapes = [spec.shape for _, _, spec in self._described]
        if {shape[1] for shape in shapes} != {columns} or sum(shape[0] for shape in shapes) != rows:
            found = ", ".join(f"{shape[0]}x{shape[1]}" for shape in shapes)
            raise SignbitError(
                f"{self._described[0][0]}: vLLM expects {rows}x{columns} in all, config.json describes {found}"
            )
        layer.packed = Shards(self._described)

    def process_weights_after_loading(self, layer: Any) -> None:
        layer.packed.finish()

    def apply(self, layer: Any, x: Tensor, bias: Tensor | None = None) -> Tensor:
        y: Tensor = layer.packed(x)
        return y if bias is None else y + bias


class PackedLinearMethod(_PackedMethod, LinearMethodBase):
    def create_weights(
        self,
        layer: nn.Module,
        input_size_per_partition: int,
        output_partition_sizes: list[int],
        input_size: int,
        output_size: int,
        params_dtype: torch.dtype,
        **more: Any,
    ) -> None:
        self._create(layer, input_size, output_size)


class PackedEmbeddingMethod(_PackedMethod, QuantizeMethodBase):
    """Embeddings and heads. vLLM pads vocabularies; rows that are only padding are never looked up, nor are their
    logits looked at, so there are none."""

    def create_weights(
        self,
        layer: Any,
        input_size_per_partition: int,
        output_partition_sizes: list[int],
        input_size: int,
        output_size: int,
        params_dtype: torch.dtype,
        **more: Any,
    ) -> None:
        self._dtype = params_dtype
        self._create(layer, input_size, layer.org_vocab_size)

    def embedding(self, layer: Any, ids: Tensor) -> Tensor:
        rows: Integers = layer.packed.layouts[0]
        return rows.dequantize(ids).to(self._dtype)


class TyingHeadMethod(UnquantizedEmbeddingMethod):
    """A head that is not packed, but may be tied to embeddings that are."""

    def tie_weights(self, layer: Any, embed_tokens: Any) -> Any:
        if not isinstance(embed_tokens.quant_method, PackedEmbeddingMethod):
            return super().tie_weights(layer, embed_tokens)
        # The embeddings themselves: they know their rows, and are loaded and finished once.
        return embed_tokens
