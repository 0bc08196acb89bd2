"""The search of a run: exact optima under several readings of the scores, judged by what is real.

Scores add up and damage does not: the KL of an assembled child is one and a half to three times the sum of its parts,
and more so where many attentions go. So the exact search is asked several times, with the same measured scores read
differently, and every answer is assembled from the library, mended (`mend`) and its KL measured. A tournament
(`tournament`) then tells which of the best comes back best. Where that is asked, scores are also read around the best
of them (`calibrate`). The winner is timed beside the parent; where it is slower or needlessly faster than a target on
time asks, the same reading is solved again with a corrected budget.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from intarsia.base.files import read_json, write_json
from intarsia.base.progress import Progress
from intarsia.compress.assemble import Choice
from intarsia.compress.calibrate import NAME as CALIBRATED
from intarsia.compress.calibrate import Around, Ground, calibrate
from intarsia.compress.mend import lightly
from intarsia.compress.options import NONE, PARENT
from intarsia.compress.pacing import Aim, pace_for
from intarsia.compress.pipeline import Job
from intarsia.compress.problem import choice_of, on_its_own, pair_name
from intarsia.compress.solve import Bound, Infeasible, Solution, describe, solve
from intarsia.compress.stages import make_judging, make_scorer, print_of
from intarsia.compress.targets import Problem, Target, on_whole_time, paced, reach


@dataclass(frozen=True)
class View:
    """A reading of the scores: harm to attention counts `attention` times, and every score is raised to `power`
    (above 1 spreads the damage over many sites, below 1 gathers it in few). `layers`: whole layers only, kept, left out
    or under a span. All harm of a span counts as harm to attention: it leaves whole layers out."""

    name: str
    attention: float = 1.0
    power: float = 1.0
    layers: bool = False


VIEWS = (
    View("as scored"),
    View("attention twice", attention=2.0),
    View("attention four times", attention=4.0),
    View("spread", power=1.5),
    View("spread, attention twice", attention=2.0, power=1.5),
    View("gathered", power=0.6),
    View("whole layers", layers=True),
)


def search(job: Job, problem: Problem) -> tuple[dict[str, Solution], list[dict]]:
    """Choices under the targets by the reading that gave them, least real KL first; and the frontier of predicted
    quality against predicted speed."""
    with job.stage("search", print_of(job, "score"), *made_from(job)) as stage:
        if not stage.done:
            found, real = _best(job, problem)
            with Progress("frontier", 1):
                rows_ahead = frontier(problem)
            rows = [{"name": name} | dataclasses.asdict(s) for name, s in found.items()]
            write_json(stage.folder / "solutions.json", {"solutions": rows, "frontier": rows_ahead, "kl": real})
            stage.finish(optimal=next(iter(found.values())).optimal)
        kept = read_json(stage.folder / "solutions.json")
    found = {s.pop("name"): Solution(**{**s, "choice": tuple(s["choice"]), "names": tuple(s["names"])})
             for s in kept["solutions"]}  # fmt: skip
    return found, kept["frontier"]


def _around(job: Job) -> Path:
    """The scores that the calibrated candidate comes from."""
    return job.run.path / "stages" / "search" / "around.json"


def made_from(job: Job) -> tuple:
    """What a search depends on beside its scores."""
    targets, placed = {t.kind: t.value for t in job.targets}, [job.placement.share] if job.placement else []
    pairs = [job.coupled.print] if job.coupled else []
    rounds = job.recipe.search.calibrations
    more = [*placed, *pairs, *([{"calibrations": rounds}] if rounds else [])]
    given = print_of(job, "cost"), job.recipe.score.metric, job.recipe.mend.light, job.judged_by
    return *given, targets, settings(job), VIEWS, *more


def ground_of(job: Job) -> Ground:
    """What scores options around the run's candidates, and judges these."""
    library, file = job.coupled or job.library, job.run.path / "stages" / "search" / "around.jsonl"
    mend = functools.partial(lightly, job, library)
    judge = make_judging(job)
    scorer = make_scorer(job) if job.recipe.search.calibrations else judge  # scores around a child are asked for then
    return Ground(scorer, library, job.sites, job.options, job.recipe.score.metric, file, mend, judge)


def _best(job: Job, problem: Problem) -> tuple[dict[str, Solution], dict[str, float]]:
    """The candidates within the targets, least real KL first, and the KL of each by name. Where that is asked, the
    first of them comes from scores around the best of the others."""
    ground, bounds = ground_of(job), problem.bounds(job.targets)
    named = candidates(problem, bounds, *settings(job))
    if len(named) < job.recipe.tournament.finalists:  # where readings agree, the next best have to play
        named = candidates(problem, bounds, *settings(job, enough=True))
    real = dict(zip(named, ground.measure([solution.names for solution in named.values()])))
    order = sorted(named, key=lambda name: real[name] if math.isfinite(real[name]) else math.inf)
    rounds, best = job.recipe.search.calibrations, order[0]
    better = calibrate(ground, problem, bounds, named[best].choice, real[best], rounds, job.recipe.search.time_limit)
    if better:
        named[CALIBRATED], real[CALIBRATED], around = better
        write_json(_around(job), around.kept())
        order.insert(0, CALIBRATED)
    return {name: named[name] for name in order}, real


