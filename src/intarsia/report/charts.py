"""Small charts that know nothing of runs: rows of dots with errors, deviations, a curve, stacked bars."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from markupsafe import Markup

from intarsia.report.scale import Scale, fit
from intarsia.report.svg import el, line, marker, path, picture, text, tip
from intarsia.report.wording import count, number, tick

WIDTH = 500.0  # a column of the page; on a phone it shrinks by a quarter at most


def room(names: list[str], least: float = 90.0) -> float:
    """Width that row names need at the left of a chart, in the type of the page."""
    return min(max([least, *(7.8 * len(name) + 14 for name in names)]), 0.45 * WIDTH)


@dataclass(frozen=True)
class Dot:
    """One figure of one model. `se` is a standard error; the bar drawn is 95 % (1.96 of them)."""

    name: str
    shape: str
    class_: str
    value: float
    se: float | None = None


def dot_rows(
    rows: list[tuple[str, list[Dot]]],
    *,
    label: str,
    unit: str,
    shown: Callable[[float], str] = tick,
    chance: dict[str, float] | None = None,
) -> Markup:
    """A row per category, a line within it per model. `chance` marks what guessing gives in a row."""
    left, right, gap = room([name for name, _ in rows], 80.0), WIDTH - 14, 11.0
    ends = [d.value + sign * 1.96 * (d.se or 0) for _, dots in rows for d in dots for sign in (-1, 1)]
    x = fit(ends + list((chance or {}).values()), left, right, log=False)
    parts, y = [], 10.0
    for index, (name, dots) in enumerate(rows):
        high = gap * len(dots) + 14
        if index:
            parts.append(line(0, y - 1, right, y - 1, "grid"))
        parts.append(text(0, y + high / 2 + 3, name, class_="strong" if name in ("all", "mean") else None))
        if chance and name in chance:
            at = x(chance[name])
            parts.append(
                el(
                    "line",
                    tip(f"guessing: {shown(chance[name])}"),
                    x1=at,
                    y1=y + 2,
                    x2=at,
                    y2=y + high - 4,
                    class_="chance",
                )
            )
        for k, dot in enumerate(dots):
            parts += _dot(dot, x, y + 12 + gap * k, f"{name}, ", shown)
        y += high
    return picture(WIDTH, y + 42, *_bottom(x, y + 2, unit, shown), *parts, label=label)


def _dot(dot: Dot, x: Scale, y: float, where: str, shown: Callable[[float], str]) -> list[Markup]:
    error = f" ± {shown(dot.se)}" if dot.se else ""
    words = f"{where}{dot.name}: {shown(dot.value)}{error}"
    bar = (
        line(x(dot.value - 1.96 * dot.se), y, x(dot.value + 1.96 * dot.se), y, f"error {dot.class_}")
        if dot.se
        else None
    )
    return [part for part in (bar, marker(dot.shape, x(dot.value), y, 4.2, dot.class_, words)) if part]


def _bottom(x: Scale, y: float, unit: str, shown: Callable[[float], str]) -> list[Markup]:
    parts = [line(x.start, y, x.stop, y), text(x.stop, y + 36, unit, "end", "muted")]
    for value in x.ticks(5):
        parts.append(line(x(value), 6, x(value), y, "grid"))
        parts.append(text(x(value), y + 18, shown(value), "middle", "muted"))
    return parts


def deviations(rows: list[tuple[str, float, float, str, str, str]], *, label: str) -> Markup:
    """Dumbbells from what was measured (a line at zero) to what was predicted, in per cent of the measured.

    Rows are (name, predicted, measured, predicted as text, measured as text, mark class). Far ones are clipped.
    """
    left, right, high = room([r[0] for r in rows]), WIDTH - 112, 30.0
    offsets = [100 * (p / m - 1) for _, p, m, _, _, _ in rows]
    reach = min(max([5.0, *(abs(o) * 1.12 for o in offsets)]), 60.0)
    x = Scale(-reach, reach, left, right)
    bottom = 26 + high * len(rows)
    parts = [
        el("rect", x=x(-5), y=20, width=x(5) - x(-5), height=bottom - 20, class_="band"),
        line(x(0), 20, x(0), bottom),
        text(WIDTH, 12, "predicted / measured", "end", "muted small"),
        text(x(0), bottom + 34, "prediction off by, % of the measured", "middle", "muted"),
    ]
    for value in x.ticks(5):
        parts.append(text(x(value), bottom + 17, f"{value:+g}".replace("-", "−") if value else "0", "middle", "muted"))
    for k, ((name, _, _, predicted, measured, class_), offset) in enumerate(zip(rows, offsets)):
        y = 26 + high * (k + 0.5)
        words = f"{name}: predicted {predicted}, measured {measured} ({offset:+.1f} %)"
        parts += [
            text(0, y + 4, name),
            line(x(0), y, x(offset), y, f"bell {class_}"),
            marker("ring", x(0), y, 3.6, f"hollow {class_}"),
            marker("circle", x(offset), y, 5, class_, words),
        ]
        if x.outside(offset):
            parts.append(
                text(
                    x(offset) + (-9 if offset > 0 else 9),
                    y - 7,
                    f"{offset:+.0f} %",
                    "end" if offset > 0 else "start",
                    "muted small",
                )
            )
        parts.append(text(WIDTH, y + 4, f"{predicted} / {measured}", "end", "muted small"))
    return picture(WIDTH, bottom + 42, *parts, label=label)


def _trim(shown: str) -> str:
    """`10.0 ms` as an axis says it: `10 ms`."""
    value, _, unit = shown.partition(" ")
    return f"{value.rstrip('0').rstrip('.') if '.' in value else value} {unit}".rstrip()


def curve(points: list[tuple[float, float]], *, label: str, unit: str) -> Markup:
    """A falling curve over tokens, its first and last value written out."""
    left, right, bottom = 46.0, WIDTH - 62, 216.0
    x = Scale(0.0, max(max(p[0] for p in points), 1.0), left, right)
    y = fit([p[1] for p in points], bottom, 34, log=False, zero=True)
    parts = []
    for value in y.ticks(5):
        parts += [
            line(left, y(value), right, y(value), "grid" if value else "rule"),
            text(left - 8, y(value) + 4, tick(value), "end", "muted"),
        ]
    for value in x.ticks(4):
        parts.append(text(x(value), bottom + 20, count(value) if value else "0", "middle", "muted"))
    dots = [(x(a), y(b)) for a, b in points]
    parts.append(path(dots, "line k-child"))
    parts += [
        marker("circle", *at, 3.4, "k-child", f"{count(a)} tokens: {number(b)} nats")
        for at, (a, b) in zip(dots, points)
    ]
    parts.append(text(dots[-1][0] + 10, dots[-1][1] + 4, number(points[-1][1]), class_="strong"))
    if len(points) > 1:
        parts.append(text(dots[0][0] + 9, dots[0][1] - 6, number(points[0][1]), class_="muted"))
    parts += [
        text(left, 13, unit, class_="muted"),
        text(right, bottom + 40, "tokens distilled", "end", "muted"),
    ]
    return picture(WIDTH, bottom + 48, *parts, label=label)


def stacked(
    rows: list[tuple[str, list[tuple[str, float]], str]],
    *,
    label: str,
    unit: str,
    shown: Callable[[float], str],
    groups: list[int] | None = None,
) -> Markup:
    """Horizontal bars of stacked parts. Rows are (name, [(class, value)], tip); rows in `groups` open one."""
    left, right, high = room([name for name, _, _ in rows]), WIDTH - 66, 20.0
    x = fit([sum(v for _, v in parts) for _, parts, _ in rows], left, right, log=False, zero=True)
    drawn, y = [], 12.0
    for index, (name, parts, words) in enumerate(rows):
        if groups and index in groups and index:
            y += 10
        drawn.append(text(left - 10, y + 12, name, "end"))
        total, bars = 0.0, []
        for class_, value in parts:
            bars.append(
                el(
                    "rect",
                    x=x(total),
                    y=y,
                    width=max(x(total + value) - x(total) - 0.6, 0.4),
                    height=high - 7,
                    rx=1.5,
                    class_=class_,
                )
            )
            total += value
        drawn += [el("g", tip(words), *bars), text(x(total) + 7, y + 11, shown(total), class_="muted small")]
        y += high
    axis = [line(left, 6, left, y), text(right, y + 34, unit, "end", "muted")]
    for value in x.ticks(4):
        axis += [
            line(x(value), 6, x(value), y, "grid"),
            text(x(value), y + 16, _trim(shown(value)) if value else "0", "middle", "muted"),
        ]
    return picture(WIDTH, y + 42, *axis, *drawn, label=label)
