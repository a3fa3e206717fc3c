"""What every layout is: a spec from which all tensor shapes follow, the tensors, and the matrix they stand for.

A layout is how a compressed matrix is stored and multiplied. It never knows which paper decided on it. Its *spec* is
small JSON kept in the checkpoint's config.json, and is all that is needed to allocate the tensors before their data
arrives; so a checkpoint loads without building a dense weight, and a tensor that does not fit is refused by name.
"""

from __future__ import annotations

import copy
import dataclasses
import json
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from signbit.errors import SignbitError
from signbit.finite import all_finite

SCALE_DTYPES = {"float16": torch.float16, "bfloat16": torch.bfloat16}


@dataclass(frozen=True)
class TensorSpec:
    """One stored tensor: its shape and dtype, and the heading under which ``inspect`` counts its bytes."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    item: str

    def __post_init__(self) -> None:
        if not all(is_count(length) for length in self.shape):
            raise ValueError(f"{list(self.shape)} is not the shape of a tensor")

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


@dataclass(frozen=True)
class LayoutSpec:
    """Base of every layout's spec.

    shape: (out features, in features) of the matrix that is replaced. bias: whether a bias correction is kept with it,
    a bfloat16 vector [out] that is added to the product and counts as part of the compressed matrix. norm: whether the
    product is normalised, each token's outputs to mean 0 and variance 1, before anything is added (OneBit's LayerNorm).
    """

    shape: tuple[int, int]
    bias: bool = field(default=False, kw_only=True)
    norm: bool = field(default=False, kw_only=True)

    def __post_init__(self) -> None:
        if len(self.shape) != 2 or not all(is_count(length) for length in self.shape):
            raise ValueError(f"{list(self.shape)} is not the shape of a matrix")
        for own in dataclasses.fields(self):
            value = getattr(self, own.name)
            if own.type == "bool" and not isinstance(value, bool):
                raise ValueError(f"{own.name} {value!r} is neither true nor false")
            if own.type == "int" and not is_count(value):
                raise ValueError(f"{own.name} {value!r} is not a number of anything")

    def matrix_tensors(self) -> dict[str, TensorSpec]:
        """Name -> tensor that the matrix is stored in."""
        raise NotImplementedError

    def tensors(self) -> dict[str, TensorSpec]:
        """Name -> stored tensor. The order is the order of the layout's buffers."""
        bias = {"bias": TensorSpec(self.shape[:1], torch.bfloat16, "bias")} if self.bias else {}
        return self.matrix_tensors() | bias

    def to_dict(self) -> dict[str, Any]:
        fields = {**dataclasses.asdict(self), "shape": list(self.shape)}
        # Seldom there, and left out where they are not.
        return {key: value for key, value in fields.items() if value or key not in ("bias", "norm")}

    @classmethod
    def from_dict(cls, fields: dict[str, Any]) -> LayoutSpec:
        """The inverse of :meth:`to_dict`; TypeError, KeyError or ValueError for what cannot be one."""
        spec = cls(**{**fields, "shape": tuple(fields["shape"])})
        spec.tensors()
        return spec


