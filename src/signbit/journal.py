"""The journal of a run: what is finished, on disk, so that a run that is killed goes on where it was.

A run writes to ``OUT.partial`` and nothing else until it is done:

    OUT.partial/journal.json            what is being done: recipe, source, versions
    OUT.partial/tokens.safetensors      the calibration batches
    OUT.partial/options.json            each linear's options, if they differ
    OUT.partial/outer-*.safetensors     what is outside the blocks, as it will be stored
    OUT.partial/block-00007.safetensors a finished block: packed and kept tensors; its layers' reports as metadata
    OUT.partial/checkpoint/             the checkpoint being put together; renamed to OUT as the last step

and a training, instead of blocks,

    OUT.partial/start/                  the checkpoint that it starts from
    OUT.partial/tokens.bin              the text as token ids, int32
    OUT.partial/text-00007.bin          part of a text that the model writes, until all of it is there
    OUT.partial/snapshot.safetensors    all that is trained, and how far it is
    OUT.partial/teacher.bin, .sums      what the original model makes of each window, if that is kept

Every file is written under another name, synced and renamed, so a file that is there is whole. Activations are not
kept: a resumed run computes them again from the finished blocks, which gives the same bits.
"""

from __future__ import annotations

import dataclasses
import errno
import fcntl
import json
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
from torch import Tensor

from signbit.errors import SignbitError
from signbit.report.quantization import LayerReport
from signbit.safetensors_file import StoredTensor, atomic_file, read_header, write_text


@dataclass
class FinishedBlock:
    """layers: linear name -> layout description; reports in the order of work; tensors: everything to be stored;
    tuning: the block's error before and after, if it was tuned."""

    layers: dict[str, dict[str, Any]]
    reports: list[LayerReport]
    tensors: dict[str, Tensor]
    tuning: tuple[float, float] | None = None


