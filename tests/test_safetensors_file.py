import json
import os
import struct
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch

from signbit.errors import SignbitError
from signbit.safetensors_file import (
    DTYPES,
    INDEX,
    SINGLE,
    StoredTensor,
    atomic_file,
    check_directory,
    copy_tensors,
    files_of,
    read_directory,
    read_header,
    write_tensors,
    write_text,
)
from stored import unpadded

TENSORS = {"a": torch.arange(6.0).view(2, 3), "b": torch.tensor([1, 2, 3], dtype=torch.uint8)}


@pytest.fixture
def good(tmp_path: Path) -> Path:
    file = tmp_path / SINGLE
    safetensors.torch.save_file(TENSORS, file, metadata={"format": "pt"})
    return file


def with_header(file: Path, header: Any, data: bytes = bytes(24)) -> Path:
    encoded = json.dumps(header).encode()
    file.write_bytes(struct.pack("<Q", len(encoded)) + encoded + data)
    return file


def entry(dtype: Any = "F32", shape: Any = (2, 3), offsets: Any = (0, 24)) -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": offsets}


def refuse(file: Path, *words: str) -> None:
    """Reading fails with one line that names the file and says ``words``."""
    with pytest.raises(SignbitError) as caught:
        read_header(file)
    message = str(caught.value)
    assert "\n" not in message
    for word in (str(file), *words):
        assert word in message


def test_header_says_where_each_tensor_is(good: Path) -> None:
    tensors, metadata = read_header(good)
    assert metadata == {"format": "pt"}
    assert tensors.keys() == TENSORS.keys()
    data = good.read_bytes()
    for name, tensor in TENSORS.items():
        found = tensors[name]
        assert (found.name, found.dtype, found.shape, found.file) == (name, tensor.dtype, tuple(tensor.shape), good)
        assert data[found.offset : found.offset + found.nbytes] == tensor.numpy().tobytes()


def test_scalars_and_empty_tensors(tmp_path: Path) -> None:
    safetensors.torch.save_file({"scalar": torch.tensor(1.5), "empty": torch.zeros(0, 7)}, tmp_path / "x")
    tensors, _ = read_header(tmp_path / "x")
    assert (tensors["scalar"].shape, tensors["scalar"].nbytes) == ((), 4)
    assert (tensors["empty"].shape, tensors["empty"].nbytes) == ((0, 7), 0)


@pytest.mark.parametrize("size", [0, 5, 8, 50, -1])
def test_truncated(good: Path, size: int) -> None:
    good.write_bytes(good.read_bytes()[:size])
    refuse(good)


@pytest.mark.parametrize(
    "content",
    [
        b"this is not a safetensors file",
        bytes(64),
        b"\xff" * 64,
        struct.pack("<Q", 4) + b"\xff\xfe\xfd\xfc",
        struct.pack("<Q", 1 << 62) + b"{}",
        struct.pack("<Q", 3) + b"{}",
        struct.pack("<Q", 2) + b"[]",
        struct.pack("<Q", 4) + b"null",
        struct.pack("<Q", 3) + b"123",
        struct.pack("<Q", 8) + b'{"a": 1}',
    ],
    ids=str,
)
def test_garbage(tmp_path: Path, content: bytes) -> None:
    file = tmp_path / SINGLE
    file.write_bytes(content)
    refuse(file)


@pytest.mark.parametrize(
    "bad",
    [
        entry(dtype="F31"),
        entry(dtype=None),
        entry(dtype=["F32"]),
        entry(shape=(2, 4)),
        entry(shape=(-2, -3)),
        entry(shape=None),
        entry(shape=("x",)),
        entry(shape=(2.5, 3)),
        entry(offsets=(0, 20)),
        entry(offsets=(0, 28)),
        entry(offsets=(8, 32)),
        entry(offsets=(-24, 0)),
        entry(offsets=(24, 0)),
        entry(offsets=(0,)),
        entry(offsets=None),
        entry(offsets=("a", "b")),
        entry(offsets=(0, 24, 24)),
        {"dtype": "F32"},
        [],
        None,
    ],
    ids=str,
)
def test_a_damaged_entry_is_named(tmp_path: Path, bad: Any) -> None:
    refuse(with_header(tmp_path / SINGLE, {"tensor.of.interest": bad}), "tensor.of.interest")


def test_a_tensor_past_the_end_is_a_truncated_file(tmp_path: Path) -> None:
    refuse(with_header(tmp_path / SINGLE, {"w": entry()}, data=bytes(23)), "truncated", "w should end at byte")


def test_a_dtype_of_the_format_that_is_not_supported_is_called_so(tmp_path: Path) -> None:
    """Such a file is not damaged, and must not be called so."""
    refuse(with_header(tmp_path / SINGLE, {"w": entry(dtype="F4", shape=(48,))}), "w", "F4")


def test_missing_file(tmp_path: Path) -> None:
    refuse(tmp_path / SINGLE, "missing")


