"""The last word of the search: finalists are distilled for a moment, and the best after that is the child.

Ranks before distillation are not ranks after it: a model without whole layers starts further from its parent than one
with every FFN a little narrower, and comes back faster. So a few candidates that differ as much as possible get a short
distillation with a whole schedule each (the finalists of MiniPuzzle, Nemotron-H 3.1, made automatic).
"""

from __future__ import annotations

import math
import shutil
from typing import TYPE_CHECKING

from intarsia.base.files import append_jsonl, read_jsonl
from intarsia.compress.assemble import assemble
from intarsia.compress.children import make_judge, make_teacher
from intarsia.compress.distill import boundaries, distill
from intarsia.compress.problem import choice_of
from intarsia.compress.search import VIEWS
from intarsia.compress.solve import Solution

if TYPE_CHECKING:
    from intarsia.compress.pipeline import Job


def finalists(found: dict[str, Solution], count: int) -> list[str]:
    """The names of the best before training, of the optimum of the scores as they are, and of those that differ most
    from all picked before them."""
    first = [next(iter(found)), VIEWS[0].name]
    picked = [name for name in dict.fromkeys(first) if name in found][:count]
    while len(picked) < min(count, len(found)):
        rest = [name for name in found if name not in picked]
        picked.append(max(rest, key=lambda name: min(_apart(found[name], found[p]) for p in picked)))
    return picked


def _apart(a: Solution, b: Solution) -> int:
    return sum(x != y for x, y in zip(a.choice, b.choice))


def trial(job: Job, found: dict[str, Solution]) -> str:
    """The name of the solution that wins a short distillation."""
    recipe = job.recipe.search
    tokens = min(recipe.trial_tokens, job.recipe.distill.tokens)
    short = job.recipe.distill.model_copy(update={"tokens": tokens, "evaluations": 0})
    picked = finalists(found, recipe.finalists)
    if len(picked) < 2 or short.tokens < short.batch_tokens:
        return next(iter(found))
    names = [found[name].names for name in picked]
    with job.stage("trial", job.library_print(), names, short, job.recipe.evaluate.tokens) as stage:
        if not stage.done:
            file, judge = stage.folder / "trial.jsonl", make_judge(job)
            done = {row["finalist"] for row in read_jsonl(file)}
            for n, name in enumerate(picked, 1):
                if name in done:
                    continue
                choice = choice_of(found[name].names, job.sites, job.options)
                start, ends = assemble(job.library, job.sites, choice), boundaries(job.sites, choice)
                folder = stage.folder / f"finalist_{n}"
                folder.mkdir(exist_ok=True)
                title = f"trial of finalist {n} of {len(picked)}"
                student, _ = distill(start, make_teacher(job, ends), ends, short, folder, lambda _: {}, title)
                append_jsonl(file, {"finalist": name, **judge(student)})
            stage.finish(trials=read_jsonl(file))
        for folder in stage.folder.glob("finalist_*"):
            shutil.rmtree(folder)
        after = {row["finalist"]: row["kl"] for row in stage.facts["trials"]}
    return min(after, key=lambda name: after[name] if math.isfinite(after[name]) else math.inf)
