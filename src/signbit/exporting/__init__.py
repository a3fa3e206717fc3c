"""Leaving signbit: models as other programs read them.

unpacked.py        any MODEL as plain transformers knows it, densely, one tensor at a time
dense.py           to a plain Hugging Face directory
gguf_file.py       to a .gguf file for llama.cpp
  gguf_blocks.py     which packed matrices its types hold exactly, and their bytes
  gguf_families.py   which architectures, under which names
  gguf_tokenizer.py  the tokenizer as its metadata
rounding.py        what a type makes of the matrices
"""

from __future__ import annotations

import json
from contextlib import closing
from pathlib import Path
from typing import Any

import torch

from signbit.checkpoint import publish
from signbit.errors import SignbitError
from signbit.exporting import dense, gguf_file
from signbit.exporting.unpacked import Unpacked, open_unpacked
from signbit.journal import Journal, run_failed
from signbit.pipeline import target_of
from signbit.progress import Progress, Silent
from signbit.safetensors_file import remove_temporaries, write_text
from signbit.source import remove_workspaces, resolve
from signbit.version import __version__

FORMS = ("dense", "gguf")
# Beside the weights of a dense export: what it came from. It is also how an export is known to be one.
RECORD = "signbit_export.json"


@torch.inference_mode()
def export(
    model: str | Path,
    out: str | Path,
    *,
    to: str,
    dtype: str | None = None,
    type: str | None = None,
    overwrite: bool = False,
    trust_remote_code: bool = False,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Write MODEL in a form that needs no signbit.

    to: "dense", a plain Hugging Face directory, or "gguf", a file for llama.cpp. dtype: of dense weights: bfloat16
    (the default), float16 or float32. type: what packed matrices become that no type of GGUF holds exactly: f32, f16,
    bf16, q8_0, q5_1, q5_0, q4_1 or q4_0; without it they are refused. overwrite: replace what an earlier export has
    left at ``out``. Returns what was written: ``types``, how many matrices in which, how many of them exactly, and with
    what error; ``bytes``; and for GGUF ``inexact``, why matrices do not map, with their number.
    Raises SignbitError for whatever the caller can put right.
    """
    if to not in FORMS:
        raise SignbitError(f"{to!r} is no form to export to: it is one of {', '.join(FORMS)}")
    if to == "dense" and type is not None:
        raise SignbitError("type is for gguf: a dense export takes a dtype")
    if to == "gguf" and dtype is not None:
        raise SignbitError("dtype is for dense exports: gguf takes a type")
    model, target = str(model), target_of(out)
    if not target.parent.is_dir():
        wrong = "is not a directory" if target.parent.exists() else "does not exist: create it first"
        raise SignbitError(f"{target.parent} {wrong}")
    if resolve(model).resolve().is_relative_to(target):
        raise SignbitError(f"the model lies in {out}, which is to be written: choose another place")
    try:
        if to == "gguf":
            return _to_gguf(model, target, type, overwrite, trust_remote_code, progress or Silent())
        return _to_dense(model, target, dtype or "bfloat16", overwrite, trust_remote_code, progress or Silent())
    except OSError as error:
        raise run_failed(target, error, "nothing was written") from error


def _to_dense(
    model: str, out: Path, dtype: str, overwrite: bool, trust_remote_code: bool, progress: Progress
) -> dict[str, Any]:
    if dtype not in dense.DTYPES:
        raise SignbitError(f"dtype {dtype!r} is none of {', '.join(dense.DTYPES)}")
    journal = Journal(out)
    if journal.is_foreign or journal.has_work:
        raise SignbitError(f"{journal.directory} is needed while {out} is written, but is there already: move it away")
    if out.exists() and not overwrite:
        raise SignbitError(f"{out} already exists: choose another directory, or replace it with --overwrite")
    if out.exists() and not _is_export(out):
        raise SignbitError(f"{out} was not written by an export: it is not overwritten, choose another directory")
    with journal.locked():
        remove_workspaces(out)
        with closing(open_unpacked(model, trust_remote_code=trust_remote_code, beside=out)) as opened:
            journal.start({"export": model})
            try:
                rounding = dense.write_directory(opened, journal.staging, dense.DTYPES[dtype], progress)
                files = sum(file.stat().st_size for file in journal.staging.glob("*.safetensors"))
                record = {**_record(opened, "dense"), "types": rounding.to_dict(), "bytes": files}
                write_text(journal.staging / RECORD, json.dumps(record, indent=2) + "\n")
                publish(journal, out)
            except BaseException:
                # There is nothing in it that a second try could use; but an old export may be on its way back.
                if out.exists() or not overwrite:
                    journal.discard()
                raise
    return record


def _to_gguf(
    model: str, out: Path, type: str | None, overwrite: bool, trust_remote_code: bool, progress: Progress
) -> dict[str, Any]:
    if out.is_dir():
        raise SignbitError(f"{out} is a directory: name the .gguf file to be written")
    if out.suffix != ".gguf":
        raise SignbitError(f"{out.name} should end in .gguf, by which programs know such files")
    if out.exists() and not overwrite:
        raise SignbitError(f"{out} already exists: choose another file, or replace it with --overwrite")
    if out.exists() and not _is_gguf(out):
        raise SignbitError(f"{out} is no GGUF file: it is not overwritten, choose another name")
    with Journal(out).locked():
        remove_workspaces(out)
        remove_temporaries(out)
        with closing(open_unpacked(model, trust_remote_code=trust_remote_code, beside=out)) as opened:
            written = gguf_file.write_file(opened, out, type, progress)
            return {**_record(opened, "gguf"), **written, "bytes": out.stat().st_size}


def _record(opened: Unpacked, to: str) -> dict[str, Any]:
    return {"model": opened.name, "to": to, "signbit": __version__}


def _is_gguf(path: Path) -> bool:
    """Whether it is what its name says. A pipe is not, and is not read."""
    if not path.is_file():
        return False
    with path.open("rb") as stream:
        return stream.read(4) == b"GGUF"


def _is_export(path: Path) -> bool:
    """Whether an export wrote the directory, or nothing is in it: those may be overwritten."""
    found = list(path.iterdir()) if path.is_dir() else None
    return found == [] or (found is not None and (path / RECORD).is_file() and not any(p.is_dir() for p in found))
