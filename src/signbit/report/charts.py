"""Charts as SVG: a few elements each, so that a page of them is light, prints well and can be read aloud.

Colours are the page's (templates/style.css): elements have classes, and a dark page is dark here too. An SVG that is
stretched stretches its text, so each chart is drawn twice, for wide and for narrow pages; the style sheet shows one.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

from markupsafe import Markup

from signbit.report.figures import fixed, significant, tick

# Width of a character, in its height: what labels are kept apart by, since nothing here can measure text.
_ASPECT = 0.56
_FONT = 12
_LONGEST_LABEL = 26
# A model that predicts nothing may have a perplexity of 10^300; it is drawn at the edge of a picture of the others.
_DECADES = 5


@dataclass(frozen=True)
class Point:
    x: float
    y: float
    label: str


@dataclass(frozen=True)
class Box:
    left: float
    top: float
    right: float
    bottom: float

    def overlap(self, other: Box) -> float:
        """The area that two boxes share."""
        wide = min(self.right, other.right) - max(self.left, other.left)
        high = min(self.bottom, other.bottom) - max(self.top, other.top)
        return max(wide, 0.0) * max(high, 0.0)


class Axis:
    """Values to pixels, linearly or by their logarithms."""

    def __init__(self, values: Sequence[float], start: float, end: float, *, log: bool) -> None:
        low, high = min(values), max(values)
        self.log = log and low > 0
        if self.log:
            high = min(high, low * 10.0**_DECADES)
            margin = max((high / low) ** 0.08, 1.06)
            self.low, self.high = low / margin, high * margin
        else:
            margin = 0.08 * (high - low) or 0.1 * abs(high) or 1.0
            self.low, self.high = low - margin, high + margin
        self.start, self.end = start, end

    def __call__(self, value: float) -> float:
        value = min(max(value, self.low), self.high)
        if self.log:
            share = math.log(value / self.low) / math.log(self.high / self.low)
        else:
            share = (value - self.low) / (self.high - self.low)
        return self.start + share * (self.end - self.start)

    def ticks(self, most: int = 6) -> list[float]:
        """Round numbers within the axis: as many as there may be of the roundest that are enough."""
        found: list[float] = []
        if self.log and self.high / self.low > 2.5:
            decades = range(math.floor(math.log10(self.low)), math.ceil(math.log10(self.high)) + 1)
            for steps in ((1.0,), (1.0, 3.0), (1.0, 2.0, 5.0), (1.0, 1.5, 2.0, 3.0, 4.0, 6.0, 8.0)):
                ticks = [float(f"{m}e{d}") for d in decades for m in steps if self.low <= m * 10.0**d <= self.high]
                if len(ticks) <= most:
                    found = ticks
            return found
        for power in range(-12, 13):
            for step in (1.0, 2.0, 5.0):
                size = float(f"{step}e{power + math.floor(math.log10(self.high - self.low))}")
                first, last = math.ceil(self.low / size), math.floor(self.high / size)
                if last - first + 1 <= most:
                    return [float(f"{i * size:.12g}") for i in range(first, last + 1)]
        return found


def scatter(
    points: Sequence[Point],
    references: Sequence[tuple[float, str]],
    *,
    x: str,
    y: str,
    less_is_better: bool,
    title: str,
) -> tuple[Markup, Markup]:
    """Points with their names beside them, and a line through those that no other beats in both; wide and narrow.

    references: (y, name) of what has no place on the x axis, drawn as lines across. x, y: what the axes show.
    """

    def draw(plot: _Plot) -> Markup:
        heights = [*(point.y for point in points), *(value for value, _ in references)]
        plot.axes([point.x for point in points], heights, x, y, log=(True, less_is_better))
        plot.placed += [Box(at - 6, level - 6, at + 6, level + 6) for at, level in map(plot.place, points)]
        for value, label in references:
            plot.reference(value, f"{_shorten(label)} {shown(value)}")
        best = _front(points, less_is_better)
        if len(best) > 1:
            steps = [("M{:.1f} {:.1f}" if point is best[0] else "H{:.1f}V{:.1f}", point) for point in best]
            plot.add('<path d="{}" class="front"/>', "".join(step.format(*plot.place(point)) for step, point in steps))
            for (x1, y1), (x2, y2) in pairwise(map(plot.place, best)):
                plot.placed += [Box(x1, y1 - 1, x2, y1 + 1), Box(x2 - 1, min(y1, y2), x2 + 1, max(y1, y2))]
        for point in points:
            note = f"{point.label}: {significant(point.x)} bits, {shown(point.y)}"
            plot.point(point, note, "best" if point in best else "beaten")
        return plot.svg(title)

    def shown(value: float) -> str:
        return significant(value) if less_is_better else fixed(value, 1)

    return draw(_Plot("wide", 540, 340)), draw(_Plot("narrow", 350, 310))


def _front(points: Sequence[Point], less_is_better: bool) -> list[Point]:
    """Those that are better than all that are not larger, from the smallest on."""
    best: list[Point] = []
    sign = 1 if less_is_better else -1
    for point in sorted(points, key=lambda one: (one.x, sign * one.y)):
        if not best or sign * point.y < sign * best[-1].y:
            best.append(point)
    return best


def curve(points: Sequence[tuple[float, float]], *, x: str, y: str, title: str) -> tuple[Markup, Markup]:
    """One line through (x, y) points; wide and narrow."""

    def draw(plot: _Plot) -> Markup:
        plot.axes([at for at, _ in points], [value for _, value in points], x, y, log=(False, True))
        places = (plot.place(Point(at, value, "")) for at, value in points)
        plot.add('<path d="M{}" class="curve"/>', "L".join(f"{at:.1f} {level:.1f}" for at, level in places))
        return plot.svg(title)

    return draw(_Plot("wide", 540, 260)), draw(_Plot("narrow", 350, 240))


def interval(value: float, error: float | None, low: float, high: float, reference: float | None) -> Markup:
    """A dot with a bar of one standard error to each side, on an axis from ``low`` to ``high``, in percent of the
    width; beside it stands the number, so it is hidden from those who hear the page."""

    def at(number: float) -> float:
        return 100 * min(max((number - low) / (high - low or 1.0), 0.0), 1.0)

    drawn = []
    if reference is not None:
        place = f"{at(reference):.2f}%"
        drawn.append(Markup('<line x1="{0}" x2="{0}" y1="0" y2="100%" class="reference"/>').format(place))
    if error is not None:
        drawn.append(
            Markup('<line x1="{:.2f}%" x2="{:.2f}%" y1="50%" y2="50%" class="error"/>').format(
                at(value - error), at(value + error)
            )
        )
    drawn.append(Markup('<circle cx="{:.2f}%" cy="50%" r="4" class="best"/>').format(at(value)))
    return Markup('<svg class="interval" aria-hidden="true">{}</svg>').format(Markup("").join(drawn))


def standalone(chart: Markup, style: str) -> str:
    """A chart as a file of its own, on the page's background: whoever shows it may not follow the reader's colours."""
    opening, body = str(chart).split("\n", 1)
    return f"{opening}\n<style>\n{style}\n</style>\n<rect width='100%' height='100%' fill='var(--page)'/>\n{body}\n"


# Parts ---------------------------------------------------------------------------------------------------------------


class _Plot:
    """A chart with axes, as it is drawn."""

    across: Axis
    up: Axis

    def __init__(self, name: str, wide: int, high: int) -> None:
        self.name, self.wide, self.high = name, wide, high
        self.frame = Box(50, 26, wide - 8, high - 38)
        self.drawn: list[Markup] = []
        self.placed: list[Box] = []  # what names must not be written over

    def add(self, form: str, *values: float | str) -> None:
        self.drawn.append(Markup(form).format(*values))

    def line(self, x1: float, y1: float, x2: float, y2: float, kind: str) -> None:
        self.add('<line x1="{:.1f}" y1="{:.1f}" x2="{:.1f}" y2="{:.1f}" class="{}"/>', x1, y1, x2, y2, kind)

    def text(self, x: float, y: float, text: str, kind: str) -> None:
        self.add('<text x="{:.1f}" y="{:.1f}" class="{}">{}</text>', x, y, kind, text)

    def place(self, point: Point) -> tuple[float, float]:
        return self.across(point.x), self.up(point.y)

    def axes(self, xs: Sequence[float], ys: Sequence[float], x: str, y: str, log: tuple[bool, bool]) -> None:
        frame = self.frame
        self.across = Axis(xs, frame.left, frame.right, log=log[0])
        self.up = Axis(ys, frame.bottom, frame.top, log=log[1])
        self.text(0, 12, y, "title")
        for value in self.up.ticks():
            level = self.up(value)
            self.line(frame.left, level, frame.right, level, "grid")
            self.text(frame.left - 7, level + 4, tick(value), "end")
        self.line(frame.left, frame.bottom, frame.right, frame.bottom, "axis")
        for value in self.across.ticks(6 if self.name == "wide" else 5):
            at = self.across(value)
            self.line(at, frame.bottom, at, frame.bottom + 4, "axis")
            self.text(at, frame.bottom + 17, tick(value), "middle")
        self.text(frame.right, self.high - 4, x, "title end")

    def reference(self, value: float, text: str) -> None:
        """A line across. It is no obstacle that a name could not cross, but what is written on it is."""
        level = self.up(value)
        self.line(self.frame.left, level, self.frame.right, level, "reference")
        ends = ((self.frame.right, -1), (self.frame.left + 6, 1))
        self.label(text, [(at, level + down, side) for down in (-5, 14) for at, side in ends], "quiet")

    def point(self, point: Point, note: str, kind: str) -> None:
        at, level = self.place(point)
        self.add('<circle cx="{:.1f}" cy="{:.1f}" r="4.5" class="{}"><title>{}</title></circle>', at, level, kind, note)
        spots = [(at + 9, level + 4, 1), (at - 9, level + 4, -1), (at, level - 10, 0), (at, level + 19, 0)]
        spots += [(at + side * 7, level + down, side) for down in (-8, 16, -20, 28) for side in (1, -1)]
        beyond = " ↑" if point.y > self.up.high else ""
        self.label(_shorten(point.label) + beyond, spots, kind)

    def label(self, text: str, spots: Sequence[tuple[float, float, int]], kind: str) -> None:
        """``text`` at the first spot where it meets nothing, or else at the one where it meets least.

        spots: (x, y of the baseline, 1 if the text begins there, -1 if it ends there, 0 if it is centred).
        """

        def box_at(spot: tuple[float, float, int]) -> Box:
            x, y, side = spot
            width = _ASPECT * _FONT * len(text)
            start = x - width * (1 - side) / 2
            return Box(start, y - 10, start + width, y + 3)

        def cost(spot: tuple[float, float, int]) -> float:
            box = box_at(spot)
            area = (box.right - box.left) * (box.bottom - box.top)
            return round(area - box.overlap(self.frame) + sum(box.overlap(other) for other in self.placed), 3)

        chosen = min(spots, key=cost)
        self.placed.append(box_at(chosen))
        self.text(chosen[0], chosen[1], text, f"{kind} {('middle', 'start', 'end')[chosen[2]]}")

    def svg(self, title: str) -> Markup:
        return Markup(
            '<svg class="chart {}" viewBox="0 0 {} {}" role="img" aria-label="{}" xmlns="http://www.w3.org/2000/svg">\n'
            "{}\n</svg>"
        ).format(self.name, self.wide, self.high, title, Markup("\n").join(self.drawn))


def _shorten(label: str) -> str:
    return label if len(label) <= _LONGEST_LABEL else f"{label[: _LONGEST_LABEL - 1]}…"
