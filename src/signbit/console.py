"""What people see: progress with the time left, and tables, on stderr."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table

from signbit.report.quantization import QuantizationReport
from signbit.training.record import Record

console = Console(stderr=True, highlight=False, soft_wrap=True, markup=False)
if not console.is_terminal:
    console.width = 160  # a log has no edge to cut names at


class ConsoleProgress:
    """Progress bars on stderr; in a log file, a line at each tenth instead."""

    @contextmanager
    def task(self, description: str, total: int) -> Iterator[Any]:
        if not console.is_terminal:
            yield _Lines(description, total)
            return
        columns = (
            TextColumn("{task.description}", markup=False),
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TextColumn("left"),
            TimeRemainingColumn(),
            TextColumn("{task.fields[status]}", markup=False),
        )
        with Progress(*columns, console=console) as bars:
            yield _Bar(bars, bars.add_task(description, total=total, status=""))

    def note(self, message: str) -> None:
        console.print(message)


class _Bar:
    def __init__(self, bars: Progress, task: Any) -> None:
        self._bars, self._task = bars, task

    def advance(self, steps: int = 1) -> None:
        self._bars.advance(self._task, steps)

    def status(self, text: str) -> None:
        self._bars.update(self._task, status=text)


class _Lines:
    def __init__(self, description: str, total: int) -> None:
        import time

        self._description, self._total, self._done, self._status = description, total, 0, ""
        self._clock, self._started = time.monotonic, time.monotonic()

    def advance(self, steps: int = 1) -> None:
        before, self._done = self._done, self._done + steps
        if self._done * 10 // self._total > before * 10 // self._total:
            elapsed = self._clock() - self._started
            left = elapsed / self._done * (self._total - self._done)
            line = f"{self._description}: {self._done}/{self._total}, {elapsed:.0f} s, about {left:.0f} s left"
            console.print(f"{line}, {self._status}" if self._status else line)

    def status(self, text: str) -> None:
        self._status = text


def quantization_table(report: QuantizationReport) -> Table:
    """Errors by kind of layer, since a large model has hundreds."""
    table = _table("layers", "number", "bits/weight", "weight error", "output error")
    kinds: dict[str, list[Any]] = {}
    for layer in report.layers:
        kinds.setdefault(layer.name.rpartition(".")[2], []).append(layer)
    for kind, layers in [*kinds.items(), ("all", report.layers)]:
        outputs = [layer.output_error for layer in layers if layer.output_error is not None]
        table.add_row(
            kind,
            str(len(layers)),
            f"{_mean([layer.bits_per_weight for layer in layers]):.3f}",
            f"{_mean([layer.weight_error for layer in layers]):.4f}",
            f"{_mean(outputs):.4f}" if outputs else "-",
        )
    return table


def training_table(record: Record) -> Table:
    """Held-out perplexities along the way."""
    table = _table("step", "loss", "held-out perplexity")
    for step, perplexity in record.heldout:
        table.add_row(str(step), f"{record.losses[step - 1]['loss']:.4g}" if step else "-", f"{perplexity:,.4g}")
    return table


def unquantized_table(unquantized: dict[str, str]) -> Table:
    """What was left as it is, counted by reason."""
    return _counted_table(("not quantized because", "tensors", "for example"), unquantized.items())


def notes_table(report: QuantizationReport) -> Table | None:
    """Anything out of the ordinary, and how many layers it befell; None if there is nothing."""
    noted = [(layer.name, note) for layer in report.layers for note in layer.notes]
    return _counted_table(("note", "layers", "for example"), noted) if noted else None


def _counted_table(headings: tuple[str, str, str], found: Iterable[tuple[str, str]]) -> Table:
    """(name, reason) pairs, counted by reason."""
    names: dict[str, list[str]] = {}
    for name, reason in found:
        names.setdefault(reason, []).append(name)
    table = _table(*headings)
    for reason, of_reason in names.items():
        table.add_row(reason, str(len(of_reason)), of_reason[0])
    return table


def seconds_table(seconds: dict[str, float]) -> Table:
    table = _table("phase", "seconds")
    for name, value in sorted(seconds.items(), key=lambda item: -item[1]):
        table.add_row(name, f"{value:.1f}")
    table.add_row("total", f"{sum(seconds.values()):.1f}")
    return table


def inspection_tables(result: dict[str, Any], per_layer: bool = True) -> list[Table]:
    summary = _table("", str(result["model"]))
    if result["bits_per_weight"] is not None:
        summary.add_row("method", result["method"])
        summary.add_row("bits per weight", f"{result['bits_per_weight']:.4f} (counted from the file)")
        summary.add_row("as the papers count", f"{result['nominal_bits_per_weight']:.4f}")
        summary.add_row("quantized weights", f"{result['quantized_weights']:,}")
    for name, size in result["bytes"].items():
        summary.add_row(f"bytes, {name}", f"{size:,}")
    for name, size in result["items"].items():
        summary.add_row(f"  {name}", f"{size:,} ({8 * size / result['quantized_weights']:.4f} bits a weight)")
    tables = [summary]
    if result["layers"] and per_layer:
        layers = _table("layer", "shape", "layout", "bits/weight", "output error")
        for layer in result["layers"]:
            error = layer.get("output_error")
            layers.add_row(
                layer["name"],
                "x".join(map(str, layer["shape"])),
                layer["layout"],
                f"{layer['bits_per_weight']:.3f}",
                "-" if error is None else f"{error:.4f}",
            )
        tables.append(layers)
    return tables


def export_tables(result: dict[str, Any]) -> list[Table]:
    """What an export made of the matrices, and why some have no exact type."""
    written = _table("written as", "matrices", "of them exactly", "relative error of all")
    for kind, found in result["types"].items():
        written.add_row(kind, str(found["matrices"]), str(found["exact"]), f"{found['relative_error']:.2g}")
    if not result.get("inexact"):
        return [written]
    reasons = _table("not exact in GGUF because", "matrices")
    for reason, count in result["inexact"].items():
        reasons.add_row(reason, str(count))
    return [written, reasons]


def sweep_table(rows: list[dict[str, Any]]) -> Table:
    """Trials, with their bits and what their perplexities are."""
    texts = list(dict.fromkeys(key for row in rows for key in row if key.startswith("perplexity ")))
    table = _table("model", "recipe", "seed", "bits/weight", *texts)
    for row in rows:
        numbers = [f"{row[text]:,.4g}" if text in row else "-" for text in texts]
        table.add_row(row["model"], row["recipe"], str(row["seed"]), f"{row['bits_per_weight']:.3f}", *numbers)
    return table


def tasks_table(result: dict[str, Any]) -> Table:
    """Each task's metrics with their standard errors, then the averages of named groups."""
    table = _table(f"lm-evaluation-harness {result['harness']}", "rows", "metric", "value", "standard error")
    for name, found in {**result["tasks"], **result["groups"]}.items():
        first, rows = name, f"{found['n']:,}" if "n" in found else f"{len(found['tasks'])} tasks"
        for metric, value in found.items():
            error = metric.replace(",", "_stderr,", 1) if "," in metric else f"{metric}_stderr"
            if error in found:
                cells = ["-" if number is None else f"{number:,.4f}" for number in (value, found[error])]
                table.add_row(first, rows, metric, *cells)
                first = rows = ""
    return table


def _table(*headers: str) -> Table:
    """A table that breaks long names rather than cutting them."""
    table = Table()
    for header in headers:
        table.add_column(header, overflow="fold")
    return table


def _mean(values: list[float]) -> float:
    return sum(values) / len(values)
