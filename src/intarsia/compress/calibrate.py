"""Scores read where a child stands: the exact search again and again, each time around the best child so far.

Replace-one-site scores are of the whole parent, and far from it they are no longer true: what a second narrow FFN costs
depends on the first. So every option is scored anew as the one change of the best candidate, and the search asked for
the best choice that differs from it in a few sites, which is assembled and measured. It becomes the candidate if it is
nearer to the parent, and if not, fewer sites may change: sequential linear programming with a trust region, in the
choices of Puzzle (arXiv 2411.19146, 4.3).
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from intarsia.base.files import append_jsonl, fingerprint, read_jsonl
from intarsia.base.progress import Progress
from intarsia.compress.assemble import Choice, assemble, packed, unpacked_choice
from intarsia.compress.library import Library
from intarsia.compress.mend import Matrices, with_matrices
from intarsia.compress.options import Site
from intarsia.compress.problem import Options, choice_of, on_its_own
from intarsia.compress.score import Scorer
from intarsia.compress.solve import Bound, Infeasible, Sites, Solution, describe, solve
from intarsia.compress.targets import Problem
from intarsia.model import Decoder

if TYPE_CHECKING:
    from intarsia.compress.coupled import Coupled

NAME, CHANGED = "calibrated", "changed"  # of the candidate; of the cost that counts the sites which differ
SHARE = 4  # at first one site in so many may change

Scores = tuple[tuple[float, ...], ...]  # sites x options


@dataclass(frozen=True)
class Around:
    """A child's scores: of every option what the metric becomes beyond the child's own `value` when it stands there
    alone; infinite where it may not. `radius`: so many sites may differ from `center`."""

    center: tuple[int, ...]
    value: float
    scores: Scores
    radius: int

    def solve(self, problem: Problem, bounds: Sequence[Bound], time_limit: float) -> Solution:
        """The best choice within the bounds and the radius; its own score is that of the problem."""
        sites = [
            [dataclasses.replace(o, score=score, costs={**o.costs, CHANGED: float(n != here)})
             for n, (o, score) in enumerate(zip(known, row))]
            for known, row, here in zip(problem.sites, self.scores, self.center)
        ]  # fmt: skip
        near = Bound(CHANGED, {CHANGED: 1.0}, float(self.radius))
        fixed = {**problem.fixed, CHANGED: 0.0}
        found = solve(sites, [*bounds, near], fixed=fixed, time_limit=time_limit)[0]
        proof = {"optimal": found.optimal, "gap": found.gap}
        return describe(problem.sites, found.choice, bounds, problem.fixed, **proof)

    def kept(self) -> dict[str, Any]:
        """As JSON, which knows no infinity."""
        scores = [[score if math.isfinite(score) else None for score in row] for row in self.scores]
        return {"center": self.center, "value": self.value, "scores": scores, "radius": self.radius}

    @classmethod
    def read(cls, kept: dict[str, Any]) -> Around:
        scores = tuple(tuple(math.inf if score is None else score for score in row) for row in kept["scores"])
        return cls(tuple(kept["center"]), kept["value"], scores, kept["radius"])


@dataclass(frozen=True)
class Ground:
    """Where scores come from: what judges, what options there are, and the file of rows that are known already."""

    scorer: Scorer
    library: Library | Coupled
    sites: Sequence[Site]
    options: Options
    metric: str
    file: Path
    # The last matrices that children get before their blocks are packed.
    mend: Callable[[Sequence[Choice]], Iterable[Matrices]] = lambda choices: [{} for _ in choices]
    judge: Scorer | None = None  # of whole children, on more text; None: the scorer

    def children(self, choices: Sequence[Choice]) -> Iterator[Decoder]:
        """As they are judged, one at a time: mended, then packed."""
        return map(self._child, self.mend(choices), choices)

    def _child(self, matrices: Matrices, choice: Choice) -> Decoder:
        child = with_matrices(assemble(self.library, self.sites, unpacked_choice(choice)), matrices)
        return packed(self.library, self.sites, choice, child)

    def measure(self, several: Sequence[Sequence[str]]) -> list[float]:
        """The metric of each child that a solution of such names is."""
        children = self.children([choice_of(names, self.sites, self.options) for names in several])
        return [(self.judge or self.scorer).whole(child)[self.metric] for child in children]


def calibrate(ground: Ground, problem: Problem, bounds: Sequence[Bound], start: Sequence[int], value: float,
              rounds: int, time_limit: float) -> tuple[Solution, float, Around] | None:
    """The best choice that so many rounds find from `start`, whose metric is `value`: with its own metric and the
    scores that it comes from. None where nothing better was found."""
    best, center, radius = None, tuple(start), max(1, len(problem.sites) // SHARE)
    for number in range(1, rounds + 1 if math.isfinite(value) else 0):
        scores = rescored(ground, problem.sites, center, f"scores around the best child, {number} of {rounds}")
        step = None
        while step is None and radius:
            around = Around(center, value, scores, radius)
            step = _step(ground, problem, bounds, around, time_limit)
            radius = radius if step else radius // 2
        if step is None:
            break
        found, value = step
        best, center = (found, value, around), found.choice
    return best


def _step(ground: Ground, problem: Problem, bounds: Sequence[Bound], around: Around,
          time_limit: float) -> tuple[Solution, float] | None:
    """The solution around a child and its metric, where it is better than the child."""
    try:
        found = around.solve(problem, bounds, time_limit)
    except Infeasible:
        return None
    if found.choice == around.center:
        return None
    value = ground.measure([found.names])[0]
    return (found, value) if value < around.value else None


def rescored(ground: Ground, known: Sites, center: Sequence[int], title: str) -> Scores:
    """The scores of every option around a child, all on the scorer's text. Options that change one slot of a layer are
    measured; one that changes both is the sum of the two where both are options. Sites under spans stay as they are.
    Rows go to the ground's file as they are found, and those already there are not measured again."""
    names = [site[n].name for site, n in zip(known, center)]
    mark = fingerprint(names)
    done = {(r["center"], r["site"], r["option"]): r["value"] for r in read_jsonl(ground.file)}
    singles = [list(_singles(site, name)) for site, name in zip(known, names)]
    scores: list[list[float]] = []
    with Progress(title, sum(map(len, singles))) as progress:
        child = next(ground.children([choice_of(names, ground.sites, ground.options)]))
        value = ground.scorer.whole(child)[ground.metric]
        for position, measure in enumerate(_walk(ground, names, child)):
            found = {}
            for name in singles[position]:
                key = mark, position, name
                if key not in done:
                    done[key] = measure(name)
                    append_jsonl(ground.file, {"center": mark, "site": position, "option": name, "value": done[key]})
                found[name] = done[key] - value if math.isfinite(done[key]) else math.inf
                progress.advance()
            scores.append([_score(option.name, option.score, names[position], found) for option in known[position]])
    return tuple(map(tuple, scores))


