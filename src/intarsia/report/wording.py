"""Numbers as a person reads them: a few digits, a unit, an error. What is missing or not finite is a dash."""

from __future__ import annotations

import math
from typing import Any

from intarsia.base.progress import duration

DASH = "–"


def finite(value: Any) -> float | None:
    """The value as a float, or None when it is absent, no number, NaN or infinite."""
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
        return None
    return float(value)


def number(value: Any, digits: int = 3) -> str:
    """Significant digits without exponents where they can be avoided: 0.0123, 1.34, 457."""
    value = finite(value)
    if value is None:
        return DASH
    if value == 0:
        return "0"
    size = math.floor(math.log10(abs(value)))
    if size < -4 or size > 6:
        return f"{value:.{digits - 1}e}"
    return f"{value:.{max(0, digits - 1 - size)}f}"


def tick(value: float) -> str:
    return f"{value:.4g}"


def with_error(value: Any, se: Any = None, digits: int = 3) -> str:
    """`0.320 ± 0.010`; the error is rounded to the digits of the value."""
    value, se = finite(value), finite(se)
    shown = number(value, digits)
    if value is None or not se:
        return shown
    places = len(shown.partition(".")[2]) if "e" not in shown else 6
    error = f"{se:.{places}f}"
    return f"{shown} ± {error if float(error) else number(se, 1)}"


def percent(value: Any, se: Any = None, places: int = 1) -> str:
    value, se = finite(value), finite(se)
    if value is None:
        return DASH
    return f"{100 * value:.{places}f}" + (f" ± {100 * se:.{places}f}" if se else "") + " %"


def _scaled(value: Any, steps: list[tuple[float, str]]) -> str:
    value = finite(value)
    if value is None:
        return DASH
    for size, unit in steps:
        if abs(value) >= size:
            return f"{number(value / size)} {unit}".rstrip()
    size, unit = steps[-1]
    return f"{number(value / size)} {unit}".rstrip()


def count(value: Any) -> str:
    """`134.5 M` parameters or tokens."""
    value = finite(value)
    if value is not None and 1e6 <= abs(value) < 1e9:
        return f"{value / 1e6:.1f} M"
    return _scaled(value, [(1e9, "B"), (1e6, "M"), (1e3, "k"), (1.0, "")])


def size(value: Any) -> str:
    """Decimal bytes: `269 MB`."""
    return _scaled(value, [(1e9, "GB"), (1e6, "MB"), (1e3, "kB"), (1.0, "B")])


def seconds(value: Any) -> str:
    """A time from microseconds to hours."""
    value = finite(value)
    if value is None:
        return DASH
    if value >= 60:
        return duration(value)
    return "0" if value == 0 else _scaled(value, [(1.0, "s"), (1e-3, "ms"), (1e-6, "µs")])


def times(value: Any) -> str:
    """A factor: `1.34 ×`."""
    value = finite(value)
    return DASH if value is None else f"{value:.2f} ×"
