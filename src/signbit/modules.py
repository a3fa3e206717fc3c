"""The modules that stand where dense ones stood: each holds one layout under the name ``packed``."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from signbit import kernels
from signbit.errors import SignbitError
from signbit.layouts import Integers, Layout, LayoutSpec


class QuantizedLinear(nn.Module):
    """``y = x W^T + b`` with a packed W. Checkpoint names: ``<module>.packed.<tensor>`` and ``<module>.bias``."""

    bias: nn.Parameter | None
    int8 = False  # see set_activations

    def __init__(self, packed: Layout, bias: Tensor | None = None) -> None:
        super().__init__()
        self.packed = packed
        self.out_features, self.in_features = packed.shape
        self.register_parameter("bias", None if bias is None else nn.Parameter(bias, requires_grad=False))

    @classmethod
    def empty(
        cls, layout: type[Layout], spec: LayoutSpec, bias: bool, dtype: torch.dtype | None, device: Any
    ) -> QuantizedLinear:
        """A module whose tensors are still to be loaded."""
        empty_bias = torch.empty(spec.shape[0], dtype=dtype, device=device) if bias else None
        return cls(layout(spec, device=device), empty_bias)

    def forward(self, x: Tensor) -> Tensor:
        # Looked up where nn.Module keeps them: on its way there __getattr__ takes a microsecond for each.
        packed: Layout = self._modules["packed"]  # type: ignore[assignment]
        spec = packed.spec
        correction = packed._buffers["bias"] if spec.bias else None
        return complete(kernels.matmul(x, packed, self.int8), spec.norm, correction, self._parameters["bias"])


def complete(y: Tensor, norm: bool, *biases: Tensor | None) -> Tensor:
    """What follows the product of a linear: normalised outputs, if they are, then whatever biases there are."""
    if norm:
        y = F.layer_norm(y, y.shape[-1:])
    for bias in biases:
        if bias is not None:
            y = y + bias.to(y.dtype)
    return y


class QuantizedEmbedding(nn.Module):
    """An embedding whose rows are stored as integers.

    dtype: of the vectors it returns. scale: what the original multiplied its vectors with (Gemma's).
    """

    like: Tensor

    def __init__(self, packed: Integers, dtype: torch.dtype, scale: float | None = None) -> None:
        super().__init__()
        self.packed = packed
        # Empty; it has the dtype that the model is cast to.
        self.register_buffer("like", torch.empty(0, dtype=dtype), persistent=False)
        self.scale = scale
        self.num_embeddings, self.embedding_dim = packed.shape

    def forward(self, ids: Tensor) -> Tensor:
        vectors = self.packed.dequantize(ids).to(self.like.dtype)
        return vectors if self.scale is None else vectors * torch.tensor(self.scale, dtype=vectors.dtype)


def quantized_embedding(original: nn.Module, packed: Integers, dtype: torch.dtype) -> QuantizedEmbedding:
    """The stand-in for ``original``; SignbitError if that does more than to look up and scale."""
    scale = getattr(original, "scalar_embed_scale", getattr(original, "embed_scale", None))
    if type(original).forward is not nn.Embedding.forward and scale is None:
        raise SignbitError(
            f"embeddings: {type(original).__name__} does more than look rows up and cannot be quantized: use keep"
        )
    return QuantizedEmbedding(packed, dtype, None if scale is None else float(scale))


class TiedHead(nn.Module):
    """The output head of a model that ties it to its (packed) embeddings: it multiplies by their rows.

    It has no tensors of its own, so none are stored or loaded twice.
    """

    bias: nn.Parameter | None
    int8 = False

    def __init__(self, embeddings: QuantizedEmbedding, bias: nn.Parameter | None) -> None:
        super().__init__()
        # In a tuple, so that the embeddings do not become a submodule and their tensors do not get a second name.
        self._embeddings = (embeddings,)
        self.register_parameter("bias", bias)

    @property
    def packed(self) -> Integers:
        return self._embeddings[0].packed

    def forward(self, x: Tensor) -> Tensor:
        packed = self.packed
        y = kernels.matmul(x.to(packed.device), packed, self.int8).to(x.device)
        return y if self.bias is None else y + self.bias.to(y.dtype)


ACTIVATIONS = ("exact", "int8")


def set_activations(model: nn.Module, activations: str) -> None:
    """How the packed matrices of ``model`` take their inputs: "exact", or "int8", rounded to 8 bits where a kernel can
    (128 columns at a time; faster, and off unless asked for)."""
    if activations not in ACTIVATIONS:
        raise SignbitError(f"activations {activations!r} is none of {', '.join(ACTIVATIONS)}")
    for module in model.modules():
        if isinstance(module, QuantizedLinear | TiedHead):
            module.int8 = activations == "int8"