def _singles(site: Sequence, name: str) -> Iterator[str]:
    """Of a site's options those that are measured around the one called `name`: all that differ in one slot, and those
    that differ in both where one of the two steps is no option."""
    options = {o.name for o in site if on_its_own(o.name) and math.isfinite(o.score)} - {name}
    if not on_its_own(name):
        return
    for other in (o.name for o in site if o.name in options):
        steps = _steps(name, other)
        if len(steps) == 1 or not options >= set(steps):
            yield other


def _steps(name: str, other: str) -> list[str]:
    """From one composition to another: what changes one slot only, in turn."""
    (a, f), (b, g) = name.split(" | "), other.split(" | ")
    return [f"{b} | {f}"] * (a != b) + [f"{a} | {g}"] * (f != g)


def _score(name: str, own: float, center: str, found: dict[str, float]) -> float:
    if name == center:
        return 0.0
    if not (math.isfinite(own) and on_its_own(name) and on_its_own(center)):
        return math.inf
    return found[name] if name in found else math.fsum(found[step] for step in _steps(center, name))


def _walk(ground: Ground, names: Sequence[str], child: Decoder) -> Iterator[Callable[[str], float]]:
    """Up through the child called so: at every site what measures the child with another option there."""
    scorer, choice = ground.scorer, choice_of(names, ground.sites, ground.options)
    with torch.inference_mode():
        x = child.embed_tokens(scorer.ids)
    at = 0
    for site, specs in zip(ground.sites, choice):
        end = at + sum(spec is not None and spec.block is not None for spec in specs)

        def measure(name: str, x=x, site=site, end=end) -> float:
            other = choice_of([name], [site], ground.options)[0]
            for block in ground.library.pair(site, other):
                x = scorer.change(x, block)
            return scorer.measure(x, end, child)[ground.metric]

        yield measure
        with torch.inference_mode():
            x = child.run(x, at, end, rope=scorer.rope)
        at = end
