"""Pictures of the block library: what every option would cost in KL, what training it brought."""

from __future__ import annotations

import math
import statistics
from typing import Any

from markupsafe import Markup

from intarsia.arch import Block
from intarsia.report.charts import WIDTH, room
from intarsia.report.run import Run, option_state, parent_slots
from intarsia.report.scale import Scale, fit
from intarsia.report.svg import el, line, marker, path, picture, text
from intarsia.report.wording import finite, number, tick, with_error

ZERO = 48.0  # where KL 0 stands, left of the logarithmic axis
MOST_TIPS = 1500  # beyond this many options the strips say less to the pointer, to keep the page small


def chosen(run: Run) -> dict[tuple[int, str], str]:
    rows = (run.summary.get("child") or {}).get("sites") or []
    return {
        (r["layer"], slot): (r.get(slot) or {}).get("option") or "absent" for r in rows for slot in ("attention", "ffn")
    }


def limits(values: list[float]) -> tuple[float, float]:
    """The part of a KL axis worth showing: outliers above six times the 90th percentile are clipped, as are
    values that drown in noise, four decades below."""
    values = sorted(values)
    high = min(values[-1], 6 * values[int(0.9 * (len(values) - 1))])
    positive = [v for v in values if v > 0] or [1e-6]
    low = max(positive[0], high / 1e4)
    return low / 1.3, max(high, low * 10) * 1.25


def strip(run: Run, slot: str) -> Markup | None:
    """Every option of a slot, a row a layer: where its replace-one-block KL lies and which one was chosen."""
    rows = [r for r in run.summary.get("options") or [] if r.get("slot") == slot]
    known = [v for r in rows if (v := finite(r.get("kl"))) is not None and v > 0]
    if not known:
        return None
    lo, hi = limits(known)
    layers = sorted({r["layer"] for r in rows})
    pitch = 17.0 if len(layers) <= 48 else 12.0
    left, right, top = 66.0, WIDTH - 44, 44.0
    bottom = top + pitch * len(layers)
    x = Scale(lo, hi, left, right, log=True)
    parts = _frame(x, slot, top, bottom)
    picks = chosen(run)
    originals = parent_slots(run.summary)
    say = len(run.summary["options"]) <= MOST_TIPS
    for k, layer in enumerate(layers):
        y = top + pitch * (k + 0.5)
        if layer % 5 == 0 or pitch > 14:
            parts.append(text(28, y + 4, str(layer), "end", "muted small" if layer % 5 else "small"))
        original = originals[layer][slot] if layer < len(originals) else None
        mine = [r for r in rows if r["layer"] == layer]
        pick = picks.get((layer, slot))
        parts += _row(mine, pick, original, x, y, say)
    return picture(WIDTH, bottom + 8, *parts, label=f"KL of every {slot} option, layer by layer")


def _frame(x: Scale, slot: str, top: float, bottom: float) -> list[Markup]:
    parts = [
        text(0, 14, "attention" if slot == "attention" else "FFN", class_="strong"),
        text(x.stop, 14, "KL with this one block replaced, nats", "end", "muted"),
        text(28, top - 8, "layer", "end", "muted small"),
        text(ZERO, top - 8, "0", "middle", "muted"),
        line(ZERO, top, ZERO, bottom, "grid"),
    ]
    for value in (v for v in x.ticks(5) if x(v) > ZERO + 34):
        parts += [
            line(x(value), top, x(value), bottom, "grid"),
            text(x(value), top - 8, tick(value), "middle", "muted"),
        ]
    return parts


def _row(rows: list[dict], pick: str | None, original: Block | None, x: Scale, y: float, say: bool) -> list[Markup]:
    parts, beyond = [line(ZERO, y, x.stop, y, "hairline")], []
    kept = original is not None and pick == original.label
    taken = None if kept else next((r for r in rows if r["option"] == pick), None)
    for row in rows:
        state, kl = option_state(row["option"], original), row.get("kl")
        if state == "kept" or not isinstance(kl, (int, float)):
            continue
        if not kl <= x.hi:  # NaN and infinity too
            beyond.append(float(kl))
        elif row is not taken:
            words = f"layer {row['layer']}: {row['option']}, {with_error(kl, row.get('kl_se'))} nats" if say else None
            parts.append(_option(state, row["slot"], x(max(kl, x.lo)), y, words))
    if kept:
        words = f"layer {rows[0]['layer']}: chosen {pick}, the parent’s own, KL 0"
        parts.append(marker("circle", ZERO, y, 4.4, "ring-own", words))
    elif taken is not None and (value := finite(taken.get("kl"))) is not None:
        at = x(max(value, x.lo))
        words = f"layer {rows[0]['layer']}: chosen {pick}, {with_error(value, taken.get('kl_se'))} nats"
        parts += [line(ZERO, y, at, y, "reach"), marker("circle", at, y, 5, "k-child", words)]
    return parts + _beyond(beyond, x, y)


