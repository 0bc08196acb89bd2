"""The search of a run: exact optima under several readings of the scores, judged by what is real.

Scores add up and damage does not: the KL of an assembled child is one and a half to three times the sum of its parts,
and more so where many attentions go. So the exact search is asked several times, with the same measured scores read
differently, and every answer is assembled from the library and its KL measured, which takes a second. The best real one
is timed beside the parent; where it comes out slower or needlessly faster than a target on time asks, the budget is
corrected by what was measured and all is done again.
"""

from __future__ import annotations

import dataclasses
import math
import statistics
from dataclasses import dataclass

import numpy as np

from intarsia.base.files import read_json, write_json
from intarsia.base.progress import Progress
from intarsia.compress.assemble import assemble
from intarsia.compress.measure import Timer
from intarsia.compress.options import NONE, PARENT
from intarsia.compress.pipeline import Job
from intarsia.compress.problem import choice_of, pair_name
from intarsia.compress.score import Scorer
from intarsia.compress.solve import Bound, Infeasible, Solution, describe, solve
from intarsia.compress.stages import make_scorer, print_of
from intarsia.compress.targets import Problem, Target, on_whole_time, paced, reach


@dataclass(frozen=True)
class View:
    """A reading of the scores: harm to attention counts `attention` times, and every score is raised to `power`
    (above 1 spreads the damage over many sites, below 1 gathers it in few). `layers`: whole layers only."""

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


def search(job: Job, problem: Problem) -> tuple[list[Solution], list[dict], float]:
    """The best choices under the targets, the frontier of predicted quality against predicted speed, and the pace: the
    factor that the budgets on time ended with."""
    recipe, targets = job.recipe.search, {t.kind: t.value for t in job.targets}
    settings = recipe.model_dump(exclude={"finalists", "trial_tokens"})  # those belong to the trial that follows
    parts = (print_of(job, "score"), print_of(job, "cost"), job.recipe.score.metric, targets, settings, VIEWS)
    with job.stage("search", *parts) as stage:
        if not stage.done:
            found, pace, rounds = _search(job, problem)
            with Progress("frontier", 1):
                frontier = _frontier(problem)
            rows = [dataclasses.asdict(s) for s in found]
            write_json(stage.folder / "solutions.json",
                       {"solutions": rows, "frontier": frontier, "pace": pace, "rounds": rounds})  # fmt: skip
            stage.finish(optimal=found[0].optimal)
        kept = read_json(stage.folder / "solutions.json")
    found = [Solution(**{**s, "choice": tuple(s["choice"]), "names": tuple(s["names"])}) for s in kept["solutions"]]
    return found, kept["frontier"], kept["pace"]


def _search(job: Job, problem: Problem) -> tuple[list[Solution], float, list[dict]]:
    recipe, pace, rounds = job.recipe.search, 1.0, []
    wanted = problem.bounds(job.targets)
    asked = max((_whole(problem) / b.limit for b in wanted if on_whole_time(b)), default=0.0)
    scorer = make_scorer(job)
    found, real = _best(job, problem, wanted, scorer)
    rounds.append({"pace": pace, "kl": real})
    while asked and len(rounds) <= recipe.rounds:
        predicted, measured = problem.value("speedup", found[0].costs), _timed(job, found[0])
        rounds[-1] |= {"predicted": predicted, "measured": measured}
        if asked <= measured <= 1.03 * asked:
            break
        # One timing is noisy too: the pace is what all of them together say.
        pace = math.exp(statistics.fmean(math.log(r["measured"] / r["predicted"]) for r in rounds))
        try:
            found, real = _best(job, problem, paced(wanted, pace), scorer)
        except Infeasible:
            break  # what was found comes closest
        rounds.append({"pace": pace, "kl": real})
    return found, pace, rounds


def _best(job: Job, problem: Problem, bounds: list[Bound], scorer: Scorer) -> tuple[list[Solution], dict[str, float]]:
    """The candidates within `bounds`, least real KL first, and the KL of each by name."""
    named = candidates(problem, bounds, job.recipe.search.solutions, job.recipe.search.min_difference,
                       job.recipe.search.time_limit)  # fmt: skip
    real: dict[str, float] = {}
    with Progress("candidates assembled", len(named)) as progress:
        for name, solution in named.items():
            choice = choice_of(solution.names, job.sites, job.options)
            real[name] = scorer.whole(assemble(job.library, job.sites, choice))[job.recipe.score.metric]
            progress.advance()
    order = sorted(named, key=lambda name: real[name] if math.isfinite(real[name]) else math.inf)
    return [named[name] for name in order], real


def candidates(
    problem: Problem, bounds: list[Bound], num_solutions: int, min_difference: int, time_limit: float
) -> dict[str, Solution]:
    """Different choices within the bounds, by the view that gave them: the optimum of every view, and the next best of
    the scores as they are. Raises `Infeasible` when nothing meets the bounds."""
    found: dict[str, Solution] = {}
    for view in VIEWS:
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
            attention = alone.get(pair_name(option.name.split(" | ")[0], PARENT), 0.0)
            score = (option.score + (view.attention - 1) * attention) ** view.power
            if view.layers and option.name not in whole:
                score = math.inf
            read.append(dataclasses.replace(option, score=score))
        sites.append(read)
    return sites


def _whole(problem: Problem) -> float:
    """Predicted seconds of the parent at the scenario."""
    costs = problem.parent_costs()
    return costs["prefill_seconds"] + costs["decode_seconds"]


def _timed(job: Job, solution: Solution) -> float:
    """The measured speed-up of a choice, assembled from the library: many short turns beside the parent."""
    child = assemble(job.library, job.sites, choice_of(solution.names, job.sites, job.options))
    timer, repeats = Timer(job.model, job.scenario, job.sites), job.recipe.search.repeats
    with Progress("timing the choice", 2 * (repeats + 1)) as progress:
        runs = timer.turns({"parent": job.model, "child": child}, repeats, progress.advance)
    return float(np.median(runs["parent"].sum(1) / runs["child"].sum(1)))


def _frontier(problem: Problem, points: int = 9) -> list[dict]:
    """The least predicted score at speed-ups from a little to almost all that is possible."""
    extreme = reach(problem, "speedup").extreme or 1.0
    rows = []
    for n in range(1, points + 1):
        value = 1 + (extreme - 1) * n / (points + 1)
        try:
            bounds = [problem.bound(Target("speedup", value))]
            best = solve(problem.sites, bounds, fixed=problem.fixed, time_limit=10)[0]
        except Infeasible:
            continue
        rows.append({"speedup_predicted": problem.value("speedup", best.costs), "kl_predicted": best.score})
    return rows