class TestDirectories:
    @pytest.fixture
    def sharded(self, tmp_path: Path) -> Path:
        weight_map = {}
        for number, (name, tensor) in enumerate(TENSORS.items(), start=1):
            shard = f"model-{number:05d}-of-00002.safetensors"
            safetensors.torch.save_file({name: tensor}, tmp_path / shard)
            weight_map[name] = shard
        (tmp_path / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
        return tmp_path

    def test_one_file(self, good: Path) -> None:
        assert files_of(good.parent) == [good]
        assert read_directory(good.parent).keys() == TENSORS.keys()

    def test_shards(self, sharded: Path) -> None:
        assert [file.name for file in files_of(sharded)] == [
            "model-00001-of-00002.safetensors",
            "model-00002-of-00002.safetensors",
        ]
        assert read_directory(sharded).keys() == TENSORS.keys()

    def test_missing_shard_is_named(self, sharded: Path) -> None:
        (sharded / "model-00002-of-00002.safetensors").unlink()
        with pytest.raises(SignbitError, match="lacks the shard model-00002"):
            files_of(sharded)

    def test_truncated_shard_is_named(self, sharded: Path) -> None:
        shard = sharded / "model-00002-of-00002.safetensors"
        shard.write_bytes(shard.read_bytes()[:-1])
        with pytest.raises(SignbitError, match=r"model-00002-of-00002\.safetensors is truncated"):
            check_directory(sharded)

    def test_a_shard_elsewhere_is_refused(self, sharded: Path) -> None:
        inside = sharded / "inside"
        inside.mkdir()
        (inside / INDEX).write_text(json.dumps({"weight_map": {"a": "../model-00001-of-00002.safetensors"}}))
        with pytest.raises(SignbitError, match="lacks the shard"):
            files_of(inside)

    @pytest.mark.parametrize("content", ["", "{", "{}", "[]", "null", '{"weight_map": []}', '{"weight_map": 3}'])
    def test_damaged_index(self, tmp_path: Path, content: str) -> None:
        (tmp_path / INDEX).write_text(content)
        with pytest.raises(SignbitError, match="not a valid shard index"):
            files_of(tmp_path)

    def test_pickled_weights_only(self, tmp_path: Path) -> None:
        (tmp_path / "pytorch_model.bin").touch()
        with pytest.raises(SignbitError, match="pickled weights only: convert"):
            files_of(tmp_path)

    def test_no_weights(self, tmp_path: Path) -> None:
        with pytest.raises(SignbitError, match="has no weights"):
            files_of(tmp_path)


class TestAtomicFile:
    def test_replaces(self, tmp_path: Path) -> None:
        file = tmp_path / "x"
        write_text(file, "old")
        write_text(file, "nëw")
        assert file.read_text(encoding="utf-8") == "nëw"
        assert os.listdir(tmp_path) == ["x"]

    @pytest.mark.parametrize("before", ["old", None])
    def test_an_exception_leaves_everything_as_it_was(self, tmp_path: Path, before: str | None) -> None:
        file = tmp_path / "x"
        if before is not None:
            file.write_text(before)

        def write_half() -> None:
            with atomic_file(file) as temporary:
                temporary.write_text("half of wh")
                raise OSError("disk full")

        with pytest.raises(OSError, match="disk full"):
            write_half()
        assert os.listdir(tmp_path) == ([] if before is None else ["x"])
        assert before is None or file.read_text() == before

    def test_the_target_is_old_until_the_end(self, tmp_path: Path) -> None:
        file = tmp_path / "x"
        file.write_text("old")
        with atomic_file(file) as temporary:
            temporary.write_text("new")
            assert file.read_text() == "old"
        assert file.read_text() == "new"


class TestCopyTensors:
    def test_bytes_are_the_librarys_for_all_dtypes(self, tmp_path: Path) -> None:
        generator = torch.Generator().manual_seed(0)
        tensors = {}
        for number, dtype in enumerate(DTYPES.values()):
            raw = torch.randint(0, 2, (3, 5 * dtype.itemsize), dtype=torch.uint8, generator=generator)
            # Names in an order that is neither that of the dtypes nor the alphabet's.
            tensors[f"{'zbaý'[number % 4]}.{number}"] = raw.view(dtype)
        tensors |= {"scalar": torch.tensor(2.0), "empty": torch.zeros(0, 3), 'quo"te\\': torch.ones(1)}
        halves = list(tensors)[::2], list(tensors)[1::2]
        stored: list[StoredTensor] = []
        for number, names in enumerate(halves):
            safetensors.torch.save_file({name: tensors[name] for name in names}, tmp_path / f"{number}")
            stored += read_header(tmp_path / f"{number}")[0].values()
        copy_tensors(stored, tmp_path / "copy")
        librarys = safetensors.torch.save(tensors, metadata={"format": "pt"})
        assert unpadded((tmp_path / "copy").read_bytes()) == unpadded(librarys)

    @pytest.mark.parametrize("length", range(40))
    def test_data_begins_with_a_cache_line(self, tmp_path: Path, length: int) -> None:
        name, ones = "x" * length, torch.ones(3, dtype=torch.uint8)
        write_tensors({name: (torch.uint8, (3,))}, lambda _: ones, {}, tmp_path / "a")
        (tensor,) = read_header(tmp_path / "a")[0].values()
        assert tensor.offset % 64 == 0
        assert safetensors.torch.load_file(tmp_path / "a")[name].tolist() == [1, 1, 1]

    def test_a_source_that_became_shorter_is_named_and_nothing_is_left(self, good: Path) -> None:
        tensors, _ = read_header(good)
        good.write_bytes(good.read_bytes()[:-1])
        with pytest.raises(SignbitError, match=f"{good.name} became shorter"):
            copy_tensors(tensors.values(), good.parent / "copy")
        assert os.listdir(good.parent) == [good.name]
