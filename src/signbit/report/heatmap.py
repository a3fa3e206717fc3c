"""Layers as a picture: one column a block, one row a kind of linear.

A heat map has no text in it and no shape of its own: it is stretched to the width that there is, names stand beside it
as text of the page. Values are told by nine steps of one hue, dark on light pages and light on dark ones, which do not
depend on telling hues apart.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from markupsafe import Markup

from signbit.report.figures import significant
from signbit.report.making import Making

STEPS = 9
_MEASURED = {
    "bits_per_weight": ("Bits of each layer", "bits a weight, counted from the file"),
    "output_error": ("Error of each layer's output", "relative squared error on the calibration text"),
    "weight_error": ("Error of each layer's weights", "|W − Q| / |W|"),
}


@dataclass(frozen=True)
class Layers:
    """Values of linears by kind and block; of several of a kind in one block (experts) their means."""

    kinds: list[str]
    blocks: int
    values: dict[str, dict[tuple[str, int], float]]  # by what is measured

    @classmethod
    def of(cls, layers: Sequence[dict[str, Any]], keys: Iterable[str]) -> Layers:
        """layers: as ``inspect`` lists them. keys: what of them is wanted; those without a value are left out."""
        places = [_place(layer["name"]) for layer in layers]
        values: dict[str, dict[tuple[str, int], float]] = {}
        for key in keys:
            found: dict[tuple[str, int], list[float]] = {}
            for place, layer in zip(places, layers, strict=True):
                if layer.get(key) is not None:
                    found.setdefault(place, []).append(layer[key])
            if found:
                values[key] = {place: sum(of_place) / len(of_place) for place, of_place in found.items()}
        blocks = 1 + max((block for _, block in places), default=-1)
        return cls(list(dict.fromkeys(kind for kind, _ in places)), blocks, values)


def _place(name: str) -> tuple[str, int]:
    """(kind, block) of a linear: "model.layers.3.mlp.experts.7.up_proj" is ("mlp.experts.*.up_proj", 3)."""
    parts = name.split(".")
    at = next((i for i, part in enumerate(parts) if part.isdecimal()), None)
    if at is None:
        return name, 0
    return ".".join("*" if part.isdecimal() else part for part in parts[at + 1 :]), int(parts[at])


@dataclass(frozen=True)
class Shades:
    """Nine steps from ``low`` to ``high``, even ones of logarithms if ``log``."""

    low: float
    high: float
    log: bool

    @classmethod
    def over(cls, values: Sequence[float], *, log: bool) -> Shades:
        """Those that hold all of ``values``. Zeros, which have no logarithm, go with the smallest of the rest."""
        positive = [value for value in values if value > 0] if log else list(values)
        return cls(min(positive, default=1.0), max(positive, default=1.0), log)

    def step(self, value: float) -> int:
        if self.log:
            share = math.log(max(value, self.low) / self.low) / (math.log(self.high / self.low) or 1.0)
        else:
            share = (value - self.low) / (self.high - self.low or 1.0)
        return min(int(share * STEPS), STEPS - 1)

    def edges(self) -> list[str]:
        """What the ends and the middle of the steps stand for."""
        middle = math.sqrt(self.low * self.high) if self.log else (self.low + self.high) / 2
        return [significant(edge) for edge in (self.low, middle, self.high)]


def heatmap(layers: Layers, key: str, kinds: Sequence[str], shades: Shades, title: str) -> Markup:
    """One cell for each kind and block; where there is no such linear, none."""
    cells = []
    values = layers.values[key]
    for row, kind in enumerate(kinds):
        for block in range(layers.blocks):
            value = values.get((kind, block))
            if value is not None:
                cells.append(
                    Markup('<rect x="{}" y="{}" class="h{}"><title>{} of block {}: {}</title></rect>').format(
                        block, row, shades.step(value), kind, block, significant(value, 4)
                    )
                )
    return Markup(
        '<svg class="heat" viewBox="0 0 {} {}" preserveAspectRatio="none" role="img" aria-label="{}">\n{}\n</svg>'
    ).format(layers.blocks, len(kinds), title, Markup("\n").join(cells))


def heat_maps(makings: Sequence[tuple[str, Making]]) -> list[dict[str, Any]]:
    """Heat maps of what is known of layers: one scale for all models, so that they can be compared."""
    known = [(label, Layers.of(making.layers, _MEASURED)) for label, making in makings if making.layers]
    wanted = [key for key in _MEASURED if any(key in layers.values for _, layers in known)]
    if all("output_error" in layers.values for _, layers in known) and "weight_error" in wanted:
        wanted.remove("weight_error")  # what a layer puts out is what counts, where it is known
    maps = []
    for key in wanted:
        title, unit = _MEASURED[key]
        having = [(label, layers) for label, layers in known if key in layers.values]
        values = [value for _, layers in having for value in layers.values[key].values()]
        shades = Shades.over(values, log=key != "bits_per_weight")
        kinds = list(dict.fromkeys(kind for _, layers in having for kind in layers.kinds))
        maps.append(
            {
                "title": title,
                "unit": unit,
                "edges": shades.edges() if shades.low < shades.high else shades.edges()[:1],
                "kinds": dict(zip(kinds, _short_kinds(kinds), strict=True)),
                "models": [
                    {
                        "label": label,
                        "lowest": min(layers.values[key].values()),
                        "highest": max(layers.values[key].values()),
                        "layers": layers,
                        "svg": heatmap(
                            layers, key, kinds, shades, f"{title}{f' of {label}' if label else ''}, by kind and block"
                        ),
                        "values": layers.values[key],
                    }
                    for label, layers in having
                ],
            }
        )
    return maps


def _short_kinds(kinds: Sequence[str]) -> list[str]:
    """The last parts of names where these tell them apart."""
    short = [kind.rpartition(".")[2] for kind in kinds]
    return short if len(set(short)) == len(short) else list(kinds)
