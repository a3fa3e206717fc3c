"""The page of a comparison: what of the facts is shown, and in which form. How it looks is in templates/."""

from __future__ import annotations

import platform
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from signbit.evaluation.groups import expand
from signbit.report import charts, figures
from signbit.report.heatmap import heat_maps
from signbit.report.measure import Measures, ModelFacts
from signbit.report.rendering import render


def comparison_page(facts: Sequence[ModelFacts], original: ModelFacts | None, measures: Measures) -> str:
    """The page of ``signbit compare``."""
    packed = [one for one in facts if one.is_packed]
    sources = measures.perplexity
    order = sorted(facts, key=lambda one: one.perplexity[sources[0]]) if sources else facts
    return render(
        "comparison.html",
        facts=facts,
        order=order,
        original=original,
        measures=measures,
        sources={source: source_name(source) for source in sources},
        divergence=[source for source in sources if any(source in one.divergence for one in facts)],
        one_vocabulary=all(one.vocabulary == facts[0].vocabulary for one in facts),
        pictures=pareto_pictures(facts, original, measures),
        tasks=_task_panels(facts, measures),
        groups=_groups(facts),
        maps=heat_maps([(one.label, one.making) for one in packed]),
        machine=_machine(facts),
    )


# What is shown -------------------------------------------------------------------------------------------------------


def pareto_pictures(
    facts: Sequence[ModelFacts], original: ModelFacts | None, measures: Measures
) -> list[dict[str, Any]]:
    """Bits against each kind of quality that was measured: {title, wide, narrow}. Nothing without a packed model."""
    packed = [one for one in facts if one.bits_per_weight is not None]
    others = [one for one in facts if one.bits_per_weight is None]
    pictures = []
    for source in measures.perplexity[:1] if packed else ():
        lines = [(one.perplexity[source], one.label) for one in others]
        if original is not None and original not in facts:
            known = [one.evaluation.get("original_perplexity", {}).get(source) for one in packed]
            lines += [(value, original.label) for value in known[:1] if value is not None]
        values = [(one, one.perplexity[source]) for one in packed]
        pictures.append(_picture(f"Perplexity on {source_name(source)}", "perplexity", values, lines))
        apart = [(one, one.divergence[source]["kl"]) for one in packed if source in one.divergence]
        if apart and original is not None:
            pictures.append(_picture(f"Divergence from {original.label}", "KL, nats a token", apart, []))
    names = [name for name in expand(measures.tasks) if all("acc" in one.tasks.get(name, {}) for one in facts)]
    if names and packed:
        means = {one.label: 100 * sum(float(one.tasks[name]["acc"]) for name in names) / len(names) for one in facts}
        title = f"Accuracy on {names[0]}" if len(names) == 1 else f"Mean accuracy on {len(names)} tasks"
        lines = [(means[one.label], one.label) for one in others]
        found = [(one, means[one.label]) for one in packed]
        pictures.append(_picture(title, "accuracy, %", found, lines, less_is_better=False))
    return pictures


def _picture(
    title: str,
    y: str,
    values: Sequence[tuple[ModelFacts, float]],
    references: Sequence[tuple[float, str]],
    *,
    less_is_better: bool = True,
) -> dict[str, Any]:
    points = [charts.Point(one.bits_per_weight or 0.0, value, one.label) for one, value in values]
    shown = "; ".join(f"{p.label}: {figures.fixed(p.x)} bits, {figures.significant(p.y)}" for p in points)
    wide, narrow = charts.scatter(
        points,
        references,
        x="honest bits a weight",
        y=y,
        less_is_better=less_is_better,
        title=f"{title} by honest bits. {shown}",
    )
    return {"title": title, "better": "less" if less_is_better else "more", "wide": wide, "narrow": narrow}


def _task_panels(facts: Sequence[ModelFacts], measures: Measures) -> list[dict[str, Any]]:
    """For each task that was asked for, every model's accuracy, or the first metric of a task that has none."""
    panels = []
    for name in expand(measures.tasks):
        found = [(one, one.tasks[name]) for one in facts if name in one.tasks]
        if not found:
            continue
        known = [key for key in found[0][1] if "stderr" not in key and key not in ("n", "version", "alias")]
        metric = "acc" if "acc" in known else next(iter(known), "")
        rows = [(one, values.get(metric), values.get("stderr")) for one, values in found]
        numbers = [(value, error or 0.0) for _, value, error in rows if value is not None]
        low = min((value - error for value, error in numbers), default=0.0)
        high = max((value + error for value, error in numbers), default=1.0)
        margin = 0.06 * (high - low) or 0.01
        reference = next((value for one, value, _ in rows if not one.is_packed), None)
        share = metric.startswith(("acc", "exact_match"))
        panels.append(
            {
                "name": name,
                "metric": metric,
                "n": found[0][1].get("n"),
                "rows": [
                    {
                        "label": one.label,
                        "value": figures.percent(value) if share else figures.significant(value),
                        "error": (figures.fixed(100 * error, 1) if share else figures.significant(error, 2))
                        if error is not None
                        else "",
                        "svg": charts.interval(value, error, low - margin, high + margin, reference)
                        if value is not None
                        else "",
                    }
                    for one, value, error in rows
                ],
            }
        )
    return panels


def _groups(facts: Sequence[ModelFacts]) -> list[dict[str, Any]]:
    """The papers' averages."""
    names = list(dict.fromkeys(name for one in facts for name in one.evaluation.get("groups", {})))
    return [{"name": name, "rows": [(one.label, one.evaluation["groups"][name]) for one in facts]} for name in names]


def source_name(source: str) -> str:
    """What a text is called."""
    return "text that the original writes" if source == "self" else Path(source).name


def _machine(facts: Sequence[ModelFacts]) -> str | None:
    """What decoding was timed on."""
    speed = next((one.speed for one in facts if one.speed), None)
    if speed is None:
        return None
    threads = f"{speed['threads']} thread{'s' if speed['threads'] != 1 else ''}"
    kernels = f"{speed['instruction_set']} kernels" if speed["instruction_set"] else "no compiled kernels"
    return f"{_processor()}, {threads}, {kernels}, torch {speed['torch']}"


def _processor() -> str:
    file = Path("/proc/cpuinfo")
    if file.is_file():
        for line in file.read_text(encoding="utf-8", errors="replace").splitlines():
            name, _, value = line.partition(":")
            if name.strip() == "model name":
                return value.strip()
    return platform.processor() or platform.machine()
