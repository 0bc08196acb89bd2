"""What `bench/train.py` measured, as markdown. Figures over seeds are means with standard deviations."""

from __future__ import annotations

import statistics
import time
from collections.abc import Sequence
from typing import Any

from page import cell, ratios, table

MARKS = (0.05, 0.1, 0.2, 0.4, 0.6, 0.8, 1.0)  # of a training: where its loss is told
NEAR = 0.05  # a loss is the mean over so much of the training before the mark


def section(results: dict[str, Any]) -> str:
    """Everything that stands between the markers."""
    runs, parts = results["runs"], [_head(results)]
    if results["speed"]:
        parts.append(_speed(results))
    if results["architectures"]:
        parts += [_architectures(results["architectures"], runs), _scans(results["architectures"])]
    if runs:
        parts += [_curves(runs), _heldout(runs)]
    if "random-order" in runs:
        parts.append(_compared(runs, "hybrid", "random-order", "Phases in their order against the same samples mixed"))
    if "fp8" in runs:
        parts.append(_gap(runs))
    return "\n\n".join([*parts, *(f"- {note}" for note in results["notes"])])


def _head(results: dict[str, Any]) -> str:
    machine = results["machine"]
    bf16 = next((flag for flag in machine["flags"] if "bf16" in flag), "no native bfloat16")
    return (
        f"{time.strftime('%Y-%m-%d')}, {machine['cpu']} ({bf16}), {machine['threads']} threads; nanos of 12.5M "
        f"parameters, {results['tokens']:,} tokens a run, {results['seeds']} seed(s).\n\n    {machine['command']}"
    )


def _speed(results: dict[str, Any]) -> str:
    batch, length = results["speed_shape"]
    found = results["speed"]
    rows = [[name, cell(values)] for name, values in found.items()]
    if len(found) == 2:
        rows.append(["ratio, turn by turn", cell(ratios(found["Intarsia"], found["transformers"]), 2)])
    return f"Training steps of {batch} x {length} tokens, forward, backward and AdamW:\n\n" + table(
        ["", "tokens a second"], rows
    )


def _architectures(found: dict[str, Any], runs: dict[str, list[dict[str, Any]]]) -> str:
    """A row a kind of model: quality, speed of training over the Transformer's, memory and time of decoding."""
    batch, length = found["shape"]
    rows = []
    for name, speeds in found["train"].items():
        bits = [run["bits_per_byte"]["all"]["value"] for run in runs.get(name, [])]
        rows.append([
            name, f"{found['parameters'][name] / 1e6:.2f} M", _mean(bits) if bits else "", cell(speeds),
            cell(ratios(speeds, found["train"]["transformer"]), 2),
            *(f"{held / 2**20:,.2f}" for held in found["bytes"][name]),
            *(f"{1e3 * statistics.median(each):,.1f}" for each in found["decode"][name].values()),
        ])  # fmt: skip
    head = ["", "parameters", "bits per byte", "training, tokens a second", "over the Transformer"]
    head += [f"{what} at {n:,}" for what in ("MiB", "ms") for n in found["contexts"]]
    return (
        f"One size, the same tokens in the same order. Training: steps of {batch} x {length}, in turns in one process. "
        "MiB and ms: memory of a context and the next token's time behind it.\n\n" + table(head, rows)
    )


def _scans(found: dict[str, Any]) -> str:
    scans, steps = found["scans"], found["train"]
    rows = []
    for size, dual in scans["mamba2"].items():
        selective = scans["mamba1"][size]
        times = [cell([1e3 * t for t in each], 1) for each in (selective, dual)]
        rows.append([str(size), *times, cell(ratios(selective, dual), 2)])
    head = ["numbers that a channel remembers", "selective scan (Mamba-1), ms", "SSD (Mamba-2), ms", "times as fast"]
    return (
        "State space duality (Mamba-2) over the selective scan (Mamba-1), turn by turn: whole steps of training of the "
        f"two nanos {cell(ratios(steps['mamba2'], steps['mamba1']), 2)} x. A scan by itself, forward and backward, on "
        f"as many channels:\n\n{table(head, rows)}"
    )


def _curves(runs: dict[str, list[dict[str, Any]]]) -> str:
    head = ["training loss (nats) at", *(f"{mark:.0%}" for mark in MARKS)]
    rows = [[name, *(_mean([_at(run["losses"], mark) for run in each]) for mark in MARKS)]
            for name, each in runs.items()]  # fmt: skip
    return table(head, rows)


def _at(losses: Sequence[float], mark: float) -> float:
    """The loss at a share of the training."""
    end = max(1, round(mark * len(losses)))
    return statistics.fmean(losses[max(0, end - max(1, round(NEAR * len(losses)))) : end])


def _heldout(runs: dict[str, list[dict[str, Any]]]) -> str:
    categories = list(next(iter(runs.values()))[0]["bits_per_byte"])
    rows = [[name, *(_mean([run["bits_per_byte"][c]["value"] for run in each]) for c in categories),
             f"{sum(run['skipped'] for run in each)}"] for name, each in runs.items()]  # fmt: skip
    return table(["held-out bits per byte", *categories, "steps left out"], rows)


def _compared(runs: dict[str, list[dict[str, Any]]], one: str, other: str, title: str) -> str:
    """Relative difference of the held-out bits per byte, seed by seed."""
    apart = [100 * (a["bits_per_byte"]["all"]["value"] / b["bits_per_byte"]["all"]["value"] - 1)
             for a, b in zip(runs[one], runs[other])]  # fmt: skip
    return f"{title}: {_mean(apart, 2)} % bits per byte (negative: the first is better)."


def _gap(runs: dict[str, list[dict[str, Any]]]) -> str:
    head = ["FP8 above bfloat16, % of the loss, at", *(f"{mark:.0%}" for mark in MARKS)]
    gaps = [[100 * (_at(low["losses"], mark) / _at(plain["losses"], mark) - 1)
             for low, plain in zip(runs["fp8"], runs["hybrid"])] for mark in MARKS]  # fmt: skip
    return table(head, [["", *(_mean(each, 3) for each in gaps)]])


def _mean(values: Sequence[float], digits: int = 3) -> str:
    if len(values) == 1:
        return f"{values[0]:.{digits}f}"
    return f"{statistics.fmean(values):.{digits}f} ± {statistics.stdev(values):.{digits}f}"
