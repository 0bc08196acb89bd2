"""What every option costs on the device at hand, measured inside a whole model (Puzzle 4.1).

A block timed alone keeps its weights in the cache, which no block of a real model can. So every kind of option is
timed in place: all sites of the parent are given it (each with weights of its own) and the whole model runs the
scenario; the difference to the model without these blocks, over their number, is the cost of one. All variants take
turns, so that a slow moment of the machine hits them alike. Mixed models, measured whole, are part of the fit, so that
the costs are those that add up best.
"""

from __future__ import annotations

import itertools
import random
import statistics
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from scipy.optimize import lsq_linear

from intarsia.arch import Block, active_parameters, block_cache_bytes, block_parameters
from intarsia.compress.assemble import random_block, with_blocks
from intarsia.compress.options import NONE, OptionSpec, Site
from intarsia.engine.generate import next_logits
from intarsia.engine.scenario import Scenario, clock, prompts, spread
from intarsia.model import Cache, Decoder

PHASES = ("prefill_seconds", "decode_seconds")
DECODE_STEPS = 8  # timed around the scenario's middle context, whose mean a step costs
WARM_STEPS = 1  # before them: the first reads weights that the other variants have pushed out of the cache
MIXTURE = "mixture"
STIFFNESS = 3.0
BARE = "no blocks"  # embedding, final norm and head alone
BARE_SHARE = 0.9  # of its time is the least that they are taken to cost: it is measured with noise as well


@dataclass
class CostTable:
    """Seconds of one block of each kind (keyed by `key`), of the rest of the model, and how well sums predict."""

    blocks: dict[str, dict[str, float]]  # kind -> phase -> seconds, with `<phase>_iqr`
    fixed: dict[str, float]  # phase -> seconds: embedding, final norm, head, the loop
    parent: dict[str, dict[str, float]]  # phase and total_seconds -> spread
    points: list[dict[str, Any]] = field(default_factory=list)  # mixed models: name, predicted, measured (total s)
    error: float = 0.0  # mean relative error over the points, each predicted from the others
    parent_blocks: list[Block] = field(default_factory=list)

    def seconds(self, block: Block | None, phase: str) -> float:
        return 0.0 if block is None else max(0.0, self.blocks[key(block)][phase])


    def parent_seconds(self) -> float:
        """Predicted total of the parent, the reference of a speed-up."""
        return self.total(self.parent_blocks)

    def total(self, blocks: list[Block]) -> float:
        """Predicted seconds of a whole model of these blocks."""
        return sum(self.fixed[p] + sum(self.seconds(b, p) for b in blocks) for p in PHASES)


def key(block: Block | None) -> str:
    """Blocks of one key cost the same."""
    return NONE if block is None else repr(block)


def block_costs(table: CostTable, block: Block | None, arch, scenario: Scenario, size: int) -> dict[str, float]:
    """All additive costs of a block: seconds of the scenario, bytes of weights and cache, parameters."""
    params = 0 if block is None else block_parameters(block, arch.hidden_size)
    cache = 0 if block is None else block_cache_bytes(block, scenario.length, scenario.batch, size)
    times = {phase: table.seconds(block, phase) for phase in PHASES}
    return times | {"weight_bytes": params * size, "cache_bytes": cache, "params": params}


class Timer:
    """Times variants of a parent at a scenario, in turns."""

    def __init__(self, parent: Decoder, scenario: Scenario, sites: list[Site]):
        self.parent, self.scenario, self.sites = parent, scenario, sites
        self.ids = prompts(parent, scenario)
        self.pool: dict[str, list] = {}

    def blocks(self, block: Block, slot: str) -> list:
        """One random block of this kind for every site of the slot, made once."""
        name = key(block)
        if name not in self.pool:
            self.pool[name] = [random_block(block, self.parent, n) for n in range(len(self.sites))]
        return self.pool[name]

    def model(self, choice: list[tuple[Any, Any]]) -> Decoder:
        """A model from (attention, ffn) per site: "parent", None for nothing, or a block description."""
        blocks = []
        for n, (site, pair) in enumerate(zip(self.sites, choice)):
            for slot, index, wanted in (("attention", site.attention, pair[0]), ("ffn", site.ffn, pair[1])):
                if wanted == "parent" and index is not None:
                    blocks.append(self.parent.blocks[index])
                elif wanted is not None and wanted != "parent":
                    blocks.append(self.blocks(wanted, slot)[n])
        return with_blocks(self.parent, blocks)

    @torch.inference_mode()
    def once(self, model: Decoder) -> tuple[float, float]:
        """Seconds of one prefill, and of all decode steps: so many times the median of `DECODE_STEPS` steps at the
        middle context, so that a step in which something else ran does not count."""
        scenario = self.scenario
        steps = WARM_STEPS + DECODE_STEPS
        cache = Cache(model.arch, scenario.batch, scenario.length + steps, model.dtype, model.device)
        began = clock(model)
        token = next_logits(model, self.ids, cache).argmax(-1, keepdim=True)
        read = clock(model)
        if not scenario.generated:
            return read - began, 0.0
        cache.length = scenario.prompt + max(0, scenario.generated - steps) // 2
        marks = []
        for _ in range(steps):
            marks.append(clock(model))
            token = next_logits(model, token, cache).argmax(-1, keepdim=True)
        marks.append(clock(model))
        taken = [after - before for before, after in itertools.pairwise(marks)]
        return read - began, statistics.median(taken[WARM_STEPS:]) * scenario.generated

    def turns(self, models: dict[str, Decoder], repeats: int, advance: Callable[[], None]) -> dict[str, np.ndarray]:
        """(repeats, 2) seconds for every model; the first turn is not counted."""
        rows: dict[str, list[tuple[float, float]]] = {name: [] for name in models}
        for turn in range(repeats + 1):
            for name, model in models.items():
                seconds = self.once(model)
                if turn:
                    rows[name].append(seconds)
                advance()
        return {name: np.array(r) for name, r in rows.items()}


