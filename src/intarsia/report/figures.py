"""The figures that join several parts of the summary: cost, predictions, text and tasks by model."""

from __future__ import annotations

from typing import Any

from markupsafe import Markup

from intarsia.report import charts
from intarsia.report.parts import Section, Table, model_legend
from intarsia.report.run import Run, contenders
from intarsia.report.wording import finite, number, percent, seconds, size, times, with_error

CHANCE = {"piqa": 0.5, "hellaswag": 0.25, "arc_easy": 0.25}
NAMES = {"piqa": "PIQA", "hellaswag": "HellaSwag", "arc_easy": "ARC-Easy", "lambada": "LAMBADA"}


def _blocks(run: Run) -> list[tuple[str, float, float]]:
    """(option, prefill, decode) of each timed block, widest first within attention and FFN."""
    rows = []
    for block in (run.summary.get("cost") or {}).get("blocks") or []:
        prefill, decode = finite(block.get("prefill_seconds")), finite(block.get("decode_seconds"))
        if prefill is not None and decode is not None:
            rows.append((str(block["option"]), prefill, decode))
    order = {"attention": 0, "ffn": 1}
    return sorted(rows, key=lambda r: (order.get(r[0].split()[0], 2), -(r[1] + r[2])))


def costs(run: Run) -> Markup | None:
    """Bars of prefill and decode time per kind of block."""
    rows = _blocks(run)
    if not rows:
        return None
    kinds = [name.split()[0] for name, _, _ in rows]
    groups = [i for i in range(1, len(rows)) if kinds[i] != kinds[i - 1]]
    bars = [
        (name, [("c-prefill", p), ("c-decode", d)], f"{name}: prefill {seconds(p)}, decode {seconds(d)}")
        for name, p, d in rows
    ]
    return charts.stacked(
        bars,
        label="Time of each kind of block",
        unit="time of one block in the whole scenario",
        shown=seconds,
        groups=groups,
    )


def cost_table(run: Run) -> Table:
    spread = {str(b["option"]): b.get("spread") for b in (run.summary.get("cost") or {}).get("blocks") or []}
    rows = [[name, seconds(p), seconds(d), seconds(p + d), percent(spread.get(name))] for name, p, d in _blocks(run)]
    parent = (run.summary.get("cost") or {}).get("parent") or {}
    if parent:
        whole = [
            f"{seconds(v.get('median'))} (iqr {seconds(v.get('iqr'))})"
            for k in ("prefill", "decode", "total")
            for v in [parent.get(f"{k}_seconds") or {}]
        ]
        rows.append(["the whole parent", *whole, ""])
    return Table(["block", "prefill", "decode", "together", "spread"], rows)


def predicted(summary: dict[str, Any]) -> list[tuple[str, float, float, str, str, str]]:
    """Rows (name, predicted, measured, both as text, mark class) of everything that was foreseen and then measured."""
    memory = summary.get("memory_bytes") or {}
    rows = [
        (
            "speed-up, child",
            summary.get("speedup_predicted"),
            summary.get("speedup_measured"),
            times,
            "k-child",
        )
    ]
    for c in contenders(summary):
        if c.name != "child":
            rows.append(
                (
                    f"speed-up, {c.name}",
                    c.data.get("speedup_predicted"),
                    c.data.get("speedup_measured"),
                    times,
                    c.class_,
                )
            )
    for point in ((summary.get("cost") or {}).get("calibration") or {}).get("points") or []:
        rows.append((str(point.get("name")), point.get("predicted"), point.get("measured"), seconds, "k-check"))
    rows.append(("memory, child", memory.get("predicted"), memory.get("child"), size, "k-child"))
    rows.append(
        (
            "KL undistilled",
            summary.get("kl_predicted"),
            summary.get("kl_before_distillation"),
            number,
            "k-child",
        )
    )
    good = [(n, finite(p), finite(m), f, c) for n, p, m, f, c in rows]
    return [(n, p, m, f(p), f(m), c) for n, p, m, f, c in good if p and m and m > 0]


def measured(run: Run, what: str, title: str, lede: str, missing: str) -> Section:
    """Dots with errors per text category (`bits`) or per task (`tasks`) for the parent, the child and the controls."""
    models = _figures(run.summary, what)
    categories = list(dict.fromkeys(k for *_, values in models for k in values))
    categories.sort(key=lambda k: k == "all")
    if not categories:
        return Section(what, title, half=True, missing=missing)
    rows = []
    for category in categories:
        dots = [
            charts.Dot(name, shape, class_, value, finite(values[category].get("se")))
            for name, shape, class_, values in models
            if category in values and (value := finite(values[category].get("value"))) is not None
        ]
        if dots:
            rows.append((NAMES.get(category, category), dots))
    tasks = what == "tasks"
    chance = {NAMES[k]: v for k, v in CHANCE.items() if k in categories} if tasks else None
    shown = (lambda v: f"{100 * v:.3g} %") if tasks else (lambda v: f"{v:.3g}")
    drawn = charts.dot_rows(
        rows, label=title, unit="accuracy" if tasks else "bits per byte", shown=shown, chance=chance
    )
    say = percent if tasks else with_error
    table = [
        [
            NAMES.get(k, k),
            *(say((values.get(k) or {}).get("value"), (values.get(k) or {}).get("se")) for *_, values in models),
        ]
        for k in categories
    ]
    return Section(
        what,
        title,
        lede,
        drawn,
        half=True,
        tables=(Table(["", *(m[0] for m in models)], table),),
        legend=model_legend(run),
    )


def _figures(summary: dict[str, Any], what: str) -> list[tuple[str, str, str, dict[str, dict]]]:
    """(name, shape, class, {category: figure}) per model, parent first."""
    key = "bits_per_byte" if what == "bits" else "tasks"
    own = summary.get(key) or {}
    if what == "tasks":  # the summary keeps them task first
        own = {who: {t: both[who] for t, both in own.items() if (both or {}).get(who)} for who in ("parent", "child")}
    models = [
        ("parent", "ring", "k-parent", own.get("parent") or {}),
        ("child", "circle", "k-child", own.get("child") or {}),
    ]
    for c in contenders(summary):
        if c.name != "child":
            values = c.data.get(key) or {}
            values = {k: v.get("child", v) if "value" not in v else v for k, v in values.items() if isinstance(v, dict)}
            models.append((c.name, c.shape, c.class_, values))
    return [m for m in models if m[3]]