def _beyond(values: list[float], x: Scale, y: float) -> list[Markup]:
    """An arrow at the right end with the worst of the values that lie past it, and how many they are."""
    if not values:
        return []
    worst = max(v if math.isfinite(v) else math.inf for v in values)
    many = f" ×{len(values)}" if len(values) > 1 else ""
    said = ("∞" if worst == math.inf else number(worst, 2)) + many
    arrow = el("path", d=f"M{x.stop + 4:.1f} {y - 4:.1f}l5 4l-5 4z", class_="o-far")
    return [arrow, text(x.stop + 12, y + 4, said, class_="muted small")]


def _option(state: str, slot: str, x: float, y: float, words: str | None) -> Markup:
    shape, radius = {"linear": ("diamond", 3.2), "absent": ("ring", 3.2)}.get(state, ("circle", 2.8))
    return marker(shape, x, y, radius, f"o-{state if state in ('mamba', 'linear', 'absent') else slot}", words)


def by_option(rows: list[dict[str, Any]], key: str) -> dict[tuple[str, str], list[float]]:
    """The finite values of `key` per (slot, option), in the order in which options first appear."""
    result: dict[tuple[str, str], list[float]] = {}
    for row in rows:
        if (value := finite(row.get(key))) is not None:
            result.setdefault((row["slot"], row["option"]), []).append(value)
    return result


def losses(run: Run) -> Markup | None:
    """Local loss of each kind of option before and after training: medians over layers, with the middle half."""
    rows = [r for r in run.summary.get("options") or [] if finite(r.get("loss_after"))]
    before, after = by_option(rows, "loss_before"), by_option(rows, "loss_after")
    names = [n for n in after if n in before and option_state(n[1], None) != "absent"]
    if not names:
        return None
    values = [v for n in names for v in (*quartiles(before[n]), *quartiles(after[n])) if v > 0]
    left, right, high, top = room([_loss_name(n) for n in names]), WIDTH - 18, 22.0, 14.0
    x = fit(values, left, right)
    bottom = top + high * len(names) + (10 if len({s for s, _ in names}) > 1 else 0)
    parts = [
        text(
            right,
            bottom + 36,
            "normalised MSE against the parent's block, median over layers",
            "end",
            "muted",
        )
    ]
    for value in x.ticks(5):
        parts += [
            line(x(value), top - 6, x(value), bottom, "grid"),
            text(x(value), bottom + 18, tick(value), "middle", "muted"),
        ]
    y, last = top, None
    for name in names:
        y += 10 if last not in (None, name[0]) else 0
        last = name[0]
        parts += _loss_row(name, before[name], after[name], x, y + high / 2 - 2, left)
        y += high
    return picture(WIDTH, bottom + 42, *parts, label="Local loss before and after training, by option")


def _loss_name(name: tuple[str, str]) -> str:
    slot, option = name
    return f"{option} ({slot})" if option.startswith("linear") else option


def loss_rows(run: Run) -> list[list[str]]:
    """The medians of `losses` as text: option, before, after, layers."""
    rows = run.summary.get("options") or []
    before, after = by_option(rows, "loss_before"), by_option(rows, "loss_after")
    return [
        [_loss_name(n), number(statistics.median(before[n])), number(statistics.median(after[n])), str(len(after[n]))]
        for n in after
        if n in before and option_state(n[1], None) != "absent" and statistics.median(after[n]) > 0
    ]


def _loss_row(
    name: tuple[str, str], before: list[float], after: list[float], x: Scale, y: float, left: float
) -> list[Markup]:
    slot, option = name
    b, a = quartiles(before), quartiles(after)
    kind = next((name for name in ("linear", "mamba") if option.startswith(name)), slot)
    words = f"{option}: {number(b[1])} before, {number(a[1])} after (medians of {len(after)} layers)"
    return [
        text(left - 10, y + 4, _loss_name(name), "end"),
        line(x(b[0]), y, x(b[2]), y, "range"),
        line(x(a[0]), y, x(a[2]), y, f"range r-{kind}"),
        path([(x(b[1]), y), (x(a[1]), y)], f"bell r-{kind}"),
        marker("ring", x(b[1]), y, 3.8, f"hollow r-{kind}", words),
        marker("circle", x(a[1]), y, 4.6, f"o-{kind} solid", words),
    ]


def quartiles(values: list[float]) -> tuple[float, float, float]:
    if len(values) < 2:
        return (values[0],) * 3
    low, middle, high = statistics.quantiles(values, n=4, method="inclusive")
    return low, middle, high