def distinct(options: dict[int, list[OptionSpec]], sites: list[Site]) -> dict[str, tuple[str, Block]]:
    """Every kind of block that may stand in the model: key -> (slot it is timed in, block)."""
    found: dict[str, tuple[str, Block]] = {}
    for site in sites:
        for slot, index in (("attention", site.attention), ("ffn", site.ffn)):
            for spec in options.get(index, []):
                if spec.block is not None:
                    found.setdefault(key(spec.block), (slot, spec.block))
    return found


def count_runs(options: dict[int, list[OptionSpec]], sites: list[Site], repeats: int, calibration: int) -> int:
    """How many runs of the scenario `measure_costs` makes."""
    return (len(distinct(options, sites)) + 4 + calibration) * (repeats + 1)


def measure_costs(
    parent: Decoder, scenario: Scenario, sites: list[Site], options: dict[int, list[OptionSpec]], repeats: int,
    calibration: int, seed: int = 0, advance: Callable[[], None] = lambda: None,
) -> CostTable:
    """Time every kind of option in place, and `calibration` mixed models to calibrate their sum."""
    timer, kinds = Timer(parent, scenario, sites), distinct(options, sites)
    whole = [("parent", "parent")] * len(sites)
    lacking = {"no attention": (None, "parent"), "no ffn": ("parent", None), BARE: (None, None)}
    choices = {"parent": whole} | {name: [pair] * len(sites) for name, pair in lacking.items()}
    for name, (slot, block) in kinds.items():
        choices[name] = [(block, "parent") if slot == "attention" else ("parent", block)] * len(sites)
    choices |= _mixtures(options, sites, calibration, seed)
    runs = timer.turns({n: timer.model(c) for n, c in choices.items()}, repeats, advance)
    models = {n: _resolve(c, sites, parent) for n, c in choices.items()}
    table = _table(runs, models, kinds, parent.arch.hidden_size)
    table.parent_blocks = models["parent"]
    _check(table, runs, models, kinds, parent.arch.hidden_size)
    return table


def _mixtures(options, sites: list[Site], count: int, seed: int) -> dict[str, list[tuple[Any, Any]]]:
    """Random models between the parent and nothing, to hold the sum of costs against."""
    draw = random.Random(seed)
    result = {}
    for n in range(count):
        keep = 0.25 + 0.5 * n / max(1, count - 1)
        result[f"{MIXTURE} {n + 1}"] = [
            tuple(
                "parent" if index is None or draw.random() < keep else draw.choice(options[index]).block
                for index in (site.attention, site.ffn)
            )
            for site in sites
        ]
    return result


