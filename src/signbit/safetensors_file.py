"""safetensors files as files: their headers, checked, and writing one without holding its tensors.

Format: 8 bytes little-endian header length, a JSON header {name: {dtype, shape, data_offsets}}, then the data.
"""

from __future__ import annotations

import glob
import json
import math
import os
import secrets
import struct
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor

from signbit.errors import SignbitError

# In the order of the safetensors library, which writes the last of these first.
DTYPES = {
    "BOOL": torch.bool,
    "U8": torch.uint8,
    "I8": torch.int8,
    "F8_E5M2": torch.float8_e5m2,
    "F8_E4M3": torch.float8_e4m3fn,
    "I16": torch.int16,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I32": torch.int32,
    "F32": torch.float32,
    "F64": torch.float64,
    "I64": torch.int64,
}
CODES = {dtype: code for code, dtype in DTYPES.items()}
INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
# Headers are padded so that data begins with a cache line. Rows of most packed matrices are then lines too, and
# kernels, which read them where they are mapped, read one line for 64 bytes, not two. (The format asks for 8.)
DATA_ALIGNMENT = 64
LENGTH_BYTES = 8  # of what a file begins with

# The limit that the safetensors library itself puts on headers.
_MAX_HEADER = 100_000_000


@dataclass(frozen=True)
class StoredTensor:
    """A tensor in a file: where its bytes are and what they mean."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    file: Path
    offset: int
    nbytes: int


def read_header(file: Path, stream: BinaryIO | None = None) -> tuple[dict[str, StoredTensor], dict[str, str]]:
    """Tensors and metadata of one file; SignbitError naming the file if it is truncated or not safetensors.

    stream: the file if it is open already, for one that may be replaced at any time.
    """
    try:
        with file.open("rb") if stream is None else nullcontext(stream) as opened:
            size = os.fstat(opened.fileno()).st_size
            opened.seek(0)
            length = struct.unpack("<Q", opened.read(8))[0]
            if length > min(size - 8, _MAX_HEADER):
                raise SignbitError(f"{file} is truncated or not a safetensors file")
            header = json.loads(opened.read(length))
        if not isinstance(header, dict):
            raise SignbitError(f"{file} is not a safetensors file: its header is no mapping")
        metadata = header.pop("__metadata__", {})
        tensors = {name: _parse(name, entry, file, 8 + length, size) for name, entry in header.items()}
    except FileNotFoundError as error:
        raise SignbitError(f"{file} is missing") from error
    except OSError as error:
        raise SignbitError(f"{file} cannot be read: {error.strerror}") from error
    except (struct.error, ValueError, AttributeError, UnicodeDecodeError) as error:
        raise SignbitError(f"{file} is not a safetensors file: {error}") from error
    return tensors, metadata


def _parse(name: str, entry: Any, file: Path, start: int, size: int) -> StoredTensor:
    try:
        code, shape, (begin, end) = entry["dtype"], tuple(entry["shape"]), entry["data_offsets"]
        if not all(isinstance(number, int) for number in (*shape, begin, end)):
            raise TypeError
    except (KeyError, TypeError, ValueError) as error:
        raise SignbitError(f"{file}: the entry of {name} is damaged") from error
    if code not in CODES.values():
        raise SignbitError(f"{file}: {name} has dtype {code}, which signbit does not read")
    dtype = DTYPES[code]
    if min((begin, *shape)) < 0 or end - begin != math.prod(shape) * dtype.itemsize:
        raise SignbitError(f"{file}: {name} has {end - begin} bytes, which do not make {dtype} {list(shape)}")
    if start + end > size:
        raise SignbitError(f"{file} is truncated: {name} should end at byte {start + end}, the file has {size}")
    return StoredTensor(name, dtype, shape, file, start + begin, end - begin)


def files_of(directory: Path) -> list[Path]:
    """The safetensors files of a model directory, whether one or sharded."""
    if (directory / INDEX).is_file():
        try:
            weight_map = json.loads((directory / INDEX).read_text(encoding="utf-8"))["weight_map"]
            files = sorted({directory / str(name) for name in weight_map.values()})
        except (ValueError, KeyError, AttributeError, TypeError) as error:
            raise SignbitError(f"{directory / INDEX} is not a valid shard index") from error
        for file in files:
            if file.parent != directory or not file.is_file():
                raise SignbitError(f"{directory} lacks the shard {file.name}: download the model again")
        return files
    if (directory / SINGLE).is_file():
        return [directory / SINGLE]
    if any(directory.glob("*.bin")):
        raise SignbitError(f"{directory} has pickled weights only: convert them to safetensors first")
    raise SignbitError(f"{directory} has no weights: expected {SINGLE} or {INDEX}")


def check_directory(directory: Path) -> list[Path]:
    """The safetensors files of a model directory, each with a sound header."""
    files = files_of(directory)
    for file in files:
        read_header(file)
    return files


def read_directory(directory: Path) -> dict[str, StoredTensor]:
    """All tensors of a model directory."""
    tensors: dict[str, StoredTensor] = {}
    for file in files_of(directory):
        tensors |= read_header(file)[0]
    return tensors


@contextmanager
def atomic_file(file: Path) -> Iterator[Path]:
    """A path to write to; on leaving, ``file`` is replaced by it, whole and on disk, or untouched after an error."""
    # By chance, too: threads share a number, and machines that share a directory may.
    temporary = file.with_name(f".{file.name}.{os.getpid()}-{secrets.token_hex(4)}.tmp")
    try:
        yield temporary
        with temporary.open("rb+") as stream:
            os.fsync(stream.fileno())
        temporary.replace(file)
    finally:
        temporary.unlink(missing_ok=True)


def remove_temporaries(file: Path) -> None:
    """Remove what :func:`atomic_file` has left of ``file`` where a process was killed. Nobody may be writing it."""
    for left in file.parent.glob(f".{glob.escape(file.name)}.*.tmp"):
        left.unlink()


def write_text(file: Path, text: str) -> None:
    with atomic_file(file) as temporary:
        temporary.write_text(text, encoding="utf-8")


def copy_tensors(tensors: Iterable[StoredTensor], file: Path) -> None:
    """Write a new file from tensors of other files, in the order that the safetensors library would give them."""
    given = {tensor.name: tensor for tensor in tensors}
    described = {name: (tensor.dtype, tensor.shape) for name, tensor in given.items()}
    with atomic_file(file) as temporary, temporary.open("wb") as out:
        for name in _write_header(described, {"format": "pt"}, out):
            _copy(given[name], out)


def write_tensors(
    described: Mapping[str, tuple[torch.dtype, tuple[int, ...]]],
    supply: Callable[[str], Tensor],
    metadata: dict[str, str],
    file: Path,
) -> None:
    """Write a new file of tensors that are made one at a time: ``supply`` is asked for each, in :func:`file_order`."""
    with atomic_file(file) as temporary, temporary.open("wb") as out:
        for name in _write_header(described, metadata, out):
            tensor = supply(name).detach().cpu().contiguous()
            if (tensor.dtype, tuple(tensor.shape)) != described[name]:
                raise ValueError(f"{name} is {tensor.dtype} {list(tensor.shape)}, described as {described[name]}")
            out.write(tensor.reshape(-1).view(torch.uint8).numpy().data)


def read_tensor(stored: StoredTensor, stream: BinaryIO | None = None) -> Tensor:
    """The tensor itself, in memory of its own. stream: the file that its header was read from, if it is open."""
    with stored.file.open("rb") if stream is None else nullcontext(stream) as opened:
        opened.seek(stored.offset)
        data = bytearray(opened.read(stored.nbytes))
    if len(data) < stored.nbytes:
        raise SignbitError(f"{stored.file} became shorter while it was read")
    if not data:
        return torch.empty(stored.shape, dtype=stored.dtype)
    return torch.frombuffer(data, dtype=stored.dtype).view(stored.shape)


def file_order(described: Mapping[str, tuple[torch.dtype, tuple[int, ...]]]) -> list[str]:
    """Names in the order in which their tensors lie in a file: the safetensors library's."""
    rank = list(DTYPES.values()).index
    return sorted(described, key=lambda name: (-rank(described[name][0]), name))


def _write_header(
    described: Mapping[str, tuple[torch.dtype, tuple[int, ...]]], metadata: dict[str, str], out: BinaryIO
) -> list[str]:
    """Write what comes before the data, and return the order of that."""
    order = file_order(described)
    header: dict[str, Any] = {"__metadata__": metadata}
    position = 0
    for name in order:
        dtype, shape = described[name]
        end = position + math.prod(shape) * dtype.itemsize
        header[name] = {"dtype": CODES[dtype], "shape": list(shape), "data_offsets": [position, end]}
        position = end
    encoded = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    encoded += b" " * (-(len(encoded) + LENGTH_BYTES) % DATA_ALIGNMENT)
    out.write(struct.pack("<Q", len(encoded)))
    out.write(encoded)
    return order


def _copy(tensor: StoredTensor, out: BinaryIO) -> None:
    remaining = tensor.nbytes
    with tensor.file.open("rb") as stream:
        stream.seek(tensor.offset)
        while remaining:
            chunk = stream.read(min(remaining, 1 << 24))
            if not chunk:
                raise SignbitError(f"{tensor.file} became shorter while it was read")
            out.write(chunk)
            remaining -= len(chunk)
