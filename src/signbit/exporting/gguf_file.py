"""Writing a .gguf file: packed matrices in the type that holds them exactly, or dequantized to one that is asked for.

Everything that was not packed keeps its stored dtype, but vectors, which llama.cpp wants in float32. Tensors are made
and written one at a time. Fused experts are three-dimensional there as well, with gate and up apart.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
from gguf import GGMLQuantizationType as Type
from gguf import GGUFWriter, LlamaFileType
from numpy.typing import NDArray

from signbit.errors import SignbitError
from signbit.exporting.gguf_blocks import exact_bytes, exact_type
from signbit.exporting.gguf_families import Family, add_metadata, family_of, rope_factors
from signbit.exporting.gguf_tokenizer import add_tokenizer
from signbit.exporting.rounding import Rounding
from signbit.exporting.unpacked import Unpacked
from signbit.progress import Progress
from signbit.safetensors_file import atomic_file

TYPES = ("f32", "f16", "bf16", "q8_0", "q5_1", "q5_0", "q4_1", "q4_0")
_KEPT = {torch.float32: Type.F32, torch.float16: Type.F16, torch.bfloat16: Type.BF16}


@dataclass(frozen=True)
class _Part:
    """Rows of a matrix: a packed module's, or a stored parameter's. half: 0 or 1 of its rows' halves, None for all."""

    name: str
    packed: bool
    half: int | None = None


@dataclass(frozen=True)
class _Entry:
    """One tensor of the file. parts: one, or one for each expert. heads: of rows that change places, 0 if none do."""

    name: str
    parts: tuple[_Part, ...]
    shape: tuple[int, ...]
    kind: Type
    exact: bool
    stacked: bool
    heads: int = 0


def write_file(model: Unpacked, file: Path, kind: str | None, progress: Progress) -> dict[str, Any]:
    """Write ``model``; returns what its matrices became: ``types`` (see Rounding) and ``inexact``, reasons counted."""
    if kind is not None and kind not in TYPES:
        raise SignbitError(f"type {kind!r} is none of {', '.join(TYPES)}")
    if kind is not None and not model.layers:
        raise SignbitError(f"nothing is packed in {model.name}, so type has nothing to do: leave it out")
    plan = _Plan(model, family_of(model.config), None if kind is None else Type[kind.upper()])
    entries = plan.entries()
    factors = rope_factors(model.config)
    rounding = Rounding()
    with atomic_file(file) as temporary:
        writer = GGUFWriter(temporary, plan.family.name)
        try:
            writer.add_name(file.stem)
            writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
            writer.add_file_type(_file_type(entries))
            add_metadata(writer, model.config)
            add_tokenizer(writer, model.tokenizer, model.config.vocab_size)
            if factors is not None:
                writer.add_tensor_info("rope_freqs.weight", factors.shape, factors.dtype, factors.nbytes)
            for entry in entries:
                shape = gguf.quant_shape_to_byte_shape(entry.shape, entry.kind)
                writer.add_tensor_info(entry.name, shape, np.dtype(np.uint8), int(np.prod(shape)), entry.kind)
            writer.write_header_to_file()
            writer.write_kv_data_to_file()
            writer.write_ti_data_to_file()
            if factors is not None:
                writer.write_tensor_data(factors)
            with progress.task("writing tensors", len(entries)) as task:
                for entry in entries:
                    writer.write_tensor_data(_data(model, entry, rounding))
                    task.advance()
        finally:
            writer.close()
    return {"types": rounding.to_dict(), "inexact": plan.inexact}