def steady(seconds: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Typical seconds of every model (models,) and the pace of every turn (turns,) from seconds (turns, models).

    A shared machine is now fast, now slow, for seconds at a time, and that multiplies all that runs meanwhile. So a
    time is taken as model x turn, and both are found by median polish of the logarithms (Tukey 1977).
    """
    logs = np.log(seconds)
    pace = np.zeros(len(logs))
    for _ in range(20):
        model = np.median(logs - pace[:, None], axis=0)
        pace = np.median(logs - model, axis=1)
        pace -= np.median(pace)
    return np.exp(model), np.exp(pace)


def _fit(
    rows: list[list[Block]], kinds: dict[str, tuple[str, Block]], hidden_size: int, seconds: np.ndarray, least: float
) -> np.ndarray:
    """(1 + kinds,) seconds: the fixed part, which is at least `least`, and one block of each kind, by least squares of
    relative errors over whole models given as lists of blocks.

    A block is taken as a constant of its family plus a slope times the parameters that a token meets, the same for all
    since each is read once (decode) and multiplied once a token (prefill), plus a deviation of its own. The deviation
    is shrunk by `STIFFNESS` measurements, so that noise in one kind is corrected by what all others say.
    """
    families = {name: _family(block) for name, (_, block) in kinds.items()}
    columns = sorted(set(families.values()))
    sizes = np.array([active_parameters(block, hidden_size) for _, block in kinds.values()], dtype=float)
    sizes /= sizes.max()
    common = 1 + len(columns)
    to_kind = np.zeros((len(kinds), common + len(kinds)))
    for n, name in enumerate(kinds):
        to_kind[n, [0, 1 + columns.index(families[name]), common + n]] = sizes[n], 1.0, 1.0
    counts = np.array([[float(sum(key(b) == name for b in row)) for name in kinds] for row in rows])
    system = np.hstack([np.ones((len(rows), 1)), counts @ to_kind]) / seconds[:, None]
    shrink = np.eye(system.shape[1]) * STIFFNESS * counts.sum(1).max() / 2 / seconds.max()
    shrink[: 1 + common] *= 1e-3
    low = np.r_[least, np.zeros(common), np.full(len(kinds), -np.inf)]
    answer = lsq_linear(
        np.vstack([system, shrink]), np.r_[np.ones(len(rows)), np.zeros(len(shrink))], (low, np.inf), method="bvls"
    ).x
    return np.r_[answer[0], np.maximum(0.0, to_kind @ answer[1:])]


def _family(block: Block) -> str:
    """Blocks whose cost is the same but for their parameters. What attention reads of its cache is in the constant, so
    every window is a family of its own."""
    return f"{type(block).__name__} {getattr(block, 'sliding_window', None) or ''}".strip()


def _table(
    runs: dict[str, np.ndarray], models: dict[str, list[Block]], kinds: dict[str, tuple[str, Block]], hidden_size: int
) -> CostTable:
    """One joint fit over all models a phase; the spread of a cost is that of the fits of single turns."""
    # A bare model keeps its head in the cache, as none with blocks does: it bounds the fixed part and is not fitted.
    names = [n for n in models if n != BARE]
    rows = [models[n] for n in names]
    table = CostTable({kind: {} for kind in kinds}, {}, {})
    for column, phase in enumerate(PHASES):
        seconds = np.stack([runs[n][:, column] for n in [*names, BARE]], axis=1)
        if not seconds.any():  # nothing is generated
            table.fixed[phase] = 0.0
            for kind in kinds:
                table.blocks[kind] |= {phase: 0.0, f"{phase}_iqr": 0.0}
            continue
        typical, pace = steady(seconds)
        least = BARE_SHARE * typical[-1]
        fit = _fit(rows, kinds, hidden_size, typical[:-1], least)
        turns = np.array([_fit(rows, kinds, hidden_size, row[:-1] / p, least) for row, p in zip(seconds, pace)])
        table.fixed[phase] = float(fit[0])
        for n, kind in enumerate(kinds, 1):
            table.blocks[kind] |= {phase: float(fit[n]), f"{phase}_iqr": spread(turns[:, n].tolist())["iqr"]}
    table.parent = {p: spread(runs["parent"][:, c].tolist()) for c, p in enumerate(PHASES)}
    table.parent["total_seconds"] = spread(runs["parent"].sum(1).tolist())
    return table


def _check(
    table: CostTable, runs: dict[str, np.ndarray], models: dict[str, list[Block]], kinds: dict[str, tuple[str, Block]],
    hidden_size: int,
) -> None:
    """Predict every mixed model from a fit that has not seen it, and keep the error."""
    for name in [n for n in models if n.startswith(MIXTURE)]:
        rest = {n: m for n, m in models.items() if n != name}
        known = _table({n: runs[n] for n in rest}, rest, kinds, hidden_size)
        predicted = sum(known.fixed[p] + sum(known.seconds(b, p) for b in models[name]) for p in PHASES)
        column = list(models).index(name)
        phases = [np.stack([r[:, c] for r in runs.values()], axis=1) for c in range(len(PHASES))]
        measured = float(sum(steady(p)[0][column] for p in phases if p.any()))
        table.points.append({"name": name, "predicted": predicted, "measured": measured})
    if table.points:
        table.error = statistics.fmean(abs(p["predicted"] / p["measured"] - 1) for p in table.points)


def _resolve(choice, sites: list[Site], parent: Decoder) -> list[Block]:
    """The blocks of a choice as descriptions."""
    blocks = []
    for site, pair in zip(sites, choice):
        for index, wanted in zip((site.attention, site.ffn), pair):
            if wanted == "parent" and index is not None:
                blocks.append(parent.blocks[index].spec)
            elif wanted is not None and wanted != "parent":
                blocks.append(wanted)
    return blocks
