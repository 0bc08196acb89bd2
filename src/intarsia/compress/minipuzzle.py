"""MiniPuzzle beside Puzzle: uniform children of the same library, tried and not added up (Nemotron-H, 2504.03624, 3.1).

1. Blocks are ranked by what leaving them out does (`depth`).
2. A candidate keeps so many blocks of every kind, the most important ones, and gives all blocks of a kind one option.
   Candidates are those within the targets that could keep nothing more.
3. They are ranked by next-token accuracy and by agreement with the parent, the best of both benchmarked, all of them
   mended (`mend`), and the best of these distilled for a moment: what stands first then becomes the child.
"""

from __future__ import annotations

import functools
import statistics
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

from intarsia.base.files import append_jsonl, read_jsonl
from intarsia.base.progress import Progress
from intarsia.base.runfolder import Stage
from intarsia.compress.depth import Removal, by_kind, count_looks, removal_order
from intarsia.compress.grid import Ranking
from intarsia.compress.problem import choice_of
from intarsia.compress.score import Scorer
from intarsia.compress.search import ground_of
from intarsia.compress.solve import Bound, Infeasible, Solution, describe
from intarsia.compress.stages import make_judging, make_scorer, print_of
from intarsia.compress.targets import Problem
from intarsia.compress.tournament import summarised, tournament
from intarsia.compress.uniform import Space, Uniform
from intarsia.data import fetch
from intarsia.evaluate import load_task, run_task
from intarsia.model import Decoder

if TYPE_CHECKING:
    from intarsia.compress.pipeline import Job


def minipuzzle(job: Job, problem: Problem) -> tuple[Solution, list[Solution], dict[str, Any]]:
    """The choice for the child, the shortlist that it comes from, and what summary.json gets of it."""
    with job.ranks.first_alone():  # ranks after the first find these stages done
        ranking, damage = rank(job)
        found = candidates(job, problem, ranking)
        judged = judge(job, found)
        short = shortlist(judged, job.recipe.minipuzzle.shortlist)
        before = benchmark_all(job, {name: found[name] for name in short})
    order = sorted(short, key=lambda name: strength(before[name]), reverse=True)
    entrants = {name: found[name] for name in order[: job.recipe.tournament.finalists]}
    settings = (job.judged_by, job.recipe.evaluate, job.recipe.minipuzzle.tasks)
    judging = functools.cache(lambda: make_judging(job))  # not made where all has been played
    played = tournament(job, entrants, before.__getitem__, lambda model: benchmark(job, judging(), model), *settings)
    best = max(played, key=lambda name: strength(played[name]["after"]), default=order[0])
    table = [{"name": name, **judged[name], "before": before[name]} for name in short]
    facts = {"ranking": ranking, "damage": damage, "candidates": len(found), "shortlist": table}
    held = {"tournament": summarised(job, entrants, played, best, "average")} if played else {}
    return found[best], [found[name] for name in short], {"minipuzzle": facts} | held


def entrant(job: Job, problem: Problem) -> dict[str, Solution]:
    """The uniform child that enters Puzzle's tournament, by name: the first of the shortlist. Empty where no uniform
    child meets the targets."""
    ranking, _ = rank(job)
    try:
        found = candidates(job, problem, ranking)
    except Infeasible as error:
        print(f"uniform children are left out: {error}")
        return {}
    name = shortlist(judge(job, found), 1)[0]
    return {name: found[name]}


def rank(job: Job) -> tuple[Ranking, list[tuple[int, float]]]:
    """Blocks by kind, least important first; and the order in which they left, with the damage."""
    recipe = job.recipe.minipuzzle
    with job.stage("depth", job.corpus.fingerprint, job.recipe.score, recipe.depth, recipe.removals) as stage:
        if not stage.done:
            with Progress("blocks left out", count_looks(len(job.model.blocks), recipe.removals)) as progress:
                order = removal_order(Removal(make_scorer(job), recipe.depth), recipe.removals, progress.advance)
            stage.finish(order=order)
        order = [(index, damage) for index, damage in stage.facts["order"]]
    return by_kind(job.model.arch, [index for index, _ in order]), order


def candidates(job: Job, problem: Problem, ranking: Ranking) -> dict[str, Solution]:
    """Choices within the targets that can keep nothing more, by name; of too many, those of least summed score.

    Raises `Infeasible` where there are none.
    """
    found = {member.name: solution for member, solution in _within(job, problem, ranking, problem.bounds(job.targets))}
    order = sorted(found, key=lambda name: found[name].score)[: job.recipe.minipuzzle.candidates]
    return {name: found[name] for name in order}


