"""Quality against measured speed: parent, child, controls, and what the search foresaw."""

from __future__ import annotations

from typing import Any

from markupsafe import Markup

from intarsia.report.run import Contender, contenders
from intarsia.report.scale import Scale, fit, spread
from intarsia.report.svg import el, line, marker, path, picture, text
from intarsia.report.wording import finite, number, tick, times, with_error


def curve(summary: dict[str, Any]) -> list[tuple[float, float]]:
    """(speed-up, KL) that the search foresees at each target it was asked for, slow to fast; KL above 0 only."""
    rows = [
        (finite(r.get("speedup_predicted")), finite(r.get("kl_predicted"))) for r in summary.get("alternatives") or []
    ]
    return sorted((s, k) for s, k in rows if s is not None and k is not None and k > 0)


def frontier(summary: dict[str, Any], width: float, height: float, class_: str) -> Markup | None:
    """Scatter of KL (lower is better) over measured speed-up; None where no model was measured."""
    models = [c for c in contenders(summary) if c.value("speedup_measured") and c.value("kl") is not None]
    if not models:
        return None
    x, y, baseline = _scales(summary, models, width, height)
    parts = [*_axes(x, y, baseline, width, height), _foreseen(summary, x, y)]
    parts += [_fall(c, x, y) for c in models]
    parts += [part for c in models for part in _errors(c, x, y)]
    parts.append(marker("ring", x(1.0), baseline, 6, "k-parent", "the parent: speed 1, KL 0 by definition"))
    parts.append(text(x(1.0) + 12, baseline - 9, "parent", class_="muted"))
    for c in reversed(models):
        parts.append(
            marker(
                c.shape,
                x(c.value("speedup_measured")),
                y(c.value("kl")),
                7.5 if c.name == "child" else 6,
                c.class_,
                _tip(c),
            )
        )
    parts += _labels(models, x, y, width)
    return picture(width, height, *parts, label="KL to the parent against measured speed-up", class_=class_)


def _scales(
    summary: dict[str, Any], models: list[Contender], width: float, height: float
) -> tuple[Scale, Scale, float]:
    speeds = [v for c in models for v in (c.value("speedup_measured"), c.value("speedup_predicted")) if v]
    slowest, fastest = min(1.0, *speeds), max(1.0, *speeds)  # a hybrid may be slower at a short context
    room = 96  # for the names at the right
    x = Scale(slowest - 0.02 * fastest, 1.0 + (fastest - 1.0) * 1.25 + 0.02, 56, width - room)
    values = [v for c in models for v in (c.value("kl"), c.value("kl_before_distillation")) if v and v > 0]
    seen = [k for s, k in curve(summary) if s <= x.hi and k >= 0.2 * min(values, default=1.0)]
    baseline = height - 46
    log = max(values + seen, default=1) / min(values + seen, default=1) > 8
    y = fit(values + seen, baseline - (26 if log else 0), 30, log=log, zero=True)
    return x, y, baseline


def _axes(x: Scale, y: Scale, baseline: float, width: float, height: float) -> list[Markup]:
    parts = []
    ticks = y.ticks(6)
    for value in ticks:
        if value > 0:
            parts += [
                line(x.start, y(value), x.stop, y(value), "grid"),
                text(46, y(value) + 4, tick(value), "end", "muted"),
            ]
    parts += [line(x.start, baseline, x.stop, baseline), text(46, baseline + 4, "0", "end", "muted")]
    if y.log:  # zero stands on a floor of its own below a logarithmic axis
        parts.append(el("path", d=f"M{x.start - 5} {baseline - 10}l10 -4m-10 9l10 -4", class_="rule"))
    for value in x.ticks(6 if width > 600 else 4):
        parts += [
            line(x(value), baseline, x(value), baseline + 5),
            text(x(value), baseline + 20, f"{value:g} ×", "middle", "muted"),
        ]
    parts.append(text(x.start, 14, "KL to the parent, nats a token (lower is better)", class_="muted"))
    parts.append(text(x.stop, height - 6, "measured speed-up →", "end", "muted"))
    return parts


def _foreseen(summary: dict[str, Any], x: Scale, y: Scale) -> Markup | None:
    inside = [(s, k) for s, k in curve(summary) if not x.outside(s) and not y.outside(k)]
    if len(inside) < 2:
        return None
    dots = [(x(s), y(k)) for s, k in inside]
    name = text(dots[0][0] + 10, dots[0][1] + 15, "foreseen by the search", class_="muted small")
    return el("g", path(dots, "foreseen"), name)


def _fall(c: Contender, x: Scale, y: Scale) -> Markup | None:
    """How far distillation brought a model down."""
    before = c.value("kl_before_distillation")
    if before is None or before <= 0:
        return None
    at = x(c.value("speedup_measured"))
    return el(
        "g",
        line(at, y(before), at, y(c.value("kl")), f"fall {c.class_}"),
        marker(
            "ring",
            at,
            y(before),
            3,
            f"hollow {c.class_}",
            f"{c.name} before distillation: {number(before)} nats",
        ),
    )


def _errors(c: Contender, x: Scale, y: Scale) -> list[Markup]:
    at, kl, se = x(c.value("speedup_measured")), c.value("kl"), c.value("kl_se")
    parts = []
    if se:
        parts.append(line(at, y(kl - 1.96 * se), at, y(kl + 1.96 * se), f"error {c.class_}"))
    ends = [finite(v) for v in c.data.get("speedup_measured_spread") or []]
    if len(ends) == 2 and None not in ends:
        parts.append(line(x(ends[0]), y(kl), x(ends[1]), y(kl), f"error {c.class_}"))
    return parts


def _labels(models: list[Contender], x: Scale, y: Scale, width: float) -> list[Markup]:
    """Names in one column at the right, kept apart, with a hair from each to its mark."""
    wanted = [y(c.value("kl")) for c in models]
    at = x.stop + 8
    parts = []
    for c, mark, place in zip(models, wanted, spread(wanted, 18, 24, y.start)):
        begin = x(c.value("speedup_measured")) + 10
        parts.append(path([(begin, mark), (max(begin, at - 26), mark), (at - 4, place)], "hair"))
        parts.append(
            text(
                at,
                place + 4,
                f"{c.name} {number(c.value('kl'), 2)}",
                class_="strong" if c.name == "child" else None,
            )
        )
    return parts


def _tip(c: Contender) -> str:
    return (
        f"{c.name}: {times(c.value('speedup_measured'))} measured\n"
        f"KL {with_error(c.value('kl'), c.value('kl_se'))} nats"
        f"\nbefore distillation {number(c.value('kl_before_distillation'))}"
        f"\nas assembled {number(c.value('kl_assembled'))}"
    )
