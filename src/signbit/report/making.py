"""How a checkpoint came about, and what became of its layers: all from the files that lie in it."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from signbit.report.command import command_of
from signbit.report.quantization import QuantizationReport
from signbit.training.record import FILE as TRAINING_FILE
from signbit.training.record import Record


@dataclass
class Making:
    """How a checkpoint came about, and what became of its layers; of an original nothing is known.

    layers: as ``inspect`` lists them, in the order of the model where that is known. heldout: of a training, (steps,
    perplexity).
    """

    source: str | None = None
    command: str | None = None
    recipe: dict[str, Any] = field(default_factory=dict)
    layers: list[dict[str, Any]] = field(default_factory=list)
    items: dict[str, int] = field(default_factory=dict)
    unquantized: dict[str, str] = field(default_factory=dict)
    notes: dict[str, int] = field(default_factory=dict)
    heldout: list[tuple[int, float]] = field(default_factory=list)


def making_of(path: Path, inspected: dict[str, Any]) -> Making:
    """How the checkpoint at ``path``, of which ``inspect`` says ``inspected``, was made."""
    report = QuantizationReport.read(path)
    layers = {layer["name"]: layer for layer in inspected["layers"]}
    order = [layer.name for layer in report.layers if layer.name in layers] if report else []
    training = path / TRAINING_FILE
    return Making(
        source=report.source if report else None,
        command=command_of(inspected["recipe"], report.source if report else "MODEL"),
        recipe=inspected["recipe"],
        layers=[layers[name] for name in dict.fromkeys([*order, *layers])],
        items=inspected["items"],
        unquantized=inspected["unquantized"],
        notes=dict(Counter(note for layer in report.layers for note in layer.notes)) if report else {},
        heldout=Record.from_json(training.read_text(encoding="utf-8"), training).heldout if training.is_file() else [],
    )
