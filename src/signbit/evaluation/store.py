"""Answers that are kept: an append-only file for each model, so that nothing is ever asked twice.

A benchmark is thousands of questions that do not depend on each other, and its metrics are arithmetic on the answers.
So what is kept is the answers, each under the hash of its question, and a task's result under the hash of its rows. An
interrupted evaluation goes on with the question it was at; ``--limit 100`` today is a part of tomorrow's whole run;
other rows, or rows in another order, are other hashes, and nothing has to be told apart by name or date.

A file holds the answers of one model, one way of running it and one version of everything that runs it:

    CACHE/<hash of the identity>.jsonl
        {"identity": {...}}         what is hashed, for people
        ["<hash>", answer]          one line an answer, written with one call as soon as it is known

What was written survives a killed process. Half a line is not a JSON array, so it counts as unanswered, and the next
run begins on a new line; two runs of the same model may share a file.
"""

from __future__ import annotations

import hashlib
import json
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
import transformers

from signbit.device import choose_device
from signbit.errors import SignbitError
from signbit.report.quantization import FILE as REPORT_FILE
from signbit.user_cache import cache_directory
from signbit.version import __version__

# Weights, configuration, tokenizer, chat template and code: what decides on a model's answers.
_MODEL_FILES = (".safetensors", ".json", ".model", ".txt", ".tiktoken", ".jinja", ".py")


def default_cache() -> Path:
    """Where answers are kept unless told otherwise."""
    return cache_directory() / "evaluation"


def content_hash(path: Path) -> str:
    """SHA-256 of what makes a model: its .gguf file, or all files of its directory but the report of its making."""
    files = [path] if path.is_file() else sorted(file for file in path.iterdir() if file.suffix in _MODEL_FILES)
    digest = hashlib.sha256()
    for file in files:
        if file.name != REPORT_FILE:
            with file.open("rb") as stream:
                digest.update(f"{file.name}:{hashlib.file_digest(stream, 'sha256').hexdigest()};".encode())
    return digest.hexdigest()


def open_store(
    model: Path, *, device: str, activations: str, cache: str | Path | None, fresh: bool, **also: str
) -> Store:
    """What is kept of a model that is run in this way, by this installation; ``also``: what else answers depend on.

    cache: a directory in place of the default.
    """
    identity = {
        "model": content_hash(model),
        "device": choose_device(device).type,
        "activations": activations,
        "signbit": __version__,
        "transformers": transformers.__version__,
        "torch": torch.__version__,
        **also,
    }
    return Store(default_cache() if cache is None else Path(cache).expanduser(), identity, fresh=fresh)


def hash_of(value: Any) -> str:
    """128 bits of the SHA-256 of ``value`` as JSON."""
    return hashlib.sha256(json.dumps(value, sort_keys=True, default=str).encode()).hexdigest()[:32]


class Store:
    """JSON values by key, on disk as soon as they are put.

    identity: what all values depend on beside their keys. fresh: forget what an earlier run has kept.
    """

    def __init__(self, directory: Path, identity: dict[str, Any], *, fresh: bool = False) -> None:
        self.file = directory / f"{hash_of(identity)}.jsonl"
        try:
            directory.mkdir(parents=True, exist_ok=True)
            if fresh:
                self.file.unlink(missing_ok=True)
            self._kept, whole = _read(self.file)
            self._stream = self.file.open("ab", buffering=0)
        except OSError as error:
            raise self._unusable(error) from error
        if self._stream.tell() == 0:
            self._append({"identity": identity})
        elif not whole:
            self._write(b"\n")

    def __contains__(self, key: str) -> bool:
        return key in self._kept

    def __getitem__(self, key: str) -> Any:
        return self._kept[key]

    def put(self, key: str, value: Any) -> None:
        if key not in self._kept:
            self._append([key, value])
            self._kept[key] = value

    def __enter__(self) -> Store:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._stream.close()

    def _append(self, line: Any) -> None:
        self._write(json.dumps(line).encode() + b"\n")

    def _write(self, data: bytes) -> None:
        try:
            self._stream.write(data)
        except OSError as error:
            raise self._unusable(error) from error

    def _unusable(self, error: OSError) -> SignbitError:
        return SignbitError(
            f"{self.file.parent} cannot keep answers: {error.strerror}; name another directory with --cache"
        )


def _read(file: Path) -> tuple[dict[str, Any], bool]:
    """What is kept, and whether the last line is whole."""
    kept: dict[str, Any] = {}
    line = b"\n"
    if file.exists():
        with file.open("rb") as stream:
            for line in stream:
                # A process that was killed, or a disk that was full, leaves half a line.
                with suppress(ValueError):
                    match json.loads(line):
                        case [str(key), value]:
                            kept[key] = value
    return kept, line.endswith(b"\n")
