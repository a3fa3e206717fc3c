"""Blocks are read ahead: one, not more, and what goes wrong is said when the block is needed."""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path

import pytest
import torch
from torch import Tensor

import signbit
from signbit import Recipe, SignbitError
from signbit.blockwise.job import Job
from signbit.blockwise.loading import BlockLoader
from signbit.journal import Journal
from signbit.processes import Processes
from signbit.progress import Silent
from signbit.source import Source, open_source
from tiny import SMALL_RECIPE

MakeDir = Callable[..., Path]
# Longer than any of this takes; a test that waits so long fails.
PATIENCE = 30


@pytest.fixture
def job(tiny_dir: MakeDir, text_file: Path, tmp_path: Path) -> Iterator[Job]:
    """Four blocks."""
    recipe = Recipe({**SMALL_RECIPE, "calib": str(text_file)})
    with closing(open_source(str(tiny_dir("gemma3")))) as source:
        yield Job(source, recipe, Journal(tmp_path / "out"), Processes("cpu"), Silent())


def block_of(name: str) -> int:
    return int(name.split(".layers.")[1].split(".")[0])


def watch_reads(monkeypatch: pytest.MonkeyPatch, before: Callable[[int], None]) -> None:
    """Call ``before`` with the block's number whenever a tensor of it is read."""
    read = Source.tensor

    def watched(source: Source, name: str) -> Tensor:
        if ".layers." in name:
            before(block_of(name))
        return read(source, name)

    monkeypatch.setattr(Source, "tensor", watched)


def test_the_expected_block_is_read_beside_other_work(job: Job, monkeypatch: pytest.MonkeyPatch) -> None:
    read = {index: threading.Event() for index in range(4)}
    watch_reads(monkeypatch, lambda index: read[index].set())
    with BlockLoader(job) as loader:
        loader.load(0)
        assert not read[1].is_set()
        loader.expect(1)
        assert read[1].wait(PATIENCE)  # though nobody has asked for it yet
        assert not read[2].is_set()
        loader.load(1)
        loader.expect(4)  # there is none
        loader.load(3)
    assert not read[2].is_set()
    for index, loaded in enumerate([True, True, False, True]):
        devices = {parameter.device.type for parameter in job.blocks[index].parameters()}
        assert devices == ({"cpu"} if loaded else {"meta"})
    name = "model.layers.1.mlp.up_proj.weight"
    assert torch.equal(job.model.get_parameter(name), job.source.tensor(name))


def test_a_run_reads_each_block_once_and_one_ahead(
    tiny_dir: MakeDir, text_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is read of a block lives until the block is done, and never are there more than two."""
    done: list[int] = []
    ahead: set[int] = set()
    order: list[int] = []
    write = Journal.write_block

    def before(index: int) -> None:
        ahead.add(index - len(done))
        if not order or order[-1] != index:
            order.append(index)

    def note(journal: Journal, index: int, block: object) -> None:
        write(journal, index, block)  # type: ignore[arg-type]
        done.append(index)

    watch_reads(monkeypatch, before)
    monkeypatch.setattr(Journal, "write_block", note)
    recipe = Recipe({**SMALL_RECIPE, "calib": str(text_file)})
    signbit.quantize(tiny_dir("gemma3"), tmp_path / "out", recipe, device="cpu")
    assert ahead <= {0, 1}
    # The first one more often: it is run to see what blocks are called with.
    assert order == [0, 1, 2, 3]
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("signbit-reader")]


def test_two_blocks_weights_at_most(job: Job, monkeypatch: pytest.MonkeyPatch) -> None:
    read: list[tuple[int, weakref.ref[Tensor]]] = []
    original = BlockLoader._read

    def watched(loader: BlockLoader, index: int) -> object:
        weights = original(loader, index)
        read.extend((index, weakref.ref(tensor)) for tensor in weights.tensors.values())
        return weights

    monkeypatch.setattr(BlockLoader, "_read", watched)
    with BlockLoader(job) as loader:
        for index in range(4):
            loader.load(index)
            loader.expect(index + 1)
            assert {of for of, tensor in read if tensor() is not None} <= {index, index + 1}
            job.blocks[index].to("meta")
        loader.load(0)
        loader.expect(1)
    assert {of for of, tensor in read if tensor() is not None} <= {0}


def test_errors_of_reading_are_raised_when_the_block_is_needed(job: Job, monkeypatch: pytest.MonkeyPatch) -> None:
    failed = threading.Event()

    def fail(index: int) -> None:
        if index == 1:
            failed.set()
            raise OSError("the disk is gone")

    watch_reads(monkeypatch, fail)
    with BlockLoader(job) as loader:
        loader.load(0)
        loader.expect(1)
        assert failed.wait(PATIENCE)
        with pytest.raises(OSError, match="the disk is gone"):
            loader.load(1)
        loader.load(2)


def test_a_run_whose_reader_fails_says_so_in_one_line(
    tiny_dir: MakeDir, text_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What was finished by then is kept."""

    def fail(index: int) -> None:
        if index == 2:
            raise OSError(5, "Input/output error", "model.safetensors")

    watch_reads(monkeypatch, fail)
    recipe = Recipe({**SMALL_RECIPE, "calib": str(text_file)})
    with pytest.raises(SignbitError, match=r"Input/output error\. Put that right; --resume"):
        signbit.quantize(tiny_dir("gemma3"), tmp_path / "out", recipe, device="cpu")
    kept = {file.stem for file in (tmp_path / "out.partial").glob("block-*")}
    assert kept == {"block-00000", "block-00001"}
    monkeypatch.undo()
    signbit.quantize(tiny_dir("gemma3"), tmp_path / "out", recipe, device="cpu", resume=True)
    signbit.quantize(tiny_dir("gemma3"), tmp_path / "whole", recipe, device="cpu")
    both = [(tmp_path / out / "model.safetensors").read_bytes() for out in ("out", "whole")]
    assert both[0] == both[1]