def _within(job: Job, problem: Problem, ranking: Ranking, bounds: list[Bound]) -> list[tuple[Uniform, Solution]]:
    """All uniform choices within bounds that can keep nothing more. Raises `Infeasible` where there are none."""
    space = Space(job.model.arch, job.sites, job.options, problem, ranking)
    found = [
        (member, describe(problem.sites, space.picks(member), bounds, problem.fixed))
        for member in space.maximal(bounds, job.recipe.minipuzzle.least)
    ]
    if not found:
        loaded = f" and is loaded by {job.profile.name}" if job.profile else ""
        lower = "lower minipuzzle.least, " if job.recipe.minipuzzle.least else ""
        raise Infeasible(
            f"no uniform child meets these targets{loaded}: {lower}give a wider ladder of options, or ask for less."
        )
    return found


def nearest(job: Job, problem: Problem, chosen: Solution) -> Callable[[list[Bound]], Solution]:
    """Within other budgets, the uniform choice nearest to `chosen`: of the same options if there is one, and of those
    the one that differs by fewest blocks."""
    ranking, _ = rank(job)

    @functools.cache
    def wanted() -> Uniform:
        among = _within(job, problem, ranking, problem.bounds(job.targets))
        return next(member for member, solution in among if solution.names == chosen.names)

    def far(row: tuple[Uniform, Solution]) -> tuple:
        member, solution = row
        steps = sum(abs(member.kept[kind] - count) for kind, count in wanted().kept.items())
        return member.options != wanted().options, steps, solution.score

    return lambda bounds: min(_within(job, problem, ranking, bounds), key=far)[1]


def judge(job: Job, found: dict[str, Solution]) -> dict[str, dict[str, float]]:
    """Next-token accuracy and agreement with the parent of every candidate, as mended."""
    with job.stage("grid", print_of(job, "depth"), *_made_from(job, found)) as stage:
        return _each(job, stage, "candidates", found, Scorer.greedy)


def shortlist(judged: Mapping[str, Mapping[str, float]], count: int) -> list[str]:
    """The best by the sum of their two places; of equals, the one that agrees more."""
    place = {name: 0 for name in judged}
    for figure in ("accuracy", "agreement"):
        for n, name in enumerate(sorted(judged, key=lambda name: -judged[name][figure])):
            place[name] += n
    return sorted(judged, key=lambda name: (place[name], -judged[name]["agreement"]))[:count]


def strength(figures: Mapping[str, Any]) -> tuple[float, float]:
    """What ranks candidates: so few task questions often tie, and the agreement with the parent tells equals apart."""
    return figures["average"], figures["agreement"]


def benchmark_all(job: Job, found: dict[str, Solution]) -> dict[str, dict[str, Any]]:
    """Of the shortlist before any distillation."""
    with job.stage("shortlist", *_made_from(job, found), job.recipe.evaluate, job.recipe.minipuzzle.tasks) as stage:
        return _each(job, stage, "benchmark", found, functools.partial(benchmark, job))


def _made_from(job: Job, found: Mapping[str, Solution]) -> tuple:
    """What the figures of candidates depend on."""
    judged = job.judged_by, job.recipe.score.stride
    return job.library_print(), {n: s.names for n, s in found.items()}, job.recipe.mend.light, job.recipe.data, judged


def _each(
    job: Job, stage: Stage, what: str, found: Mapping[str, Solution],
    figures: Callable[[Scorer, Decoder], dict[str, Any]],
) -> dict[str, dict[str, Any]]:
    """The figures of every candidate as mended, kept in the stage as `what`: those that are there are not measured
    again."""
    if not stage.done:
        file, ground = stage.folder / f"{what}.jsonl", ground_of(job)
        known = {row["name"]: row["figures"] for row in read_jsonl(file)}
        names = [name for name in found if name not in known]
        choices = [choice_of(found[name].names, job.sites, job.options) for name in names]
        for child, name in zip(ground.children(choices), names):
            known[name] = figures(ground.judge, child)
            append_jsonl(file, {"name": name, "figures": known[name]})
        stage.finish(**{what: known})
    return stage.facts[what]


def benchmark(job: Job, scorer: Scorer, model: Decoder) -> dict[str, Any]:
    """Tasks by name, next-token accuracy and agreement; `average` is what ranks: of the tasks, where there are any."""
    figures: dict[str, Any] = scorer.greedy(model)
    recipe = job.recipe.evaluate
    if job.recipe.minipuzzle.tasks and recipe.tasks:
        folder = fetch("tasks", log=lambda line: None)
        for task in recipe.tasks:
            figures[task] = run_task(model, job.tokenizer, task, load_task(task, folder, recipe.limit))["value"]
        return figures | {"average": statistics.fmean(figures[task] for task in recipe.tasks)}
    return figures | {"average": figures["agreement"]}
