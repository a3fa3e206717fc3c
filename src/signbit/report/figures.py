"""Numbers as people read them: with the digits that mean something, and a dash where nothing is known."""

from __future__ import annotations

import math

NONE = "–"
_SUPERSCRIPTS = str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹")
_UNITS = (("GB", 1e9), ("MB", 1e6), ("kB", 1e3))


def significant(value: float | None, digits: int = 3) -> str:
    """``digits`` significant ones, never fewer than a whole number has: 1,399, 15.3, 0.0385, 1.2 × 10⁹."""
    if value is None or not math.isfinite(value):
        return NONE
    if value == 0:
        return "0"
    exponent = _exponent(float(f"{value:.{digits - 1}e}"))
    if exponent >= 7 or exponent < -4:
        return f"{value / 10.0**exponent:.1f} × {_power(exponent)}"
    return f"{value:,.{max(digits - 1 - exponent, 0)}f}"


def fixed(value: float | None, digits: int = 2) -> str:
    return NONE if value is None else f"{value:,.{digits}f}"


def percent(share: float | None, digits: int = 1) -> str:
    return NONE if share is None else f"{100 * share:.{digits}f} %"


def size(count: float | None) -> str:
    """Bytes, in powers of ten as disks are sold."""
    if count is None:
        return NONE
    for unit, one in _UNITS:
        if count >= one:
            return f"{significant(count / one)} {unit}"
    return f"{count:.0f} bytes"


def tick(value: float) -> str:
    """The label of a tick, which is a round number."""
    if value == 0 or 1e-4 <= abs(value) < 1e5:
        return f"{value:,.10g}"
    exponent = _exponent(value)
    first = f"{value / 10.0**exponent:.0f}"
    return _power(exponent) if first == "1" else f"{first} × {_power(exponent)}"


def _exponent(value: float) -> int:
    return int(f"{value:e}".partition("e")[2])


def _power(exponent: int) -> str:
    return f"10{str(exponent).translate(_SUPERSCRIPTS)}"