class Layout(nn.Module):
    """A compressed matrix ``[out, in]``: the buffers that its spec names, and nothing else.

    Subclasses set ``kind`` (the name in config.json) and ``Spec``, and define :meth:`dequantize` and
    :attr:`nominal_bits`.
    """

    kind: ClassVar[str]
    Spec: ClassVar[type[LayoutSpec]]
    of_columns: ClassVar[frozenset[str]] = frozenset()  # tensors that all rows share
    prepared: Any = None  # what a kernel knows of these tensors; never stored or copied

    def __init__(self, spec: LayoutSpec, tensors: dict[str, Tensor] | None = None, device: Any = None) -> None:
        """Hold ``tensors``, or uninitialised ones on ``device`` when they are still to be loaded."""
        super().__init__()
        self._describe(spec)
        for name, expected in spec.tensors().items():
            if tensors is None:
                tensor = torch.empty(expected.shape, dtype=expected.dtype, device=device)
            else:
                tensor = tensors[name].contiguous()
                if tuple(tensor.shape) != expected.shape or tensor.dtype != expected.dtype:
                    raise ValueError(
                        f"{self.kind}.{name}: expected {expected.dtype} {expected.shape}, "
                        f"got {tensor.dtype} {tuple(tensor.shape)}"
                    )
                if not all_finite(tensor):
                    half = tensor.dtype == torch.float16
                    advice = "use scale_dtype=bfloat16" if half else "the weights are too large"
                    raise SignbitError(f"{name} do not fit {tensor.dtype}: {advice}")
            self.register_buffer(name, tensor)

    @classmethod
    def around(cls, spec: LayoutSpec, tensors: Sequence[Tensor]) -> Layout:
        """The layout of tensors in the order of ``spec``, whose content is not looked at; ValueError if they differ."""
        layout = cls.__new__(cls)
        nn.Module.__init__(layout)
        layout._describe(spec)
        for (name, expected), tensor in zip(spec.tensors().items(), tensors, strict=True):
            if tensor.shape != expected.shape or tensor.dtype != expected.dtype or not tensor.is_contiguous():
                raise ValueError(f"{cls.kind}.{name}: expected {expected.dtype} {expected.shape}, contiguous")
            layout._buffers[name] = tensor
        return layout

    def _describe(self, spec: LayoutSpec) -> None:
        self.spec = spec
        # The JSON that config.json keeps, as operators take it.
        self.description = json.dumps({"layout": self.kind, **spec.to_dict()})

    def __getstate__(self) -> dict[str, Any]:
        return {key: value for key, value in self.__dict__.items() if key != "prepared"}

    @property
    def shape(self) -> tuple[int, int]:
        return self.spec.shape

    @property
    def device(self) -> torch.device:
        return next(self.buffers()).device

    @property
    def nominal_bits(self) -> float:
        """Bits per weight as the papers count them: signs and salient values, no masks, no scales."""
        raise NotImplementedError

    def with_bias(self, bias: Tensor) -> Layout:
        """This layout with a bias correction [out]."""
        if self.spec.norm:
            raise SignbitError("bias_correction is of products, which norm changes: set one of the two to false")
        tensors = dict(self.named_buffers()) | {"bias": bias.to(torch.bfloat16)}
        return type(self)(dataclasses.replace(self.spec, bias=True), tensors)

    def with_norm(self) -> Layout:
        """This layout with its products normalised."""
        return type(self)(dataclasses.replace(self.spec, norm=True), dict(self.named_buffers()))

    def dequantize(self, rows: slice = slice(None)) -> Tensor:
        """The matrix (or some of its rows) in float32, exactly as the method decided on it."""
        raise NotImplementedError

    def with_rows(self, rows: slice, tensors: dict[str, Tensor]) -> Layout:
        """Some of the rows, to be dequantized, with these ``tensors`` of those rows in place of what is stored.

        They may be float32 and have gradients, sign planes as +-1: so a training sees the very matrix that is stored.
        """
        found = copy.copy(self)
        count = len(range(self.spec.shape[0])[rows])
        found.spec = dataclasses.replace(self.spec, shape=(count, self.spec.shape[1]))
        found._buffers = {
            name: tensors.get(name, stored if stored is None or name in self.of_columns else stored[rows])
            for name, stored in self._buffers.items()
        }
        return found

    def chains(self) -> list[tuple[Layout, ...]]:
        """Layouts whose products, one after the other along each chain and summed over chains, are this one's.

        Most are multiplied as they are.
        """
        return [(self,)]

    def check(self, name: str) -> None:
        """SignbitError, with the module's ``name``, if the content of the tensors contradicts the spec."""

    def items(self) -> dict[str, int]:
        """Bytes by heading; their sum is what the matrix takes in the checkpoint."""
        return count_items(self.spec)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Layout:
        # model.half() and the like change what a model computes in, not what a checkpoint stores: tensors of a layout
        # follow to the new device and keep their dtype.
        def keep_dtype(tensor: Tensor) -> Tensor:
            moved = fn(tensor)
            return moved if moved.dtype == tensor.dtype else tensor.to(moved.device)

        self.prepared = None
        return super()._apply(keep_dtype, recurse)

    def _load_from_state_dict(self, *args: Any) -> None:
        self.prepared = None
        super()._load_from_state_dict(*args)

    def extra_repr(self) -> str:
        return ", ".join(f"{key}={value}" for key, value in self.spec.to_dict().items())


def count_items(spec: LayoutSpec) -> dict[str, int]:
    """Bytes of a matrix with this spec, by heading."""
    items: dict[str, int] = {}
    for tensor in spec.tensors().values():
        items[tensor.item] = items.get(tensor.item, 0) + tensor.nbytes
    return items


def is_count(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0


def scale_dtype(name: str) -> torch.dtype:
    """The dtype that scales are stored in; ValueError for a name that is not one."""
    if name not in SCALE_DTYPES:
        raise ValueError(f"scale_dtype {name!r} is none of {', '.join(SCALE_DTYPES)}")
    return SCALE_DTYPES[name]


def group_count(columns: int, group_size: int) -> int:
    """Groups of ``group_size`` columns in a row; 0 stands for one group, the whole row. The last may be narrower."""
    if group_size >= 2**31:
        raise ValueError(f"group_size {group_size!r} is not a number of columns")
    return 1 if group_size == 0 else math.ceil(columns / group_size)


def spread(coefficients: Tensor, group_size: int, columns: int) -> Tensor:
    """Coefficients of groups ``[..., groups]`` to those of columns ``[..., columns]``, in float32."""
    size = group_size or columns
    return coefficients.float().unsqueeze(-1).expand(*coefficients.shape, size).flatten(-2)[..., :columns]


def select(second: Tensor, pair: tuple[Tensor, Tensor]) -> Tensor:
    """``pair[1]`` where ``second`` is 1.0 and ``pair[0]`` where it is 0.0.

    Products with 0 and 1 are exact, and many times faster than torch.where.
    """
    return pair[0] * (1 - second) + pair[1] * second
