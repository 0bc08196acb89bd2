"""`summary.json`: every figure of a run that the report, the table and a script want, in one place."""

from __future__ import annotations

import dataclasses
import math
import platform
import shlex
import time
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import intarsia
from intarsia.arch import Architecture, FeedForward, parameters
from intarsia.base.machine import cores, cpu_flags, cpu_model
from intarsia.compress.assemble import Choice, precisions
from intarsia.compress.children import Child, architecture, blocks_of
from intarsia.compress.controls import interpolated, known_widths
from intarsia.compress.library import stored_losses
from intarsia.compress.measure import PHASES, Kind, block_costs, key
from intarsia.compress.options import COVERED, NONE, PARENT, SPAN, OptionSpec, is_covered, slot_names
from intarsia.compress.problem import name_of, on_its_own
from intarsia.compress.rounds import by_original, lead, places, runs
from intarsia.compress.score import Scored
from intarsia.compress.solve import Solution
from intarsia.compress.targets import Problem
from intarsia.formats import open_checkpoint
from intarsia.formats.reader import locate

if TYPE_CHECKING:
    from intarsia.compress.pipeline import Job

ORDER = (
    "data", "load", "cost", "importance", "library", "score", "search", "tournament", "distil", "speed", "evaluate",
    "controls",
)  # fmt: skip
# Stages that are counted under another name.
LABELS = {
    "distill": "distil", "mend": "distil", "teacher": "distil", "choose": "search", "coupled": "library",
    "spans": "library", "sensitivity": "library",
}  # fmt: skip


def summarise(
    job: Job, problem: Problem, rows: list[Scored], solutions: list[Solution], frontier: list[dict],
    made: dict[str, Child], speeds: dict[str, Any], figures: dict[str, dict],
) -> dict[str, Any]:
    """The content of summary.json; `made`, `speeds` and `figures` are by model: child and controls (and parent)."""
    size = job.model.embed.weight.element_size()
    scores = {(r.layer, r.attention, r.ffn): r for r in rows}
    result = {
        "format": 1,
        "intarsia": intarsia.__version__,
        "finished": time.strftime("%Y-%m-%dT%H:%M:%S"),
        "command": _command(job, len(made) > 1),
        "parent": _parent(job, size),
        "scenario": vars(job.scenario),
        "target": job.recipe.target.model_dump(exclude_none=True),
        "device": _device(),
        "dtype": str(job.model.dtype).removeprefix("torch."),
        "child": _child(job, made["child"], scores | _coupled(job), size),
        "options": _options(job, scores, size),
        **({"spans": _spans(job, scores, size)} if job.spanned() else {}),
        "cost": _cost(job),
        "memory_bytes": _memory(made["child"], speeds),
        "alternatives": [row | {"speedup_predicted": row["speedup_predicted"] * lead(job)} for row in frontier],
        "candidates": [
            {"speedup_predicted": problem.value("speedup", s.costs) * lead(job), "kl_predicted": s.score}
            for s in solutions
        ],
        "distillation": made["child"].curve,
        "bits_per_byte": {who: figures[who]["bits_per_byte"] for who in ("parent", "child")},
        "tasks": {
            task: {who: figures[who]["tasks"][task] for who in ("parent", "child")}
            for task in figures["child"]["tasks"]
        },
        "controls": {
            name: _model(job, problem, child, speeds, figures[name])
            | {"description": child.description, "sites": _sites(job, child, scores),
               "bits_per_byte": figures[name]["bits_per_byte"], "tasks": figures[name]["tasks"]}
            for name, child in made.items() if name != "child"
        },
        "seconds": _seconds([item for run in runs(job) for item in run.seconds().items()]),
        "peak_rss_bytes": max(run.peak_rss_bytes() for run in runs(job)),
        "sample": {"prompt": job.recipe.evaluate.prompt} | {who: figures[who]["sample"] for who in ("parent", "child")},
    }  # fmt: skip
    return result | _model(job, problem, made["child"], speeds, figures["child"])


def _coupled(job: Job) -> dict[tuple[int, str, str], Scored]:
    """Scores of what the child is made of, where it is made of coupled pairs."""
    return {(r.layer, r.attention, r.ffn): r for r in job.coupled.rows} if job.coupled else {}


