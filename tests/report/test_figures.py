"""Numbers as people read them."""

import math

import pytest

from signbit.report.figures import fixed, percent, significant, size, tick


@pytest.mark.parametrize(
    ("value", "shown"),
    [
        (None, "–"), (math.nan, "–"), (math.inf, "–"), (0.0, "0"), (20.94, "20.9"), (0.03849, "0.0385"),
        (9.999, "10.0"), (1399.4, "1,399"), (406_896.0, "406,896"), (13_863_869.0, "1.4 × 10⁷"),
        (1e304, "1.0 × 10³⁰⁴"), (2e-9, "2.0 × 10⁻⁹"), (-3.14159, "-3.14"), (9_999_999.9, "1.0 × 10⁷"),
    ],
)  # fmt: skip
def test_significant(value: float | None, shown: str) -> None:
    assert significant(value) == shown


def test_others() -> None:
    assert (fixed(2.9493), fixed(None), fixed(1234.5, 1)) == ("2.95", "–", "1,234.5")
    assert (percent(0.1504), percent(None)) == ("15.0 %", "–")
    assert [size(n) for n in (None, 12, 1500, 67_620_768, 13e9)] == ["–", "12 bytes", "1.50 kB", "67.6 MB", "13.0 GB"]
    assert [tick(n) for n in (0.5, 1.0, 1000.0, 1e6, 3e300)] == ["0.5", "1", "1,000", "10⁶", "3 × 10³⁰⁰"]
