"""Training, cost, prediction, distillation: the small charts in the middle of the page."""

from __future__ import annotations

from typing import Any

from markupsafe import Markup

from intarsia.report import charts, library
from intarsia.report.parts import Section, Table, legend, swatches
from intarsia.report.run import Run, contenders
from intarsia.report.wording import count, finite, number, percent, seconds, size, times, with_error


def _blocks(run: Run) -> list[tuple[str, float, float]]:
    """(option, prefill, decode) of each timed block, widest first within attention and FFN."""
    rows = []
    for block in (run.summary.get("cost") or {}).get("blocks") or []:
        prefill, decode = finite(block.get("prefill_seconds")), finite(block.get("decode_seconds"))
        if prefill is not None and decode is not None:
            rows.append((str(block["option"]), prefill, decode))
    order = {"attention": 0, "ffn": 1}
    return sorted(rows, key=lambda r: (order.get(r[0].split()[0], 2), -(r[1] + r[2])))


def cost_bars(run: Run) -> Markup | None:
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
        rows.append((f"time, {point.get('name')}", point.get("predicted"), point.get("measured"), seconds, "k-check"))
    rows.append(("memory, child", memory.get("predicted"), memory.get("child"), size, "k-child"))
    rows.append(
        (
            "KL as assembled",
            summary.get("kl_predicted"),
            summary.get("kl_assembled", summary.get("kl_before_distillation")),
            number,
            "k-child",
        )
    )
    good = [(n, finite(p), finite(m), f, c) for n, p, m, f, c in rows]
    return [(n, p, m, f(p), f(m), c) for n, p, m, f, c in good if p and m and m > 0]


def losses(run: Run) -> Section | None:
    drawn = library.losses(run)
    if drawn is None:
        return None
    lede = (
        "Each option learns to imitate the parent’s block on the parent’s own activations. "
        "Hollow: as initialised. Solid: after. Bars: the middle half of the layers."
    )
    table = Table(["option", "before", "after", "layers"], library.loss_rows(run), "The medians")
    return Section("losses", "What local training brought", lede, drawn, (table,), half=True)


def costs(run: Run) -> Section | None:
    drawn = cost_bars(run)
    if drawn is None:
        return None
    lede = "Measured on this machine for the whole scenario."
    key = swatches([("p", "prefill"), ("d", "decode")])
    return Section("costs", "What a block costs here", lede, drawn, (cost_table(run),), legend=key, half=True)


def predictions(run: Run) -> Section | None:
    rows = predicted(run.summary)
    if not rows:
        return None
    calibration = (run.summary.get("cost") or {}).get("calibration") or {}
    lede = "The search decides by predictions; here they meet the whole model. The band is ± 5 %."
    if (error := finite(calibration.get("error"))) is not None:
        lede += f" The calibrated predictor of time errs by {percent(error)} on models it was checked with."
    table = [[name, p, m, f"{100 * (a / b - 1):+.1f} %"] for name, a, b, p, m, _ in rows]
    return Section(
        "predictions",
        "Predicted against measured",
        lede,
        charts.deviations(rows, label="Predicted against measured"),
        half=True,
        tables=(Table(["", "predicted", "measured", "off by"], table),),
    )


def tournament(run: Run) -> Section | None:
    """The finalists before and after their short distillation; None where the run held none."""
    held = run.summary.get("tournament") or {}
    by, chosen = held.get("by"), held.get("chosen")
    finalists = held.get("finalists") or []
    rows = [(str(row.get("name")), row.get("before") or {}, row.get("after") or {}) for row in finalists]
    drawn = []
    for name, before, after in rows:
        marks = (("before", "ring", "k-parent", before), ("after", "circle", "k-child", after))
        dots = [
            charts.Dot(when, shape, class_, value, finite(figures.get(f"{by}_se")))
            for when, shape, class_, figures in marks
            if (value := finite(figures.get(by))) is not None
        ]
        drawn += [(name, dots)] if dots else []
    if not drawn:
        return None
    unit = "KL to the parent, nats" if by == "kl" else "mean of the benchmark"
    lede = f"Finalists learn for {count(held.get('tokens'))} tokens each; the best after that is the child: {chosen}."
    table = []
    for name, *pair in rows:
        shown = [with_error(figures.get(by), figures.get(f"{by}_se")) for figures in pair]
        table.append([f"{name} (chosen)" if name == chosen else name, *shown])
    return Section(
        "tournament",
        "The tournament",
        lede,
        charts.dot_rows(drawn, label="Finalists before and after a short distillation", unit=unit),
        half=True,
        tables=(Table(["finalist", f"{unit}, before", "after"], table),),
        legend=legend([("ring", "k-parent", "before"), ("circle", "k-child", "after")]),
    )


def rounds(run: Run) -> Section | None:
    """What every round has come to; None where there was one alone."""
    made = run.summary.get("rounds") or []
    dots, table = [], []
    for row in made:
        name, kl, se = f"round {row.get('round')}", finite(row.get("kl")), finite(row.get("kl_se"))
        if kl is not None:
            dots.append((name, [charts.Dot("KL", "circle", "k-child", kl, se)]))
        sizes = [count(row.get("tokens")), count(row.get("parameters")), times(row.get("speedup_measured"))]
        table.append([name, str(row.get("axis")), *sizes, with_error(kl, se), percent(row.get("top1"))])
    if not dots:
        return None
    lede = "The child of one round is the parent of the next; the first parent teaches them all, and all is against it."
    head = ["", "what may go", "tokens", "parameters", "speed", "KL, nats", "same token"]
    drawn = charts.dot_rows(dots, label="Distance from the first parent", unit="KL to the first parent, nats")
    return Section("rounds", "Round by round", lede, drawn, (Table(head, table),), half=True)


def distillation(run: Run) -> Section | None:
    points = [
        (t, k)
        for r in run.summary.get("distillation") or []
        if (t := finite(r.get("tokens"))) is not None and (k := finite(r.get("kl"))) is not None
    ]
    title = "Distillation"
    if len(points) < 2:
        return Section(
            "distillation",
            title,
            half=True,
            missing="No distillation curve: this run has not distilled its child yet.",
        )
    lede = f"The assembled child learns from the parent on {count(points[-1][0])} tokens; the KL is on held-out text."
    if run.summary["distillation"][-1].get("undone"):
        lede += " It came out further away, so this was undone: the child is as it was assembled."
    return Section(
        "distillation",
        title,
        lede,
        charts.curve(points, label="KL over distilled tokens", unit="KL to the parent, nats"),
        half=True,
        tables=(Table(["tokens", "KL, nats"], [[count(t) if t else "0", number(k)] for t, k in points]),),
    )
