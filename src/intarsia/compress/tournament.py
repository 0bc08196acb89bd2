"""The last word of the search: finalists are distilled for a moment, and the best after that is the child.

Ranks before distillation are not ranks after it: a model without whole layers starts further from its parent than one
with every FFN a little narrower, and comes back faster. So a few candidates get a short distillation with a whole
schedule each: those that MiniPuzzle's benchmark puts first (Nemotron-H, 2504.03624, 3.1), or of Puzzle's solutions
those that differ most.
"""

from __future__ import annotations

import functools
import math
import shutil
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

from intarsia.base.files import append_jsonl, read_json
from intarsia.compress.assemble import as_run, assemble, precisions, unpacked_choice
from intarsia.compress.children import make_judge, make_teacher
from intarsia.compress.distill import boundaries, distill, settling
from intarsia.compress.mend import mended, with_matrices
from intarsia.compress.problem import choice_of
from intarsia.compress.search import VIEWS, ground_of
from intarsia.compress.sensitivity import of_child
from intarsia.compress.solve import Solution
from intarsia.model import Decoder

if TYPE_CHECKING:
    from intarsia.compress.pipeline import Job

Figures = Mapping[str, Any]  # of one model


def tournament(
    job: Job, entrants: Mapping[str, Solution], before: Callable[[str], Figures],
    figures: Callable[[Decoder], Figures], *made_from: Any,
) -> dict[str, dict[str, Figures]]:
    """The figures of every entrant `before` its short distillation, and `after` it what `figures` says.

    Empty where there is nothing to decide: a single entrant, or fewer tokens than one step. `made_from`: what the
    figures depend on beside the library and the distillation.
    """
    tokens = min(job.recipe.tournament.tokens, job.recipe.distill.tokens)
    short = job.recipe.distill.model_copy(update={"tokens": tokens, "evaluations": 0})
    if len(entrants) < 2 or tokens < short.batch_tokens:
        return {}
    names = {name: solution.names for name, solution in entrants.items()}
    made_from = (job.library_print(), names, short, job.recipe.mend, *made_from, *job.taught())
    with job.together("tournament", *made_from) as stage:
        if not stage.done:
            done = {row["name"] for row in job.known(stage, "finalists")}
            for n, (name, solution) in enumerate(entrants.items(), 1):
                if name in done or n % job.ranks.world != job.ranks.rank:
                    continue
                choice = choice_of(solution.names, job.sites, job.options)
                start = assemble(job.coupled or job.library, job.sites, unpacked_choice(choice))
                matrices = mended(job, start, choice, f"mending finalist {n} of {len(entrants)}", keep=True)
                start = with_matrices(start, matrices)
                ends = boundaries(job.sites, choice)
                folder = stage.folder / f"finalist_{n}"
                folder.mkdir(exist_ok=True)
                title = f"short distillation of finalist {n} of {len(entrants)}"
                kinds, teacher = precisions(choice), make_teacher(job, ends)
                settle = settling(kinds, start, short, functools.partial(of_child, job, start))
                student, _ = distill(start, teacher, ends, short, folder, lambda _: {}, title, settle=settle)
                after = figures(as_run(student, kinds, of_child(job, student, kinds)))
                row = {"name": name, "before": before(name), "after": after}
                append_jsonl(stage.part("finalists", job.ranks.rank), row)
            job.ranks.wait()
            if job.ranks.first:
                for folder in stage.folder.glob("finalist_*"):
                    shutil.rmtree(folder)
                stage.finish(tokens=tokens)
    played = {row["name"]: row for row in stage.rows("finalists")}
    return {name: {when: played[name][when] for when in ("before", "after")} for name in entrants}


def summarised(
    job: Job, entrants: Mapping[str, Solution], played: Mapping[str, Any], chosen: str, by: str
) -> dict[str, Any]:
    """The tournament for summary.json, in the order of the entrants; `by` is the figure that decided."""
    tokens = min(job.recipe.tournament.tokens, job.recipe.distill.tokens)
    rows = [{"name": name, **played[name], "kl_predicted": entrants[name].score} for name in entrants]
    return {"tokens": tokens, "by": by, "chosen": chosen, "finalists": rows}


def finalists(found: Mapping[str, Solution], count: int) -> list[str]:
    """The names of the best before training, of the optimum of the scores as they are, and of those that differ most
    from all picked before them, as long as there are such in the better half. `found`: the best first."""
    picked = list(dict.fromkeys([next(iter(found)), *(name for name in found if name == VIEWS[0].name)]))[:count]
    better = list(found)[: max(count, (len(found) + 1) // 2)]
    while len(picked) < min(count, len(found)):
        rest = [name for name in better if name not in picked] or [name for name in found if name not in picked]
        picked.append(max(rest, key=lambda name: min(_apart(found[name], found[p]) for p in picked)))
    return picked


def _apart(a: Solution, b: Solution) -> int:
    return sum(x != y for x, y in zip(a.choice, b.choice))


def decide(
    job: Job, found: Mapping[str, Solution], uniform: Mapping[str, Solution]
) -> tuple[str, dict[str, Any] | None]:
    """The name of the solution of least held-out KL after its short distillation, and the tournament for summary.json:
    None where none was held, and the first of `found` is it. `uniform` solutions play beside the finalists of those
    found, and take no place of theirs: both methods lose nothing by being asked together."""
    count = job.recipe.tournament.finalists
    entrants = {name: found[name] for name in finalists(found, count)}
    if len(entrants) < count:
        print(f"tournament: the search has {len(entrants)} different solutions, {count} were asked for")
    entrants |= uniform if count > 1 else {}
    judge = functools.cache(lambda: make_judge(job))  # not made where all has been judged
    known = read_json(job.run.path / "stages" / "search" / "solutions.json")["kl"]  # on every few positions

    def before(name: str) -> Figures:
        return {"kl": known[name] if name in known else ground_of(job).measure([entrants[name].names])[0]}

    played = tournament(job, entrants, before, lambda model: judge()(model), job.judged_by)
    if not played:
        return next(iter(found)), None
    after = {name: row["after"]["kl"] for name, row in played.items()}
    best = min(after, key=lambda name: after[name] if math.isfinite(after[name]) else math.inf)
    return best, summarised(job, entrants, played, best, "kl")