def finite(value: Any) -> Any:
    """JSON has no NaN (the error of a single sequence) and no infinity (the KL of a broken option): null instead."""
    if isinstance(value, dict):
        return {key: finite(inner) for key, inner in value.items()}
    if isinstance(value, (list, tuple)):
        return [finite(inner) for inner in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _seconds(stages: list[tuple[str, float]]) -> dict[str, float]:
    """Seconds of every kind of stage in the order of work; evaluations and rounds are summed, and all that controls
    took."""
    groups = dict.fromkeys(ORDER, 0.0)
    for name, seconds in stages:
        kind, _, which = name.partition("-")
        label = "controls" if which not in ("", "child", "parent") else LABELS.get(kind, kind)
        groups[label] = groups.get(label, 0.0) + seconds
    return {name: round(seconds, 1) for name, seconds in groups.items() if seconds or name != "controls"}


def _model(job: Job, problem: Problem, child: Child, speeds: dict[str, Any], figures: dict) -> dict[str, Any]:
    """The figures that the child and every control share."""
    speed = speeds["speed"][child.name]["speedup"]
    arch = architecture(child.folder)
    predicted = None  # of what was made elsewhere nothing was foreseen
    if child.choice:
        predicted = job.table.parent_seconds() / _predicted_seconds(job, _kinds(child.choice, arch)) * lead(job)
    return {
        "parameters": parameters(arch),
        "speedup_measured": speed["median"],
        "speedup_measured_spread": [speed["low"], speed["high"]],
        "speedup_predicted": predicted,
        "kl_predicted": child.predicted.get("score"),
        "kl_assembled": child.mending.get("kl_before", child.curve[0]["kl"] if child.curve else None),
        "kl_before_distillation": child.curve[0]["kl"] if child.curve else None,
        "kl": figures["kl"]["value"],
        "kl_se": figures["kl"]["se"],
        "top1": figures["top1"]["value"],
        "top1_se": figures["top1"]["se"],
    }


def _kinds(choice: Choice, arch: Architecture) -> list[Kind]:
    """What a finished model's costs belong to: its choice says how blocks are packed, its architecture what was
    fused. The two exclude each other."""
    chosen = [spec for pair in choice for spec in pair if spec is not None and spec.block is not None]
    return [spec.priced for spec in chosen] if any(spec.precision for spec in chosen) else list(arch.blocks)


def _predicted_seconds(job: Job, blocks: Sequence[Kind]) -> float:
    """What the cost table says of a whole model; FFN widths between measured ones are interpolated."""
    offered = [s.block for site in job.sites for s in job.options.get(site.ffn, []) if not s.precision]
    ladders = {dataclasses.replace(b, intermediate_size=1): known_widths(b, job.table) for b in offered
               if isinstance(b, FeedForward) and b in job.model.arch.blocks}  # fmt: skip

    def seconds(block: Kind) -> float:
        if key(block) in job.table.blocks:
            return sum(job.table.seconds(block, phase) for phase in PHASES)
        return interpolated(ladders[dataclasses.replace(block, intermediate_size=1)], block.intermediate_size)

    return sum(job.table.fixed[phase] for phase in PHASES) + sum(map(seconds, blocks))


def _command(job: Job, controls: bool) -> str:
    """What reproduces the run: the recipe lies resolved in the run folder."""
    home = job.round.home if job.round else job.run.path
    parts = ["intarsia", "compress", str(job.origin_path), "--recipe", str(home / "recipe.toml")]
    return shlex.join([*parts, "--out", str(home), *(["--controls"] if controls else [])])


def _device() -> str:
    flags = cpu_flags()
    units = {"amx_bf16": "AMX bf16", "avx512_bf16": "AVX512-BF16"}
    unit = next((name for flag, name in units.items() if flag in flags), "")
    return f"{cores()}-core {cpu_model() or platform.processor()}{', ' + unit if unit else ''}"


def _parent(job: Job, size: int) -> dict[str, Any]:
    arch = open_checkpoint(job.origin_path).architecture
    path = locate(job.origin_path)
    quantised = path.suffix == ".gguf"
    return {
        "name": path.stem if quantised else path.name,
        "path": str(job.origin_path),
        "parameters": parameters(arch),
        "weight_bytes": parameters(arch) * size,
        "architecture": arch.to_dict(),
    } | ({"note": "read from a quantised GGUF: its figures are those of the quantised weights"} if quantised else {})


def shown(spec: OptionSpec | None) -> str:
    """An option as the report names it: the parent's own block by its label."""
    if spec is None or spec.block is None:
        return COVERED if spec and spec.method == COVERED else NONE
    return f"{spec.block.label} {spec.precision}".strip() if spec.method == PARENT else spec.name


def _child(job: Job, child: Child, scores: dict, size: int) -> dict[str, Any]:
    count = parameters(architecture(child.folder))
    size = child.predicted["weight_bytes"] if any(precisions(child.choice)) else count * size
    return {"parameters": count, "weight_bytes": size, "sites": _sites(job, child, scores)}


def _sites(job: Job, child: Child, scores: dict[tuple[int, str, str], Scored]) -> list[dict[str, Any]]:
    """One row a layer: what stands in each slot and what it was scored at; none of what was made elsewhere."""
    rows = []
    for layer, pair in enumerate(child.choice):
        names = slot_names(pair)
        alone = [scores.get((layer, names[0], PARENT)), scores.get((layer, PARENT, names[1]))]
        both = scores.get((layer, *names))
        kls = [0.0 if name == PARENT else row and row.kl for name, row in zip(names, alone)]
        if not on_its_own(name_of(pair)):  # its slots have no scores of their own
            kls = [None, None]
        row = {"layer": layer, "kl_attention": kls[0], "kl_ffn": kls[1]}
        if None not in kls:
            row |= {"kl": both.kl if both else sum(kls), "kl_se": both.kl_se if both else None}
        elif is_covered(pair):
            row["kl"] = 0.0
        elif both:
            row |= {"kl": both.kl, "kl_se": both.kl_se, "span": both.span}
        for slot, spec in zip(("attention", "ffn"), pair):
            if spec is not None:
                row[slot] = {"option": shown(spec), "block": blocks_of(spec)}
        rows.append(row)
    return by_original(job, rows) if rows else []


def _options(job: Job, scores: dict[tuple[int, str, str], Scored], size: int) -> list[dict[str, Any]]:
    """The library: one row an option."""
    rows, where = [], places(job)
    for site in job.sites:
        for slot, index in (("attention", site.attention), ("ffn", site.ffn)):
            for spec in job.options.get(index, []):
                score = scores.get((site.layer, *((spec.name, PARENT) if slot == "attention" else (PARENT, spec.name))))
                before, after = job.library.losses[str(index)][spec.base.name]
                costs = block_costs(job.table, spec.priced, job.model.arch, job.scenario, size)
                rows.append({
                    "layer": where[index][0], "slot": where[index][1], "option": shown(spec),
                    "loss_before": before, "loss_after": after,
                    "kl": 0.0 if spec.name == PARENT else score and score.kl,
                    "kl_se": 0.0 if spec.name == PARENT else score and score.kl_se,
                    **{name: costs[name] for name in (*PHASES, "weight_bytes")},
                })  # fmt: skip
    return rows


def _spans(job: Job, scores: dict[tuple[int, str, str], Scored], size: int) -> list[dict[str, Any]]:
    """What may stand for several layers: one row a span, at the first of them."""
    losses, rows = stored_losses(job.library.spans), []
    for site in job.sites:
        for span in site.spans:
            pair = (span.attention, span.ffn)
            index = next(i for i, s in zip((site.attention, site.ffn), pair) if s is not None and s.method == SPAN)
            before, after = losses[index][span.name]
            score = scores[site.layer, *slot_names(pair)]
            parts = [block_costs(job.table, s and s.priced, job.model.arch, job.scenario, size) for s in pair]
            rows.append({
                "layer": site.layer, "layers": span.length, "option": span.name, "loss_before": before,
                "loss_after": after, "kl": score.kl, "kl_se": score.kl_se,
                **{name: sum(costs[name] for costs in parts) for name in (*PHASES, "weight_bytes")},
            })  # fmt: skip
    return rows


def _cost(job: Job) -> dict[str, Any]:
    """Cost of each kind of option once, and how predictions of mixed models fared."""
    table, seen = job.table, {}
    for site in job.sites:
        for index in (site.attention, site.ffn):
            for spec in job.options.get(index, []):
                if spec.block is not None:
                    seen.setdefault(shown(spec), spec.priced)
    blocks = [
        {"option": name, **{p: table.seconds(block, p) for p in PHASES},
         "spread": sum(table.blocks[key(block)][f"{p}_iqr"] for p in PHASES)}
        for name, block in seen.items()
    ]  # fmt: skip
    return {"parent": table.parent, "blocks": blocks, "calibration": {"error": table.error, "points": table.points}}


def _memory(child: Child, speeds: dict[str, Any]) -> dict[str, Any]:
    predicted = child.predicted.get("weight_bytes", 0) + child.predicted.get("cache_bytes", 0)
    return {**speeds["memory"], "predicted": predicted, "process": speeds["process"]}