class Journal:
    def __init__(self, out: Path) -> None:
        self.directory = out.with_name(out.name + ".partial")
        self._lock = out.with_name(out.name + ".partial.lock")
        self.staging = self.directory / "checkpoint"
        self.start_directory = self.directory / "start"
        self._manifest = self.directory / "journal.json"
        self._options = self.directory / "options.json"

    @property
    def exists(self) -> bool:
        return self._manifest.is_file()

    @property
    def is_foreign(self) -> bool:
        """Whether something that no run has left is where the journal should be."""
        directory = self.directory
        return directory.exists() and not (self.exists or (directory.is_dir() and not any(directory.iterdir())))

    @property
    def has_work(self) -> bool:
        """Whether it holds what took time: a finished block, or anything of a training: text, its start, a snapshot."""
        return (
            self.has(block_name(0))
            or self.has("snapshot")
            or (self.directory / "tokens.bin").is_file()
            or any(self.directory.glob("text-*.bin"))
            or (self.start_directory / "config.json").is_file()
            or (self.directory / "start.partial").is_dir()
        )

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Keep other runs away from the same journal; SignbitError if one is at work."""
        with self._lock.open("w") as stream:
            try:
                fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError as error:
                raise SignbitError(f"another run is writing to {self.directory}: wait for it, or stop it") from error
            try:
                yield
            finally:
                self._lock.unlink(missing_ok=True)

    def start(self, identity: dict[str, Any]) -> None:
        """A new journal in place of any old one."""
        self.discard()
        self.directory.mkdir(parents=True)
        write_text(self._manifest, json.dumps(identity, indent=1))

    def check(self, identity: dict[str, Any]) -> None:
        """SignbitError unless the journal was begun for the same run."""
        different = describe_difference(self.identity(), identity)
        if different:
            raise SignbitError(
                f"{self.directory} was begun {different}: resume with the same command, or start anew with --overwrite"
            )

    def identity(self) -> dict[str, Any]:
        """What the journal was begun for."""
        try:
            identity: dict[str, Any] = json.loads(self._manifest.read_text(encoding="utf-8"))
        except ValueError as error:
            raise SignbitError(f"{self._manifest} is damaged: start again with --overwrite") from error
        return identity

    def discard(self) -> None:
        # The manifest goes last: while it is there, the rest can still be recognised for what it is.
        if self.directory.is_dir():
            for path in self.directory.iterdir():
                if path != self._manifest:
                    shutil.rmtree(path) if path.is_dir() else path.unlink()
            self._manifest.unlink(missing_ok=True)
            self.directory.rmdir()

    def write(self, name: str, tensors: dict[str, Tensor], metadata: dict[str, str] | None = None) -> None:
        with atomic_file(self._file(name)) as temporary:
            contiguous = {key: tensor.detach().cpu().contiguous() for key, tensor in tensors.items()}
            try:
                safetensors.torch.save_file(contiguous, temporary, metadata=metadata)
            except safetensors.SafetensorError as error:
                # The library's name for whatever went wrong with the file, a full disk for one.
                raise OSError(str(error)) from error

    def read(self, name: str) -> dict[str, Tensor]:
        # Through bytes, not a mapping of the file: memory then holds one block, not all that were ever read.
        return safetensors.torch.load(self._file(name).read_bytes())

    def write_options(self, options: dict[str, dict[str, Any]]) -> None:
        """The options of each linear, as plain JSON types."""
        write_text(self._options, json.dumps(options, indent=1))

    def read_options(self) -> dict[str, dict[str, Any]] | None:
        """What :meth:`write_options` wrote; None before that."""
        if not self._options.is_file():
            return None
        try:
            options: dict[str, dict[str, Any]] = json.loads(self._options.read_text(encoding="utf-8"))
        except ValueError as error:
            raise self.damaged_options() from error
        return options

    def damaged_options(self) -> SignbitError:
        return SignbitError(f"{self._options} is damaged: start again with --overwrite")

    def has(self, name: str) -> bool:
        return self._file(name).is_file()

    def write_block(self, index: int, block: FinishedBlock) -> None:
        metadata = {
            "layers": json.dumps(block.layers),
            "reports": json.dumps(list(map(dataclasses.asdict, block.reports))),
            "tuning": json.dumps(block.tuning),
        }
        self.write(block_name(index), block.tensors, metadata)

    def read_block(self, index: int, *, tensors: bool = True) -> FinishedBlock:
        _, metadata = read_header(self._file(block_name(index)))
        tuning = json.loads(metadata["tuning"])
        return FinishedBlock(
            layers=json.loads(metadata["layers"]),
            reports=[LayerReport(**fields) for fields in json.loads(metadata["reports"])],
            tensors=self.read(block_name(index)) if tensors else {},
            tuning=None if tuning is None else (tuning[0], tuning[1]),
        )

    def stored(self, name: str) -> list[StoredTensor]:
        return list(read_header(self._file(name))[0].values())

    def _file(self, name: str) -> Path:
        return self.directory / f"{name}.safetensors"


def block_name(index: int) -> str:
    return f"block-{index:05d}"


def run_failed(directory: Path, error: OSError, kept: str) -> SignbitError:
    """What the file system refused a run, as one line. kept: what the user can rely on, as half a sentence."""
    # The safetensors library gives no number, and fails where it writes.
    if error.errno in (None, errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
        return SignbitError(f"writing to {directory} failed: {error.strerror or error}. Make room; {kept}")
    return SignbitError(f"{error.filename or directory}: {error.strerror or error}. Put that right; {kept}")


def describe_difference(found: dict[str, Any], wanted: dict[str, Any]) -> str:
    """'with seed=1 (not 0)', or '' where the two are equal. Nested mappings are compared by their keys."""
    for key in [*wanted, *(key for key in found if key not in wanted)]:
        a, b = found.get(key), wanted.get(key)
        if isinstance(a, dict) and isinstance(b, dict):
            inner = describe_difference(a, b)
            if inner:
                return inner
        elif a != b:
            return "from another model" if key == "fingerprint" else f"with {key}={a} (not {b})"
    return ""
