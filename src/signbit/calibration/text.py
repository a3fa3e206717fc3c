"""Where calibration and evaluation text comes from.

A SOURCE is ``wikitext2``, ``c4`` or ``ptb`` (through the datasets library), a .txt, .raw or .jsonl file (a .jsonl
row's "text"), or ``self``: text that the model itself writes (calibration/self_text.py).
"""

from __future__ import annotations

import hashlib
import importlib.util
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from signbit.errors import SignbitError

SELF = "self"
# Rows of C4's first shards that give more than enough text for any calibration or evaluation here.
_C4_DOCUMENTS = {"train": 4000, "test": 1100}


def read_text(source: str, split: str) -> str:
    """The text of SOURCE; ``split`` is ``train`` or ``test`` and matters only to the named data sets."""
    if source in _DATASETS:
        return _DATASETS[source](split)
    path = Path(source).expanduser()
    if path.suffix.lower() in (".txt", ".raw", ".jsonl"):
        text = _read_file(path)
        if not text.strip():
            raise SignbitError(f"{source} is empty")
        return text
    raise SignbitError(
        f"unknown text source {source!r}: expected {', '.join(_DATASETS)}, {SELF}, or a .txt, .raw or .jsonl file"
    )


def text_fingerprint(source: str) -> str:
    """What identifies a SOURCE's text in a journal: a file's hash, any other source's name."""
    path = Path(source).expanduser()
    return hashlib.sha256(path.read_bytes()).hexdigest() if path.is_file() else source


def _read_file(path: Path) -> str:
    try:
        text = path.read_text(encoding="utf-8-sig")
    except FileNotFoundError as error:
        raise SignbitError(f"{path} does not exist") from error
    except UnicodeDecodeError as error:
        raise SignbitError(f"{path} is not UTF-8 (byte {error.start}): convert it first") from error
    except OSError as error:
        raise SignbitError(f"{path} cannot be read: {error.strerror}") from error
    if path.suffix.lower() != ".jsonl":
        return text
    documents = []
    # Not splitlines(): JSON strings may hold separators that it cuts at.
    for number, line in enumerate(text.split("\n"), start=1):
        if not line.strip():
            continue
        try:
            document = json.loads(line)["text"]
        except (ValueError, KeyError, TypeError, RecursionError) as error:
            raise SignbitError(f'{path}, line {number}: expected a JSON object with a "text"') from error
        if not isinstance(document, str):
            raise SignbitError(f'{path}, line {number}: "text" is not a string')
        documents.append(document)
    return "\n\n".join(documents)


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


def _wikitext2(split: str) -> str:
    rows = _load_dataset("wikitext2", "Salesforce/wikitext", "wikitext-2-raw-v1", split=split)
    return "\n\n".join(rows["text"])


def _ptb(split: str) -> str:
    # The data set is a script, which the library no longer runs; the hub keeps a converted copy on this branch.
    rows = _load_dataset("ptb", "ptb-text-only/ptb_text_only", split=split, revision="refs/convert/parquet")
    return " ".join(rows["sentence"])


def _c4(split: str) -> str:
    shard = "en/c4-train.00000-of-01024.json.gz" if split == "train" else "en/c4-validation.00000-of-00008.json.gz"
    rows = _load_dataset("c4", "allenai/c4", data_files={split: shard}, split=split, streaming=True)
    # GPTQ's evaluation joins with spaces; calibration keeps documents apart.
    return (" " if split == "test" else "\n\n").join(row["text"] for row in rows.take(_C4_DOCUMENTS[split]))


_DATASETS: dict[str, Callable[[str], str]] = {"wikitext2": _wikitext2, "c4": _c4, "ptb": _ptb}
