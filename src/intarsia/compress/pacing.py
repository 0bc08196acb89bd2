"""Choices at a measured speed: the child at what was asked for, and controls at the child's.

A predicted time is a few percent off, and not equally for whole layers, narrow FFNs and mixtures. So what a method has
chosen is timed beside what it is compared with, in the very way in which the finished models are timed, before it is
trained, and the budget of that method is corrected until the choice is as fast as wanted, or, where choices come in
steps (a layer more or less), no slower and as near as it can be.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from intarsia.base.progress import Progress
from intarsia.compress.assemble import Choice, random_block, with_blocks
from intarsia.compress.fusion import fuse, places
from intarsia.compress.measure import BASE
from intarsia.compress.options import PARENT
from intarsia.compress.solve import Infeasible
from intarsia.engine.scenario import compare_speed
from intarsia.model import Decoder, pack_block, ready

if TYPE_CHECKING:
    from intarsia.compress.pipeline import Job

Choose = Callable[[float], Choice]  # pace -> what a method chooses within the budgets at this pace


@dataclass(frozen=True)
class Aim:
    """How many times as fast as `reference` (a choice; None: the parent) something is to be, and what is near enough:
    differences in speed below some 1.5 % are not told from noise."""

    speed: float
    reference: Choice | None = None
    low: float = 0.985
    high: float = 1.015


def pace_for(job: Job, name: str, choose: Choose, start: float, aim: Aim) -> float:
    """The pace at which `choose` gives something of the wanted speed, or comes nearest; tried from `start` on.

    Raises `Infeasible` where `choose(start)` does.
    """
    targets = {t.kind: t.value for t in job.targets}
    settings = (job.recipe.search.rounds, job.recipe.search.repeats, aim.speed, aim.low, aim.high)
    reference = None if aim.reference is None else names(aim.reference)
    first = names(choose(start))
    parts = (job.library_print(), str(job.scenario), name, start, targets, reference, first, settings, *fusion(job))
    with job.stage(f"choose-{name}", *parts) as stage:
        if not stage.done:
            rounds = _rounds(job, name, choose, start, aim)
            stage.finish(rounds=rounds, pace=nearest(rounds, aim)["pace"])
        return stage.facts["pace"]


def fusion(job: Job) -> list[int]:
    """What the fusion of FFNs adds to a fingerprint."""
    return [job.recipe.fusion.most] if job.recipe.fusion.most > 1 else []


def names(choice: Choice) -> list[tuple]:
    """What stands at every site, as JSON."""
    return [tuple(None if spec is None else spec.name for spec in pair) for pair in choice]


def unchanged(choice: Choice) -> bool:
    """Is it the parent itself? Noise in a timing may loosen a budget so far; it is nobody's child."""
    return all(spec is None or (spec.method == PARENT and not spec.precision) for pair in choice for spec in pair)


def nearest(rounds: list[dict], aim: Aim) -> dict:
    """Of the rounds that are fast enough, the one whose speed is nearest to the middle of what is near enough; of all
    where none is fast enough. A budget is a limit: what is slower has not been made within it."""
    middle = math.sqrt(aim.low * aim.high)
    fast = [r for r in rounds if r["speed"] / aim.speed >= aim.low]
    return min(fast or rounds, key=lambda r: abs(math.log(r["speed"] / aim.speed / middle)))


def _rounds(job: Job, name: str, choose: Choose, pace: float, aim: Aim) -> list[dict]:
    """What was tried: the pace, and the speed relative to the reference that came out."""
    repeats = job.recipe.search.repeats
    reference = job.runner() if aim.reference is None else stand_in(job, aim.reference)
    seen, rounds = [], []
    for _ in range(job.recipe.search.rounds):
        try:
            choice = choose(pace)
        except Infeasible:
            break  # what was found comes closest
        if names(choice) in seen or unchanged(choice):
            break
        seen.append(names(choice))
        with Progress(f"timing {name}", 2 * (repeats + 1)) as progress:
            models = {"reference": reference, name: stand_in(job, choice)}
            speed = compare_speed(models, job.scenario, repeats, advance=progress.advance)[name]["speedup"]["median"]
        rounds.append({"pace": pace, "speed": speed})
        if aim.low <= speed / aim.speed <= aim.high:
            break
        # Speed is about inverse to the budget, and one timing is noisy: the next pace is what all of them say.
        pace = math.exp(statistics.fmean(math.log(r["pace"] * r["speed"] / aim.speed) for r in rounds))
    return rounds


def stand_in(job: Job, choice: Choice) -> Decoder:
    """A model of the choice's shapes, with random weights where the parent's own do not stand: it costs the same."""
    blocks, parent, packed = [], job.runner(), job.table.packed
    for site, specs in zip(job.sites, choice, strict=True):
        for index, spec in zip((site.attention, site.ffn), specs):
            if spec is not None and spec.method == PARENT and not spec.precision:
                blocks.append(parent.blocks[index])
            elif spec is not None and spec.block is not None:
                blocks.append(random_block(spec.block, parent, index))
                if packed:
                    pack_block(blocks[-1], spec.precision or BASE)
    model = with_blocks(parent, blocks)
    if packed:
        return ready(model)
    where = places(model.arch.blocks, job.recipe.fusion.most)
    return fuse(model, where) if where else model