def settings(job: Job, enough: bool = False) -> tuple[int, int, float]:
    """How many solutions of the scores as they are (`enough` for a tournament), how different, and the seconds for
    one."""
    recipe, least = job.recipe.search, job.recipe.tournament.finalists if enough else 1
    return max(recipe.solutions, least), recipe.min_difference, recipe.time_limit


def at_speed(
    job: Job, problem: Problem, chosen: Solution, solved: Callable[[list[Bound]], Solution]
) -> tuple[Solution, float]:
    """`chosen`, or what `solved` gives in its place within other budgets, at the speed that the targets ask for, as
    measured; and the pace: what the budgets on time were multiplied with for that."""
    bounds = problem.bounds(job.targets)
    asked = max((_whole(problem) / b.limit for b in bounds if on_whole_time(b)), default=0.0)
    if not asked:
        return chosen, 1.0

    def choose(pace: float) -> Choice:
        return choice_of(solved(paced(bounds, pace)).names, job.sites, job.options)

    pace = pace_for(job, "child", choose, 1.0, Aim(asked, low=0.995, high=1.03))
    return solved(paced(bounds, pace)), pace


def again(job: Job, problem: Problem, name: str) -> Callable[[list[Bound]], Solution]:
    """The reading `name` asked once more, within other budgets."""
    if name == CALIBRATED:
        around = Around.read(read_json(_around(job)))
        return lambda bounds: around.solve(problem, bounds, job.recipe.search.time_limit)

    def solved(bounds: list[Bound]) -> Solution:
        named = candidates(problem, bounds, *settings(job, enough=True), name)
        if name not in named:
            raise Infeasible(f"within these bounds there is no choice {name}.")
        return named[name]

    return solved


def candidates(
    problem: Problem, bounds: list[Bound], num_solutions: int, min_difference: int, time_limit: float, only: str = ""
) -> dict[str, Solution]:
    """Different choices within the bounds, by the view that gave them: the optimum of every view, and the next best of
    the scores as they are. `only`: those of the view that this name is of. Raises `Infeasible` when nothing meets the
    bounds."""
    found: dict[str, Solution] = {}
    for view in [v for v in VIEWS if only in (v.name, "") or (v == VIEWS[0] and only.startswith(f"{v.name}, "))]:
        count = num_solutions if view == VIEWS[0] else 1
        try:
            answers = solve(
                viewed(problem, view), bounds, fixed=problem.fixed, num_solutions=count,
                min_difference=min(min_difference, len(problem.sites)), time_limit=time_limit,
            )  # fmt: skip
        except Infeasible:
            if view == VIEWS[0]:
                raise
            continue
        for n, answer in enumerate(answers):
            known = {s.choice for s in found.values()}
            proof = {"optimal": answer.optimal, "gap": answer.gap}
            solution = describe(problem.sites, answer.choice, bounds, problem.fixed, **proof)
            if solution.choice not in known:
                found[view.name + (f", {n + 1}" if n else "")] = solution
    return found


def viewed(problem: Problem, view: View) -> list[list]:
    """The sites of the problem with their scores read as `view` says; indices and costs stay."""
    whole = (pair_name(PARENT, PARENT), pair_name(NONE, NONE))
    sites = []
    for site in problem.sites:
        alone = {option.name: option.score for option in site}
        read = []
        for option in site:
            own = on_its_own(option.name)
            attention = alone.get(pair_name(option.name.split(" | ")[0], PARENT), 0.0) if own else option.score
            score = (option.score + (view.attention - 1) * attention) ** view.power
            if view.layers and own and option.name not in whole:
                score = math.inf
            read.append(dataclasses.replace(option, score=score))
        sites.append(read)
    return sites


def _whole(problem: Problem) -> float:
    """Predicted seconds of the parent at the scenario."""
    costs = problem.parent_costs()
    return costs["prefill_seconds"] + costs["decode_seconds"]


def frontier(problem: Problem, points: int = 14) -> list[dict]:
    """The least predicted score at speed-ups from a little to almost all that is possible, most of them small: a gain
    is so many times the one before, because what is of use lies near the parent."""
    most = 0.95 * ((reach(problem, "speedup").extreme or 1.0) - 1)
    least = min(0.05, most / 10)
    rows = []
    for n in range(points):
        value = 1 + least * (most / least) ** (n / (points - 1)) if most else 1.0
        try:
            bounds = problem.bounds([Target("speedup", value)])
            best = solve(problem.sites, bounds, fixed=problem.fixed, time_limit=10)[0]
        except Infeasible:
            continue
        rows.append({"speedup_predicted": problem.value("speedup", best.costs), "kl_predicted": best.score})
    return rows
