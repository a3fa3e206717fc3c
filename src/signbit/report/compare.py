"""``signbit compare``: models side by side, as one page, and as a table for a README."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from signbit.errors import SignbitError
from signbit.progress import Progress, Silent
from signbit.report.markdown import write_markdown
from signbit.report.measure import PROMPTS, Measures, ModelFacts, describe, measure, place_of
from signbit.report.page import comparison_page
from signbit.safetensors_file import write_text
from signbit.version import __version__


def compare(
    models: Sequence[str | Path],
    out: str | Path,
    *,
    markdown: str | Path | None = None,
    perplexity: Sequence[str | Path] | str | Path | None = None,
    seqlen: int = 2048,
    windows: int | None = None,
    tasks: Sequence[str] | str = (),
    task_data: str | Path | None = None,
    limit: int | None = None,
    cache: str | Path | None = None,
    fresh: bool = False,
    against: str | Path | None = None,
    prompts: Sequence[str] = PROMPTS,
    max_tokens: int = 48,
    speed: bool = True,
    device: str = "auto",
    activations: str = "exact",
    trust_remote_code: bool = False,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Measure ``models``, packed or not, one after the other, and write a page that compares them to ``out``.

    The page is one file that needs nothing else, neither a network nor scripts. markdown: also write a table with
    pictures beside it, to this .md file or as report.md in this directory. against: the original that divergence is
    from; by default the first of ``models`` that is not a checkpoint of signbit. prompts: what each model is to go on
    with, for ``max_tokens`` tokens. speed: also time decoding and measure memory, on the CPU. All else is as in
    :func:`signbit.evaluate`. Returns what ``signbit compare --json`` prints. Raises SignbitError for whatever the
    caller can put right.
    """
    progress = progress or Silent()
    given = [str(model) for model in models]
    page, table = _target(Path(out)), None if markdown is None else _markdown_target(Path(markdown))
    if not given:
        raise SignbitError("nothing to compare: name at least one model")
    places = [place_of(one) for one in given]
    for name, place in zip(given, places, strict=True):
        if places.count(place) > 1:
            raise SignbitError(f"{name} is given twice: name each model once")
    facts = describe(given, trust_remote_code)
    original = _original(facts, None if against is None else str(against), trust_remote_code)
    names = [tasks] if isinstance(tasks, str) else list(tasks)
    if perplexity is None:
        perplexity = () if names else ("wikitext2",)
    measures = Measures(
        perplexity=[str(one) for one in ([perplexity] if isinstance(perplexity, str | Path) else perplexity)],
        seqlen=seqlen,
        windows=windows,
        tasks=names,
        task_data=task_data,
        limit=limit,
        cache=cache,
        fresh=fresh,
        against=None if original is None else original.model,
        prompts=prompts,
        max_tokens=max_tokens,
        speed=speed,
        device=device,
        activations=activations,
        trust_remote_code=trust_remote_code,
    )
    measures.check()
    for one in facts:
        progress.note(f"measuring {one.label}")
        try:
            measure(one, original, measures, progress)
        except SignbitError as error:
            raise SignbitError(f"{one.label}: {error}") from error
    try:
        write_text(page, comparison_page(facts, original, measures))
        if table is not None:
            write_markdown(facts, original, measures, table)
    except OSError as error:
        raise SignbitError(f"{page} cannot be written: {error.strerror}; what was measured is kept") from error
    return {"signbit": __version__, "against": measures.against, "models": [one.to_dict() for one in facts]}


def _original(facts: list[ModelFacts], against: str | None, trust_remote_code: bool) -> ModelFacts | None:
    """What divergence is from: one of the models, or another."""
    if against is None:
        return next((one for one in facts if not one.is_packed), None)
    return next((one for one in facts if one.model == against), None) or describe([against], trust_remote_code)[0]


def _target(out: Path) -> Path:
    if out.suffix.lower() not in (".html", ".htm"):
        raise SignbitError(f"{out} is no name for a page: end it in .html")
    return _writable(out)


def _markdown_target(markdown: Path) -> Path:
    if markdown.suffix.lower() == ".md":
        return _writable(markdown)
    if not markdown.is_dir():
        raise SignbitError(f"{markdown} is neither a .md file nor a directory: end it in .md, or create it first")
    return _writable(markdown / "report.md")


def _writable(file: Path) -> Path:
    if file.is_dir():
        raise SignbitError(f"{file} is a directory: give a file")
    if not file.parent.is_dir():
        raise SignbitError(f"{file} cannot be written: {file.parent} does not exist")
    if not os.access(file.parent, os.W_OK):
        raise SignbitError(f"{file} cannot be written: {file.parent} is not yours to write to")
    return file
