"""The packed matrices of one layer of another program, which joins several linears into one.

vLLM multiplies by q, k and v, or gate and up, at once. Each of them was packed for itself, with its own scales, maybe
in a layout of its own; so they stay apart, and their products are put side by side.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from signbit import kernels
from signbit.errors import SignbitError
from signbit.layouts import Layout, LayoutSpec
from signbit.modules import complete

Description = tuple[str, type[Layout], LayoutSpec]
_ATTENTION = {"q": 0, "k": 1, "v": 2}


class Shards(nn.Module):
    """Named ``packed`` in the layer, as in a checkpoint; its parameters have the names of the tensors there.

    Those parameters are empty. What a loader brings for them, each shard's, is kept until all is there; then
    :meth:`finish` makes layouts of it.
    """

    def __init__(self, described: list[Description]) -> None:
        """described: module name, layout and spec of each shard."""
        super().__init__()
        self._described = described
        self._loaded: dict[tuple[int, str], Tensor] = {}
        self.layouts = nn.ModuleList()
        for key, tensor in {key: t for _, _, spec in described for key, t in spec.tensors().items()}.items():
            parameter = nn.Parameter(torch.empty(0, dtype=tensor.dtype), requires_grad=False)
            parameter.weight_loader = self._loader(key)  # type: ignore[attr-defined]
            self.register_parameter(key, parameter)

    def _loader(self, key: str) -> Any:
        def load(parameter: Tensor, loaded: Tensor, shard: str | int | None = None) -> None:
            index = _ATTENTION.get(shard, -1) if isinstance(shard, str) else shard or 0
            if not 0 <= index < len(self._described):
                raise SignbitError(f"{self._described[0][0]}: {shard!r} is none of its {len(self._described)} shards")
            # A copy, so that the mapping of the file is dropped.
            self._loaded[index, key] = loaded.to(parameter.device, copy=True)

        return load

    def finish(self) -> None:
        """All tensors are there; SignbitError naming what is not, or does not fit."""
        for key in list(self._parameters):
            del self._parameters[key]
        for index, (name, kind, spec) in enumerate(self._described):
            tensors = {}
            for key, expected in spec.tensors().items():
                found = self._loaded.pop((index, key), None)
                if found is None:
                    raise SignbitError(f"the checkpoint lacks the tensor {name}.packed.{key}")
                if found.dtype != expected.dtype or tuple(found.shape) != expected.shape:
                    raise SignbitError(
                        f"{name}.packed.{key} is {found.dtype} {list(found.shape)}, expected {expected.dtype} "
                        f"{list(expected.shape)}"
                    )
                tensors[key] = found
            layout = kind(spec, tensors)
            layout.check(name)
            self.layouts.append(layout)

    def forward(self, x: Tensor) -> Tensor:
        products = [_product(x, layout) for layout in self.layouts]  # type: ignore[arg-type]
        return products[0] if len(products) == 1 else torch.cat(products, -1)


def _product(x: Tensor, layout: Layout) -> Tensor:
    correction = layout.get_buffer("bias") if layout.spec.bias else None
    return complete(kernels.matmul(x, layout), layout.spec.norm, correction)
