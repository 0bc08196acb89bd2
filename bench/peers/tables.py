"""What `bench/hybrid.py` measured, as markdown. Speeds are medians with quartiles, ratios are taken turn by turn."""

from __future__ import annotations

import statistics
import time
from typing import Any

from page import cell, quartiles, ratios, table

from intarsia.arch import Architecture, block_flops, catalog, parameters

OURS = "Intarsia"
GIB = 2**30


def section(results: dict[str, Any]) -> str:
    """Everything that stands between the markers."""
    arch = catalog.get(results["machine"]["model"])
    parts = [_head(results, arch)]
    if results["prefill"]:
        parts += [_speeds(results), _against(results), _shares(results, arch)]
    if results["train"]:
        parts.append(_training(results, arch))
    if results["long"]:
        parts.append(_lengths(results))
    if results["kernels"]:
        parts.append(_kernels(results))
    parts += ["\n".join(f"- {note}" for note in results["notes"])]
    return "\n\n".join(filter(None, parts))


def flops(arch: Architecture, length: int, trained: bool = False) -> float:
    """Operations a token of a prompt: its blocks, attending to half of it, and the head; three times that to train."""
    body = sum(block_flops(b, arch.hidden_size, length / 2) for b in arch.blocks)
    head = 2.0 * arch.vocab_size * arch.hidden_size
    return 3 * (body + head) if trained else body + head / length


def _head(results: dict[str, Any], arch: Architecture) -> str:
    machine, about = results["machine"], results["about"]
    who = "; ".join(f"{name}: {version}" for name, version in about.items())
    threads = "1 thread" if machine["threads"] == 1 else f"{machine['threads']} threads"
    return (
        f"{time.strftime('%Y-%m-%d')}, {machine['cpu']}, {threads}, {machine['device']}; {machine['model']} "
        f"({parameters(arch) / 1e6:,.0f} M, random weights, the same for all) in bfloat16. {who}. Tokens a second: "
        f"median and quartiles of {results['plan']['turns']} turns.\n\n    {machine['command']}"
    )


def _speeds(results: dict[str, Any]) -> str:
    prefill, decode = _per_second(results)
    rows = [
        [name, *(cell(prefill[name].get(n, [])) for n in _lengths_of(results)),
         *(cell(decode.get(name, {}).get(n, []), 1) for n in _lengths_of(results))]
        for name in prefill
    ]  # fmt: skip
    return table(["tokens a second", *_columns(results)], rows)


def _against(results: dict[str, Any]) -> str:
    """Our speed over every peer's."""
    prefill, decode = _per_second(results)
    rows = []
    for name in [n for n in prefill if n != OURS]:
        cells = []
        for kept in (prefill, decode):
            pairs = [(kept.get(OURS, {}).get(n, []), kept.get(name, {}).get(n, [])) for n in _lengths_of(results)]
            cells += [cell(ratios(*pair), 2) for pair in pairs]  # empty where one is missing
        rows.append([name, *cells])
    return table(["Intarsia over", *_columns(results)], rows) if rows else "No peer was there to compare with."


def _shares(results: dict[str, Any], arch: Architecture) -> str:
    """Which part of the machine's bfloat16 matrix rate everybody's prefill reaches, by the same arithmetic."""
    low, rate, high = quartiles([c["operations"] for c in results["ceilings"]])
    prefill, _ = _per_second(results)
    rows = []
    for name, speeds in prefill.items():
        used = [[v * flops(arch, n) / rate for v in speeds.get(n, [])] for n in _lengths_of(results)]
        rows.append([name, *(f"{100 * statistics.median(v):.0f} %" if v else "" for v in used)])
    told = f"{rate / 1e12:.3g} ({low / 1e12:.3g} to {high / 1e12:.3g}) TFLOP/s"
    return (
        f"The machine's bfloat16 matrix rate, measured in every turn: {told}. The share of it that prefill reaches:\n\n"
        + table(["share", *(f"prefill {n:,}" for n in _lengths_of(results))], rows)
    )


