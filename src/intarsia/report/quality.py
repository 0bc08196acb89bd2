"""Held-out text and tasks: parent, child and controls side by side, each with its error."""

from __future__ import annotations

from typing import Any

from intarsia.report import charts
from intarsia.report.parts import Section, Table, model_legend
from intarsia.report.run import Run, contenders
from intarsia.report.wording import finite, percent, with_error

CHANCE = {"piqa": 0.5, "hellaswag": 0.25, "arc_easy": 0.25}
NAMES = {"piqa": "PIQA", "hellaswag": "HellaSwag", "arc_easy": "ARC-Easy", "lambada": "LAMBADA"}


def text(run: Run) -> Section:
    return measured(
        run,
        "bits",
        "Held-out text",
        "Bits a byte of text it has never seen, by kind of text; lower is better.",
        "No held-out text was measured yet; `intarsia eval` measures a finished child.",
    )


def tasks(run: Run) -> Section:
    return measured(
        run,
        "tasks",
        "Tasks",
        "Share of questions answered as they should be; higher is better. Bars are 95 %, dotted lines are guessing.",
        "No task scores: `intarsia fetch tasks`, then `intarsia eval CHILD --parent PARENT`, "
        "gives PIQA, HellaSwag, ARC-Easy and LAMBADA.",
    )


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
