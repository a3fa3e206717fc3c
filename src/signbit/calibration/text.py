"""Where calibration and evaluation text comes from.

A SOURCE is ``wikitext2``, ``c4`` or ``ptb`` (through the datasets library), a .txt, .raw or .jsonl file (a .jsonl
row's "text"), or ``self``: text that the model itself writes (calibration/self_text.py).
"""

from __future__ import annotations

import hashlib
import importlib.util
import json
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

from signbit.errors import SignbitError

SELF = "self"
_FILES = (".txt", ".raw", ".jsonl")
# Characters that are tokenised at once.
PIECE = 1 << 22
# Rows of C4's first shards that give more than enough text for any calibration or evaluation here.
_C4_DOCUMENTS = {"train": 4000, "test": 1100}


def read_text(source: str, split: str) -> str:
    """The text of SOURCE; ``split`` is ``train`` or ``test`` and matters only to the named data sets."""
    text = "".join(_pieces(source, split, _C4_DOCUMENTS[split]))
    if not text.strip():
        raise SignbitError(f"{source} is empty")
    return text


def stream_text(source: str) -> Iterator[str]:
    """The training text of SOURCE in pieces of about PIECE characters, none of which is held for longer than it is
    looked at. Together they are what :func:`read_text` gives, or more of a data set of which that takes a part."""
    gathered: list[str] = []
    size = 0
    for piece in _pieces(source, "train", None):
        gathered.append(piece)
        size += len(piece)
        if size >= PIECE:
            yield "".join(gathered)
            gathered, size = [], 0
    yield "".join(gathered)


def _pieces(source: str, split: str, documents: int | None) -> Iterator[str]:
    """A text cut anywhere; documents: of C4, at most so many."""
    if source in _DATASETS:
        return _DATASETS[source](split, documents)
    path = Path(source).expanduser()
    if path.suffix.lower() in _FILES:
        return _read_file(path)
    raise SignbitError(
        f"unknown text source {source!r}: expected {', '.join(_DATASETS)}, {SELF}, or a .txt, .raw or .jsonl file"
    )


def text_fingerprint(source: str) -> str:
    """What identifies a SOURCE's text in a journal: a file's hash, any other source's name. SignbitError if it was
    to be a file and there is none."""
    path = Path(source).expanduser()
    if not path.exists() and path.suffix.lower() in _FILES:
        raise SignbitError(f"{path} does not exist")
    if not path.is_file():
        return source
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def _read_file(path: Path) -> Iterator[str]:
    lines = _lines(path)
    return _joined(_rows(path, lines), "\n\n") if path.suffix.lower() == ".jsonl" else lines


def _lines(path: Path) -> Iterator[str]:
    """The lines of a file with their ends; "\\r\\n" and "\\r" become "\\n". Only line feeds end a line: JSON strings
    may hold other separators."""
    position = 0
    try:
        with path.open("rb") as stream:
            for line in stream:
                text = line.decode("utf-8-sig" if position == 0 else "utf-8")
                position += len(line)
                yield text.replace("\r\n", "\n").replace("\r", "\n")
    except FileNotFoundError as error:
        raise SignbitError(f"{path} does not exist") from error
    except UnicodeDecodeError as error:
        raise SignbitError(f"{path} is not UTF-8 (byte {position + error.start}): convert it first") from error
    except OSError as error:
        raise SignbitError(f"{path} cannot be read: {error.strerror}") from error


def _rows(path: Path, lines: Iterator[str]) -> Iterator[str]:
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            document = json.loads(line)["text"]
        except (ValueError, KeyError, TypeError, RecursionError) as error:
            raise SignbitError(f'{path}, line {number}: expected a JSON object with a "text"') from error
        if not isinstance(document, str):
            raise SignbitError(f'{path}, line {number}: "text" is not a string')
        yield document


def _joined(documents: Iterable[str], separator: str) -> Iterator[str]:
    for number, document in enumerate(documents):
        yield separator + document if number else document


def _load_dataset(name: str, *args: str, **options: Any) -> Any:
    if importlib.util.find_spec("datasets") is None:
        raise SignbitError(f"{name} needs the datasets library: pip install 'signbit[data]', or give a text file")
    from datasets import load_dataset

    try:
        return load_dataset(*args, **options)
    except TypeError:
        raise  # a mistake of ours, not of the network
    except Exception as error:
        # The library raises anything from OSError to its own and httpx's errors when it cannot reach the hub.
        reason = str(error).strip().splitlines() or [type(error).__name__]
        raise SignbitError(f"{name} could not be loaded ({reason[0]}): offline, give a text file or 'self'") from error


def _wikitext2(split: str, documents: int | None) -> Iterator[str]:
    rows = _load_dataset("wikitext2", "Salesforce/wikitext", "wikitext-2-raw-v1", split=split)
    return _joined((row["text"] for row in rows), "\n\n")


def _ptb(split: str, documents: int | None) -> Iterator[str]:
    # The data set is a script, which the library no longer runs; the hub keeps a converted copy on this branch.
    rows = _load_dataset("ptb", "ptb-text-only/ptb_text_only", split=split, revision="refs/convert/parquet")
    return _joined((row["sentence"] for row in rows), " ")


def _c4(split: str, documents: int | None) -> Iterator[str]:
    shard = "en/c4-train.00000-of-01024.json.gz" if split == "train" else "en/c4-validation.00000-of-00008.json.gz"
    rows = _load_dataset("c4", "allenai/c4", data_files={split: shard}, split=split, streaming=True)
    taken = rows if documents is None else rows.take(documents)
    # GPTQ's evaluation joins with spaces; calibration keeps documents apart.
    return _joined((row["text"] for row in taken), " " if split == "test" else "\n\n")


_DATASETS: dict[str, Callable[[str, int | None], Iterator[str]]] = {"wikitext2": _wikitext2, "c4": _c4, "ptb": _ptb}
