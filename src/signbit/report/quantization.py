"""The record of a quantization: what became of each layer, and what was left alone and why.

Kept beside the weights as signbit_report.json. It holds nothing that differs between two runs of the same recipe, so
that a resumed run ends in the same bytes as an uninterrupted one; timings are only in memory.
"""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from signbit.errors import SignbitError

FILE = "signbit_report.json"


@dataclass
class LayerReport:
    """One quantized linear.

    weight_error: |W - Q| / |W| (Frobenius). output_error: tr(D H D^T) / tr(W H W^T) with D = W - Q, the relative
    squared error of the layer's output on the calibration data; None without calibration. damping: what the Hessian's
    factorization took. notes: anything out of the ordinary.
    """

    name: str
    shape: list[int]
    layout: str
    bits_per_weight: float
    nominal_bits_per_weight: float
    weight_error: float
    output_error: float | None
    damping: float | None
    notes: list[str] = field(default_factory=list)


@dataclass
class QuantizationReport:
    """A whole run. ``unquantized`` maps parameter names to reasons; ``tuning`` has each block's error before and after
    it was tuned, if it was; ``seconds`` is the time by phase."""

    source: str
    fingerprint: str
    layers: list[LayerReport]
    unquantized: dict[str, str]
    tuning: list[tuple[float, float]] = field(default_factory=list)
    seconds: dict[str, float] = field(default_factory=dict)

    @property
    def mean_weight_error(self) -> float:
        return sum(layer.weight_error for layer in self.layers) / max(len(self.layers), 1)

    @property
    def mean_output_error(self) -> float | None:
        errors = [layer.output_error for layer in self.layers if layer.output_error is not None]
        return sum(errors) / len(errors) if errors else None

    def to_json(self) -> str:
        fields = dataclasses.asdict(self)
        del fields["seconds"]
        return json.dumps(fields, indent=1) + "\n"

    @classmethod
    def read(cls, directory: Path) -> QuantizationReport | None:
        """The report of a checkpoint; None if it has none."""
        file = directory / FILE
        if not file.is_file():
            return None
        try:
            fields: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
            fields["layers"] = [LayerReport(**layer) for layer in fields["layers"]]
            return cls(**fields)
        except (ValueError, TypeError, KeyError, OSError) as error:
            raise SignbitError(f"{file} is damaged: remove it, the checkpoint does not need it") from error
