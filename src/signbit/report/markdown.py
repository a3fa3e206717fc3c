"""A comparison for a README: a table, and the picture of bits against quality in a file beside it."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from urllib.parse import quote

from signbit.report.charts import standalone
from signbit.report.figures import NONE, fixed, percent, significant, size
from signbit.report.measure import Measures, ModelFacts
from signbit.report.page import pareto_pictures, source_name
from signbit.report.rendering import chart_style
from signbit.safetensors_file import write_text

# What Markdown, or HTML within it, would take for its own.
_SPECIAL = re.compile(r"([\\`*_{}\[\]()#+!|<>&~$])")


def write_markdown(
    facts: Sequence[ModelFacts], original: ModelFacts | None, measures: Measures, file: Path
) -> list[Path]:
    """Write the table to ``file`` and each picture to an .svg beside it; returns what was written."""
    written = [file]
    lines = [*_table(facts, measures), ""]
    for i, picture in enumerate(pareto_pictures(facts, original, measures)):
        beside = file.with_name(f"{file.stem}{f'-{i + 1}' if i else ''}.svg")
        write_text(beside, standalone(picture["wide"], chart_style()))
        written.append(beside)
        lines += [f"![Honest bits against {escape(picture['title'])}]({quote(beside.name)})", ""]
    write_text(file, "\n".join(lines))
    return written


def escape(text: str) -> str:
    """``text`` as one line that Markdown shows as it is."""
    return _SPECIAL.sub(r"\\\1", " ".join(text.split()))


def _table(facts: Sequence[ModelFacts], measures: Measures) -> list[str]:
    headings = ["model", "honest bits", "nominal", "file", *(["memory"] if measures.speed else [])]
    for source in measures.perplexity:
        headings += [f"perplexity, {escape(source_name(source))}", "KL", "same top token"]
    tasks = list(dict.fromkeys(task for one in facts for task in one.evaluation.get("tasks", {})))
    headings += [escape(task) for task in tasks] + (["tokens/s"] if measures.speed else [])
    rows = [_row(one, measures, tasks) for one in facts]
    rule = ["---", *["---:"] * (len(headings) - 1)]
    return [f"| {' | '.join(row)} |" for row in (headings, rule, *rows)]


def _row(one: ModelFacts, measures: Measures, tasks: Sequence[str]) -> list[str]:
    cells = [escape(one.label), fixed(one.bits_per_weight), fixed(one.nominal_bits_per_weight), size(one.file_bytes)]
    cells += [size(one.memory)] if measures.speed else []
    for source in measures.perplexity:
        apart = one.divergence.get(source, {})
        cells += [
            significant(one.perplexity[source]),
            significant(apart.get("kl")),
            percent(apart.get("top1_agreement")),
        ]
    for task in tasks:
        values = one.tasks.get(task, {})
        error = values.get("stderr")
        shown = percent(values["acc"]) if "acc" in values else NONE
        cells.append(shown if error is None or shown == NONE else f"{shown} ± {fixed(100 * error, 1)}")
    return cells + ([significant(one.speed["tokens_per_second"] if one.speed else None)] if measures.speed else [])
