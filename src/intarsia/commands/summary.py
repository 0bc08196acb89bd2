"""A finished run on the terminal: parent, child and controls side by side, and one prompt continued by both."""

from __future__ import annotations

from typing import Any

from intarsia.commands.common import figure, print_table

Row = dict[str, Any]


def print_summary(summary: Row) -> None:
    """`summary` is the content of summary.json; what a run did not measure is left out."""
    child = {**summary, "parameters": (summary.get("child") or {}).get("parameters")}
    models = {"parent": _parent(summary), "child": _figures(child, "child")}
    models |= {name: _figures(control, "child", own=True) for name, control in (summary.get("controls") or {}).items()}
    lines = [(figure, [model.get(figure) for model in models.values()]) for figure in models["child"]]
    print_table("", ["", *models], [[name, *cells] for name, cells in lines if any(cells)])
    _print_rounds(summary.get("rounds") or [])
    _print_tournament(summary.get("tournament"))
    _print_sample(summary.get("sample"))


def _parent(summary: Row) -> Row:
    measured = _figures({"bits_per_byte": summary.get("bits_per_byte"), "tasks": summary.get("tasks")}, "parent")
    count = (summary.get("parent") or {}).get("parameters")
    return {**measured, "parameters": _millions(count), "speed": "1.00 x"}


def _figures(entry: Row, who: str, own: bool = False) -> Row:
    """One model's column. `own`: a control's figures are its own, not a pair of parent and child."""
    tasks = entry.get("tasks") or {}
    bits = entry.get("bits_per_byte") or {}
    mine = {name: task.get(who, task if own else None) for name, task in tasks.items()}
    return {
        "parameters": _millions(entry.get("parameters")),
        "speed": f"{entry['speedup_measured']:.2f} x" if entry.get("speedup_measured") else None,
        "KL (nats)": figure({"value": entry["kl"], "se": entry.get("kl_se")}) if entry.get("kl") is not None else None,
        "same token": f"{100 * entry['top1']:.0f} %" if entry.get("top1") is not None else None,
        "bits/byte": figure(bits.get(who, bits if own else {}).get("all")),
        **{name: figure(task) for name, task in mine.items()},
    }


def _millions(count: int | None) -> str | None:
    return None if count is None else f"{count / 1e6:.1f} M"


def _print_rounds(rounds: list[Row]) -> None:
    if rounds:
        shown = [_figures(row, "child") for row in rounds]
        names = [name for name, cell in shown[-1].items() if cell]
        print_table("", ["round", *names], [[str(n), *(row[name] for name in names)] for n, row in enumerate(shown, 1)])


def _print_tournament(held: Row | None) -> None:
    if not held:
        return
    by, rows = held["by"], []
    for row in held["finalists"]:
        figures = [figure({"value": row[when][by], "se": row[when].get(f"{by}_se")}) for when in ("before", "after")]
        rows.append([row["name"] + (" (chosen)" if row["name"] == held["chosen"] else ""), *figures])
    what = "KL (nats)" if by == "kl" else by
    print_table("", ["finalist", f"{what} before", f"after {held['tokens']} tokens"], rows)


def _print_sample(sample: Row | None) -> None:
    if not sample:
        return
    print(f"prompt: {sample['prompt']}")
    for who in ("parent", "child"):
        if who in sample:
            print(f"\n{who} continues:\n{sample[who].strip()}")
    print()
