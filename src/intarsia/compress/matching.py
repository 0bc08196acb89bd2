"""Controls at the child's own measured speed: what they are compared at.

A predicted time is a few percent off, and not equally for whole layers, narrow FFNs and mixtures. So every control is
timed in turns with the child before it is trained, and its budget is corrected until it is as fast, or, where its
choices come in steps (a layer more or less), as near as it can be.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable
from typing import TYPE_CHECKING

import numpy as np

from intarsia.base.progress import Progress
from intarsia.compress.assemble import Choice, random_block, with_blocks
from intarsia.compress.measure import Timer
from intarsia.compress.options import PARENT
from intarsia.compress.solve import Infeasible
from intarsia.model import Decoder

if TYPE_CHECKING:
    from intarsia.compress.pipeline import Job

NEAR = 0.015  # relative difference in speed from the child that is not told from noise

Choose = Callable[[float], tuple[Choice, str]]  # pace -> a choice within the budgets at this pace, and its description


def matched(job: Job, kind: str, choose: Choose, pace: float, child: Choice) -> tuple[Choice, str]:
    """The choice of a control whose measured speed is the child's. Raises `Infeasible` where `choose(pace)` does."""
    targets = {t.kind: t.value for t in job.targets}
    settings = (job.recipe.search.rounds, job.recipe.search.repeats)
    parts = (job.library_print(), str(job.scenario), kind, pace, targets, names(child), settings, NEAR)
    with job.stage(f"choose-{kind}", *parts) as stage:
        if not stage.done:
            rounds = _rounds(job, kind, choose, pace, child)
            stage.finish(rounds=rounds, pace=nearest(rounds)["pace"])
        return choose(stage.facts["pace"])


def names(choice: Choice) -> list[tuple]:
    """What stands at every site, as JSON."""
    return [tuple(None if spec is None else spec.name for spec in pair) for pair in choice]


def nearest(rounds: list[dict]) -> dict:
    """The round whose speed is nearest to the child's."""
    return min(rounds, key=lambda r: abs(math.log(r["speed"])))


def _rounds(job: Job, kind: str, choose: Choose, pace: float, child: Choice) -> list[dict]:
    """What was tried: the pace, and the speed relative to the child's that came out."""
    timer, repeats = Timer(job.model, job.scenario, job.sites), job.recipe.search.repeats
    reference, seen, rounds = stand_in(job, child), [], []
    for _ in range(job.recipe.search.rounds):
        try:
            choice, _ = choose(pace)
        except Infeasible:
            if not rounds:
                raise
            break
        if names(choice) in seen:
            break
        seen.append(names(choice))
        models = {"child": reference, kind: stand_in(job, choice)}
        with Progress(f"timing {kind} beside the child", 2 * (repeats + 1)) as progress:
            runs = timer.turns(models, repeats, progress.advance)
        speed = float(np.median(runs["child"].sum(1) / runs[kind].sum(1)))
        rounds.append({"pace": pace, "speed": speed})
        if abs(math.log(speed)) <= NEAR:
            break
        # Speed is about inverse to the budget, and one timing is noisy: the next pace is what all of them say.
        pace = math.exp(statistics.fmean(math.log(r["pace"] * r["speed"]) for r in rounds))
    return rounds


def stand_in(job: Job, choice: Choice) -> Decoder:
    """A model of the choice's shapes, with random weights where the parent's own do not stand: it costs the same."""
    blocks = []
    for site, specs in zip(job.sites, choice, strict=True):
        for index, spec in zip((site.attention, site.ffn), specs):
            if spec is not None and spec.method == PARENT:
                blocks.append(job.model.blocks[index])
            elif spec is not None and spec.block is not None:
                blocks.append(random_block(spec.block, job.model, index))
    return with_blocks(job.model, blocks)