class _Plan:
    """Which tensors the file has, and in which type each; refuses what would not be what it was."""

    def __init__(self, model: Unpacked, family: Family, kind: Type | None) -> None:
        self.family = family
        self.inexact: dict[str, int] = {}
        self._model, self._kind = model, kind
        self._names = gguf.get_tensor_name_map(family.arch, model.config.num_hidden_layers)

    def entries(self) -> list[_Entry]:
        entries = [entry for name in self._model.names() for entry in self._entries_of(name)]
        if self.inexact and self._kind is None:
            reasons = "; ".join(f"{count}: {reason}" for reason, count in self.inexact.items())
            raise SignbitError(
                f"{sum(self.inexact.values())} matrices of {self._model.name} have no exact type in GGUF ({reasons}). "
                f"To write them dequantized, name a type with --type ({', '.join(TYPES)}; f16 is nearest)"
            )
        return entries

    def _entries_of(self, name: str) -> Iterator[_Entry]:
        owner, _, leaf = name.rpartition(".")
        if leaf == "gate_up_proj":
            for half, projection in enumerate(("gate_proj", "up_proj")):
                yield self._entry(name, f"{owner}.{projection}", ".weight", half)
        elif leaf in ("weight", "bias"):
            yield self._entry(name, owner, f".{leaf}", None)
        else:
            yield self._entry(name, name, ".weight", None)

    def _entry(self, name: str, mapped: str, suffix: str, half: int | None) -> _Entry:
        target = self._names.get_name(mapped)
        if target is None:
            raise SignbitError(f"{name} has no name in llama.cpp's {self.family.name} models: export to dense instead")
        model, owner = self._model, name.rpartition(".")[0]
        experts = sorted((part.index, key) for key, part in model.slices.items() if part.name == name)
        sources = [key for _, key in experts] or [name]
        modules = [key.rpartition(".")[0] if key.endswith(".weight") else "" for key in sources]
        packed = [module for module in modules if module in model.layers]
        parts = tuple(
            _Part(module, True, half) if module in model.layers else _Part(key, False, half)
            for key, module in zip(sources, modules, strict=True)
        )
        if not packed:
            parts = (_Part(name, False, half),)
        shape = list(model.empty[name].shape)
        if half is not None:
            shape[-2] //= 2
        kind, exact = self._choose(name, packed, len(shape), mixed=len(packed) < len(parts), counted=not half)
        block = gguf.GGML_QUANT_SIZES[kind][0]
        if shape[-1] % block:
            raise SignbitError(
                f"{name} has {shape[-1]} columns, and {kind.name.lower()} is made of blocks of {block}: use --type f16"
            )
        heads = self._heads(owner)
        return _Entry(f"{target}{suffix}", parts, tuple(shape), kind, exact, bool(experts), heads)

    def _choose(self, name: str, modules: list[str], ndim: int, mixed: bool, counted: bool) -> tuple[Type, bool]:
        """The type of a tensor, and whether its packed matrices, ``modules``, are written as they are. mixed: others
        are beside them, experts that ``skip`` left out."""
        if ndim == 1:
            return Type.F32, False
        if not modules:
            stored = self._model.stored_dtype(name)
            if stored not in _KEPT:
                raise SignbitError(
                    f"{name} is {stored}, which llama.cpp does not compute with: export to dense instead"
                )
            return _KEPT[stored], False
        found = [exact_type(layout) for module in modules if (layout := self._model.layout(module)) is not None]
        reasons = [reason for reason in found if isinstance(reason, str)]
        if mixed:
            reasons = ["experts that are not packed share the tensor"]
        if not reasons and len(set(found)) == 1:
            kind = found[0]
            assert isinstance(kind, Type)
            return kind, True
        reason = reasons[0] if reasons else "experts of one block are of several types"
        self.inexact[reason] = self.inexact.get(reason, 0) + (len(modules) if counted else 0)
        return self._kind or Type.F32, False

    def _heads(self, owner: str) -> int:
        config = self._model.config
        if not self.family.neighbours:
            return 0
        heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}
        return heads.get(owner.rpartition(".")[2], 0)


def _data(model: Unpacked, entry: _Entry, rounding: Rounding) -> NDArray[np.uint8]:
    """The bytes of one tensor."""
    made = [_rows(model, entry, part, rounding) for part in entry.parts]
    return np.ascontiguousarray(np.stack(made) if entry.stacked and len(entry.parts) > 1 else made[0])


def _rows(model: Unpacked, entry: _Entry, part: _Part, rounding: Rounding) -> NDArray[np.uint8]:
    kind = entry.kind
    layout = model.layout(part.name) if part.packed else None
    exact = model.tensor(part.name).float() if layout is None else layout.dequantize()
    if entry.exact:
        assert layout is not None
        written = exact_bytes(layout, kind)
        read = exact
    else:
        quantized = gguf.quants.quantize(exact.numpy(), kind)
        written = quantized.view(np.uint8)
        read = torch.from_numpy(gguf.quants.dequantize(quantized, kind))
        if not torch.isfinite(read).all():
            raise SignbitError(f"{part.name} does not fit {kind.name.lower()}: use --type bf16 or f32")
    if layout is not None and part.half in (None, 0):
        rounding.count(kind.name.lower(), exact, read)
    written = _half(written, part.half)
    return _rotate(written, entry.heads) if entry.heads else written


def _half(rows: NDArray[np.uint8], half: int | None) -> NDArray[np.uint8]:
    if half is None:
        return rows
    count = rows.shape[-2] // 2
    return rows[..., half * count : (half + 1) * count, :]


def _rotate(rows: NDArray[np.uint8], heads: int) -> NDArray[np.uint8]:
    """Rows i and i + half of each head become neighbours."""
    if rows.ndim == 1:  # a bias: its rows are single floats
        return _rotate(rows.reshape(-1, 4), heads).reshape(-1)
    return rows.reshape(heads, 2, -1, rows.shape[-1]).swapaxes(1, 2).reshape(rows.shape)


def _file_type(entries: list[_Entry]) -> LlamaFileType:
    """The type that most weights have, as llama.cpp names files."""
    weights: dict[Type, int] = {}
    for entry in entries:
        if len(entry.shape) > 1:
            weights[entry.kind] = weights.get(entry.kind, 0) + int(np.prod(entry.shape))
    kind = max(weights, key=lambda key: weights[key])
    return LlamaFileType.ALL_F32 if kind == Type.F32 else LlamaFileType[f"MOSTLY_{kind.name}"]