def _training(results: dict[str, Any], arch: Architecture) -> str:
    batch, length = results["plan"]["train"]
    rate = statistics.median(c["operations"] for c in results["ceilings"]) if results["ceilings"] else None
    speeds = {
        name: [batch * length / s for turn in turns for s in turn["seconds"]]
        for name, turns in results["train"].items()
    }
    peaks = {name: [turn["peak_bytes"] / GIB for turn in turns] for name, turns in results["train"].items()}
    rows = []
    for name, values in speeds.items():
        share = statistics.median(values) * flops(arch, length, trained=True) / rate if rate else None
        against = name != OURS and OURS in speeds
        rows.append([
            name, cell(values), "" if share is None else f"{100 * share:.0f} %", cell(peaks[name], 2),
            cell(ratios(speeds[OURS], values), 2) if against else "",
            cell(ratios(peaks[OURS], peaks[name]), 2) if against else "",
        ])  # fmt: skip
    head = ["", "tokens a second", "share of the matrix rate", "peak GiB", "Intarsia's speed over", "its memory over"]
    return (
        f"Training: forward, backward and AdamW on {batch} x {length:,} tokens, every turn in a process of its own, "
        f"whose peak memory is told.\n\n{table(head, rows)}"
    )


def _lengths(results: dict[str, Any]) -> str:
    """Cost of a token in a long prompt and behind it, by kind of block."""
    first = next(iter(results["long"].values()))[0]
    kinds = sorted(first["prefill"]["kinds"])
    rows, costs, decoded = [], {}, {}
    for length, turns in results["long"].items():
        whole = [1e6 * t["prefill"]["seconds"] / length for t in turns]
        parts = [statistics.median(1e6 * t["prefill"]["kinds"][k] / length for t in turns) for k in kinds]
        steps = [1e3 * s for t in turns for s in t["decode"]["seconds"]]
        scans = [1e3 * s.get("mamba2", 0.0) for t in turns for s in t["decode"]["kinds"]]
        costs[length] = (statistics.median(whole), dict(zip(kinds, parts)))
        decoded[length] = statistics.median(scans)
        rows.append([
            f"{length:,}", cell(whole), *(f"{p:,.0f}" for p in parts), cell(steps, 1), cell(scans, 2)
        ])  # fmt: skip
    shortest, longest = min(costs), max(costs)
    without = [costs[n][0] - costs[n][1].get("attention", 0.0) for n in (shortest, longest)]
    head = ["prompt", "µs a token", *(f"of it {k}" for k in kinds), "decode, ms a token", "of it mamba2"]
    return (
        f"Cost of a token of a prompt, and of one decoded behind it.\n\n{table(head, rows)}\n\n"
        f"From {shortest:,} to {longest:,} tokens a token of the prompt costs "
        f"{_growth(costs[shortest][0], costs[longest][0])}, without the attention blocks "
        f"{_growth(*without)}; a decoded token's Mamba-2 blocks {_growth(decoded[shortest], decoded[longest])}."
    )


def _kernels(results: dict[str, Any]) -> str:
    rate, speed = (statistics.median(c[k] for c in results["ceilings"]) for k in ("operations", "bytes"))
    prompt, _ = results["plan"]["kernels"]
    rows = []
    for k in results["kernels"]:
        least = max(k["operations"] / rate, k["bytes"] / speed)
        rows.append([
            k["kernel"], k["backend"], f"{1e6 * k['seconds']:,.0f}", f"{k['bytes'] / k['seconds'] / 1e9:,.1f}",
            f"{k['operations'] / k['seconds'] / 1e12:,.3f}",
            f"{100 * least / k['seconds']:.0f} % of {'memory' if k['bytes'] / speed == least else 'matrix rate'}",
        ])  # fmt: skip
    head = ["kernel", "backend", "µs", "GB/s", "TFLOP/s", "share of the ceiling"]
    return (
        f"Kernels of one Mamba-2 block on {prompt:,} tokens, against what this machine copies ({speed / 1e9:,.1f} GB/s "
        f"read and written) and multiplies ({rate / 1e12:,.3g} TFLOP/s), whichever is the slower; "
        "what stays in a cache may exceed it.\n\n" + table(head, rows, words=2)
    )


def _per_second(results: dict[str, Any]) -> tuple[dict[str, dict[int, list[float]]], ...]:
    """Tokens a second of prefill and decode, by name and length, in the order of the turns."""
    prefill = {
        name: {n: [n / s for s in seconds] for n, seconds in kept.items()} for name, kept in results["prefill"].items()
    }
    decode = {
        name: {n: [1 / s for s in seconds] for n, seconds in kept.items()} for name, kept in results["decode"].items()
    }
    return prefill, decode


def _lengths_of(results: dict[str, Any]) -> list[int]:
    return list(results["plan"]["lengths"])


def _columns(results: dict[str, Any]) -> list[str]:
    lengths = _lengths_of(results)
    return [f"prefill {n:,}" for n in lengths] + [f"decode at {n:,}" for n in lengths]


def _growth(before: float, after: float) -> str:
    """`12 % more`, `3 % less`."""
    change = 100 * (after / before - 1)
    return f"{abs(change):.0f} % {'more' if change >= 0 else 'less'}"
