"""Several rounds to the targets: the child of one is the parent of the next (Minitron, arXiv 2407.14679, iterative).

A round is an ordinary run in `rounds/<n>` of the run folder, the last one in the run folder itself. What it may choose,
how far it goes and how much text it learns from is decided here; the first parent teaches in every round, and all
figures are against it. Predicted losses alone are against the parent of the round, for which they were scored.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from intarsia.arch import Architecture, memory_bytes, parameters
from intarsia.base.errors import IntarsiaError
from intarsia.base.files import read_json
from intarsia.base.runfolder import RunFolder
from intarsia.compress.options import NONE
from intarsia.compress.recipe import Fusion, Options, Recipe
from intarsia.compress.targets import Problem, Target, check_feasible
from intarsia.compress.text import checkpoint_print
from intarsia.formats import open_checkpoint
from intarsia.train.ranks import Ranks

if TYPE_CHECKING:
    from intarsia.compress.pipeline import Job

SLOTS = ("attention", "ffn")
ABSENT = {"option": NONE, "block": None}


@dataclass(frozen=True)
class Round:
    """Where a run stands among several: `number` of `count`, `home` the folder of them all, `origin` the first parent,
    `asked` the recipe as it was given, `begun` the steps of distillation of the rounds before."""

    number: int
    count: int
    home: Path
    origin: Path
    asked: Recipe
    begun: int

    def folder(self, number: int) -> Path:
        """Of a round."""
        return self.home if number == self.count else self.home / "rounds" / str(number)

    def before(self, name: str) -> Any:
        """What a JSON file of the previous round holds."""
        return read_json(self.folder(self.number - 1) / name)


def all_rounds(home: RunFolder, parent: Path, recipe: Recipe, ranks: Ranks, controls: bool) -> None:
    """Every round after the other; `controls` are made beside the last child."""
    from intarsia.compress.pipeline import claim, one_round

    arch = open_checkpoint(parent).architecture
    with ranks.first_alone():
        claim(home, parent, checkpoint_print(parent))
    for number in range(1, recipe.rounds + 1):
        begun = _steps(recipe, number - 1)
        round = Round(number, recipe.rounds, home.path, parent, recipe, begun)
        source = parent if number == 1 else round.folder(number - 1) / "child"
        run, last = RunFolder(round.folder(number)), number == recipe.rounds
        print(f"round {number} of {recipe.rounds}")
        one_round(run, source, recipe_of(recipe, number, arch), ranks, controls and last, round)


def recipe_of(recipe: Recipe, number: int, arch: Architecture) -> Recipe:
    """The recipe of one round: its options, its share of the distillation, the attention that may stay in it.

    `arch` is the first parent's. FFNs are fused in the last round alone: a fused one could not be left out again.
    """
    steps = _steps(recipe, number) - _steps(recipe, number - 1)
    distill = recipe.distill.model_copy(update={"tokens": steps * recipe.distill.batch_tokens})
    target, share = recipe.target, recipe.target.keep_attention
    if share is not None:
        here = len(arch.attentions) / max(1, len(arch.blocks))
        target = target.model_copy(update={"keep_attention": _between(here, share, number, recipe.rounds)})
    update = {"distill": distill, "target": target, "options": _on_axis(recipe.options, axis_of(recipe, number))}
    if number < recipe.rounds:
        update["fusion"] = Fusion()
    return recipe.model_copy(update=update)


def axis_of(recipe: Recipe, number: int) -> str:
    """What may be chosen in a round: all, depth or width."""
    axes = recipe.round_axes or ("all",)
    return axes[(number - 1) % len(axes)]


def _on_axis(options: Options, axis: str) -> Options:
    if axis == "depth":
        narrow = ("ffn_widths", "kv_methods", "windows", "mamba_heads", "mamba_channels", "mamba_states", "experts",
                  "moe")  # fmt: skip
        return options.model_copy(update=dict.fromkeys(narrow, ()) | {"mamba": False})
    return options.model_copy(update={"linear": False, "absent": False, "spans": ()} if axis == "width" else {})


def _steps(recipe: Recipe, number: int) -> int:
    """Steps of distillation until the end of a round."""
    return recipe.distill.tokens // recipe.distill.batch_tokens * number // recipe.rounds


def _between(start: float, end: float, number: int, count: int) -> float:
    """So far from `start` to `end` in equal ratios; the last is `end` itself."""
    return end if number == count else start * (end / start) ** (number / count)


def goals(job: Job, problem: Problem, number: int | None = None) -> list[Target]:
    """The targets of the job's round (or of another `number`) in units of its problem: a speed-up is against the parent
    of the round. Without rounds, what the recipe says."""
    if job.round is None:
        return [problem.settled(target) for target in job.targets]
    number, found = number or job.round.number, []
    for target in job.targets:
        start = _original(job, problem, target.kind)
        relative = target.share or target.kind == "speedup"
        end = target.value * start if relative else target.value
        found.append(Target(target.kind, _between(start, end, number, job.round.count)))
    return found


def _original(job: Job, problem: Problem, kind: str) -> float:
    """What the first parent has of a kind of target: sizes by arithmetic, times as this round's table would say it, by
    how much slower than the parent of the round it was measured to be."""
    arch, size = open_checkpoint(job.origin_path).architecture, job.model.dtype.itemsize
    if kind == "params":
        return parameters(arch)
    if kind == "memory":
        return memory_bytes(arch, job.scenario.length, job.scenario.batch, size)
    here = problem.value(kind, problem.parent_costs())
    if kind in ("speedup", "throughput"):
        return here / lead(job)
    return here * lead(job, "prefill_seconds" if kind == "ttft" else None)


def lead(job: Job, phase: str | None = None) -> float:
    """How many times as fast as the first parent the job's own was measured, in all or in a phase."""
    if not job.later:
        return 1.0
    found = job.later.before("stages/speed/speed.json")["speed"]
    if phase is None:
        return found["child"]["speedup"]["median"]
    return found["parent"][phase]["median"] / found["child"][phase]["median"]


