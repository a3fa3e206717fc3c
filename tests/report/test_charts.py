"""Charts, before any browser draws them."""

import xml.etree.ElementTree as ElementTree

import pytest
from hypothesis import given
from hypothesis import strategies as some

from signbit.report.charts import Axis, Point, _front, curve, interval, scatter, standalone

positive = some.floats(1e-3, 1e300)


@given(some.lists(positive, min_size=1, max_size=9), some.booleans())
def test_axes_hold_their_values_and_have_some_ticks(values: list[float], log: bool) -> None:
    axis = Axis(values, 0, 100, log=log)
    assert all(0 <= axis(value) <= 100 for value in values)
    ticks = axis.ticks(6)
    assert 1 <= len(ticks) <= 6
    assert ticks == sorted(set(ticks))
    assert all(axis.low <= tick <= axis.high * (1 + 1e-9) for tick in ticks)


@given(some.lists(some.tuples(positive, positive, some.text(max_size=40)), min_size=1, max_size=8))
def test_any_points_can_be_drawn(found: list[tuple[float, float, str]]) -> None:
    points = [Point(*one) for one in found]
    for chart in scatter(points, [(points[0].y, "<b>")], x="x", y="y", less_is_better=True, title="a < b"):
        assert "nan" not in chart
        assert str(chart).count("<circle") == len(points)


def test_front() -> None:
    points = [Point(3, 1, "c"), Point(1, 3, "a"), Point(2, 3, "beaten"), Point(2, 2, "b"), Point(1, 4, "same size")]
    assert [point.label for point in _front(points, less_is_better=True)] == ["a", "b", "c"]
    assert [point.label for point in _front(points, less_is_better=False)] == ["same size"]


def test_what_is_beyond_all_bounds_is_marked() -> None:
    wide, _ = scatter([Point(1, 20, "good"), Point(1, 1e300, "bad")], [], x="", y="", less_is_better=True, title="")
    assert ">bad ↑<" in wide
    assert ">good<" in wide


def test_small_charts() -> None:
    for chart in curve([(0, 300.0), (100, 40.0)], x="step", y="perplexity", title="<"):
        ElementTree.fromstring(chart)
    ElementTree.fromstring(interval(0.5, 0.1, 0, 1, 0.7))
    ElementTree.fromstring(interval(0.5, None, 0.5, 0.5, None))
    wide, _ = scatter([Point(1, 20, "one")], [], x="", y="", less_is_better=False, title="")
    assert ElementTree.fromstring(standalone(wide, ".a { fill: red }")).tag.endswith("svg")


@pytest.mark.parametrize("label", ["a" * 500, "\x00\x1f\ud7ff", "“<script>”"])
def test_labels_are_text(label: str) -> None:
    for chart in scatter([Point(1, 1, label)], [(1, label)], x=label, y=label, less_is_better=True, title=label):
        assert "<script" not in chart
        assert str(chart).count("<text") < 20
