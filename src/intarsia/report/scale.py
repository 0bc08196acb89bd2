"""From numbers to pixels: linear and logarithmic scales, round ticks, labels that keep apart."""

from __future__ import annotations

import math
from dataclasses import dataclass


@dataclass(frozen=True)
class Scale:
    """Maps [lo, hi] to [start, stop] pixels; values outside are clamped to the ends (see `outside`)."""

    lo: float
    hi: float
    start: float
    stop: float
    log: bool = False

    def __call__(self, value: float) -> float:
        lo, hi, value = self.lo, self.hi, min(max(value, self.lo), self.hi)
        if self.log:
            lo, hi, value = math.log(lo), math.log(hi), math.log(value)
        return self.start + (self.stop - self.start) * (value - lo) / (hi - lo)

    def outside(self, value: float) -> bool:
        return not self.lo <= value <= self.hi

    def ticks(self, count: int = 5) -> list[float]:
        """About `count` round values inside the range."""
        if not self.log:
            return _linear_ticks(self.lo, self.hi, count)
        for mantissas in ((1, 2, 5), (1, 3), (1,)):
            ticks = _log_ticks(self.lo, self.hi, mantissas)
            if len(ticks) <= count + 1:
                return ticks
        return ticks[:: math.ceil(len(ticks) / count)]


def _linear_ticks(lo: float, hi: float, count: int) -> list[float]:
    raw = (hi - lo) / max(count, 1)
    power = 10.0 ** math.floor(math.log10(raw))
    step = power * next((m for m in (1, 2, 2.5, 5, 10) if m * power >= raw * 0.999), 10)
    first = math.ceil(lo / step - 1e-9)
    return [round(i * step, 12) for i in range(first, math.floor(hi / step + 1e-9) + 1)]


def _log_ticks(lo: float, hi: float, mantissas: tuple[int, ...]) -> list[float]:
    powers = range(math.floor(math.log10(lo)), math.ceil(math.log10(hi)) + 1)
    values = [m * 10.0**p for p in powers for m in mantissas]
    return [v for v in values if lo * 0.999 <= v <= hi * 1.001]


def fit(
    values: list[float],
    start: float,
    stop: float,
    *,
    log: bool | None = None,
    zero: bool = False,
    margin: float = 0.06,
) -> Scale:
    """A scale that holds all `values` with some air. `log=None` takes a log axis where they span a factor over 12."""
    values = [v for v in values if math.isfinite(v)]
    if log is None:
        log = bool(values) and min(values) > 0 and max(values) / min(values) > 12
    if log:
        values = [v for v in values if v > 0] or [1.0]
        air = max((max(values) / min(values)) ** margin, 1.15)
        return Scale(min(values) / air, max(values) * air, start, stop, log=True)
    lo, hi = (min(values), max(values)) if values else (0.0, 1.0)
    lo = min(lo, 0.0) if zero else lo
    air = margin * ((hi - lo) or abs(hi) or 1.0)
    return Scale(lo if zero and lo == 0 else lo - air, hi + air, start, stop)


def spread(wanted: list[float], gap: float, lo: float, hi: float) -> list[float]:
    """Positions near `wanted`, in the same order, at least `gap` apart and inside [lo, hi] where they fit."""
    order = sorted(range(len(wanted)), key=lambda i: wanted[i])
    # Merge neighbours that collide into blocks which sit around the mean of what their members want.
    blocks: list[list[int]] = []
    places: list[float] = []  # the first position of each block

    def place(block: list[int]) -> float:
        first = sum(wanted[i] - gap * k for k, i in enumerate(block)) / len(block)
        return max(lo, min(first, hi - gap * (len(block) - 1)))

    for index in order:
        block = [index]
        while blocks and places[-1] + gap * len(blocks[-1]) > place(block):
            block = blocks.pop() + block
            places.pop()
        blocks.append(block)
        places.append(place(block))
    result = list(wanted)
    for first, block in zip(places, blocks):
        for k, index in enumerate(block):
            result[index] = first + gap * k
    return result