def check(job: Job, problem: Problem) -> None:
    """Raise `IntarsiaError` where the targets cannot be met, or are met already. A block that may be absent can be no
    cheaper in a later round, so what is out of reach at the end is refused in the first."""
    if job.round and not job.later and job.recipe.options.absent and not job.profile:
        check_feasible(problem, goals(job, problem, job.round.count))
    job.targets = goals(job, problem)
    try:
        check_feasible(problem, job.targets)
    except IntarsiaError as error:
        if not job.round:
            raise
        raise type(error)(f"in round {job.round.number} of {job.round.count}: {error}") from error


def told(job: Job, result: dict[str, Any]) -> dict[str, Any]:
    """What the rounds add to a summary, `result`: which one this is, how far it was to go, and the figures of all."""
    if job.round is None:
        return {}
    aims = {t.kind: t.value * (lead(job) if t.kind == "speedup" else 1) for t in job.targets}
    row = {"round": job.round.number, "of": job.round.count, "axis": axis_of(job.round.asked, job.round.number)}
    row |= {"target": aims, "tokens": job.recipe.distill.tokens}
    row |= {name: result[name] for name in ("parameters", "speedup_measured", "kl", "kl_se", "top1")}
    earlier = job.later.before("summary.json")["rounds"] if job.later else []
    return {"rounds": [*earlier, row]} | ({"target": aims} if job.round.number < job.round.count else {})


def runs(job: Job) -> list[RunFolder]:
    """The run folders of the rounds so far; without rounds, the one there is."""
    numbers = range(1, job.round.number + 1) if job.round else ()
    return [RunFolder(job.round.folder(n)) for n in numbers] or [job.run]


def places(job: Job) -> dict[int, tuple[int, str]]:
    """Layer and slot in the first parent of every block of the job's own, by its index."""
    if job.later:
        rows = job.later.before("summary.json")["child"]["sites"]
        found = [(row["layer"], slot) for row in rows for slot in SLOTS if row.get(slot, ABSENT)["block"]]
        return dict(enumerate(found))
    pairs = [(site.layer, slot, index) for site in job.sites for slot, index in zip(SLOTS, (site.attention, site.ffn))]
    return {index: (layer, slot) for layer, slot, index in pairs if index is not None}


def by_original(job: Job, rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Rows about the job's sites (`summary`) as rows about the layers of the first parent. Layers are folded anew where
    blocks have gone, so a row's two blocks may come from two layers."""
    if not job.later:
        return rows
    where, found = places(job), {}
    for row in job.later.before("summary.json")["child"]["sites"]:
        found[row["layer"]] = {"layer": row["layer"], "kl_attention": 0.0, "kl_ffn": 0.0}
        found[row["layer"]] |= {slot: ABSENT for slot in SLOTS if slot in row}
    for site, row in zip(job.sites, rows, strict=True):
        for slot, index in zip(SLOTS, (site.attention, site.ffn)):
            if index is not None:
                layer, there = where[index]
                found[layer] |= {there: row[slot], f"kl_{there}": row[f"kl_{slot}"]}
    for row in found.values():
        alone = [row["kl_attention"], row["kl_ffn"]]
        row |= {} if None in alone else {"kl": sum(alone), "kl_se": None}
    return list(found.values())
