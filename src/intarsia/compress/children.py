"""The stages after the search: children are assembled, distilled, saved, timed and evaluated, controls beside them."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Collection
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from intarsia.arch import Architecture, FeedForward, block_parameters, block_to_dict
from intarsia.base.files import fingerprint, read_json, write_json
from intarsia.base.progress import Progress
from intarsia.base.runfolder import Stage
from intarsia.compress import memory, text
from intarsia.compress.answers import Answers, set_aside, store
from intarsia.compress.assemble import Choice, as_run, assemble, packed, precisions, unpacked_choice, with_blocks
from intarsia.compress.controls import control_choice, uniform_width, uniform_width_within
from intarsia.compress.distill import STATE, Boundary, Teacher, boundaries, distill, settling
from intarsia.compress.fusion import fuse, outside, places
from intarsia.compress.guests import ALIGNED_ON, guest_names, origins
from intarsia.compress.measure import BASE, PHASES
from intarsia.compress.mend import (
    Matrices,
    fit,
    forget,
    made_from,
    mended,
    store_matrices,
    stored_matrices,
    with_matrices,
)
from intarsia.compress.options import OptionSpec
from intarsia.compress.pacing import Aim, fusion, names, pace_for
from intarsia.compress.problem import choice_of, name_of
from intarsia.compress.sensitivity import of_child
from intarsia.compress.solve import Bound, Infeasible, Solution, total_costs
from intarsia.compress.targets import KINDS, Problem, on_whole_time, paced
from intarsia.data import fetch
from intarsia.engine.generate import generate
from intarsia.engine.scenario import compare_speed
from intarsia.evaluate import bits_per_byte, compare, hidden_states, load_task, run_task, shorten
from intarsia.formats import load, open_checkpoint, save
from intarsia.formats.reader import locate
from intarsia.model import Decoder, weight_bytes

if TYPE_CHECKING:
    from intarsia.compress.coupled import Coupled
    from intarsia.compress.library import Library
    from intarsia.compress.pipeline import Job

Judge = Callable[[Decoder], dict[str, float]]
SPEED_REPEATS = 6


@dataclass
class Child:
    """A finished child or control: where it lies and what it was made of."""

    name: str
    folder: Path
    description: str
    choice: Choice
    predicted: dict[str, float]  # total costs; `score` where every site was scored
    fingerprint: str
    curve: list[dict]
    mending: dict[str, float] = dataclasses.field(default_factory=dict)  # KL before it and behind it, tokens


def models(job: Job, problem: Problem, solution: Solution, pace: float, controls: Problem | None) -> dict[str, Child]:
    """The child and, if wanted, its controls: assembled, distilled, saved. `controls`: the problem that these solve, of
    the decoupled library; None: there are none.

    `pace` is that of the child's budgets on time. Controls have the child's measured speed, or, where no target is on
    the whole time, its budgets.
    """
    bounds = problem.bounds(job.targets)
    child = choice_of(solution.names, job.sites, job.options)
    judge = functools.cache(lambda: make_judge(job))  # not made where all has been learned
    make = functools.partial(_make, job, judge)
    made = {"child": make(problem, "child", job.run.path / "child", child, "chosen by the search")}
    timed = any(on_whole_time(b) for b in bounds)
    for kind in (*job.recipe.controls.kinds, *job.recipe.controls.among) if controls else ():

        def choose(pace: float, kind: str = kind) -> Choice:
            return _control(job, controls, kind, paced(bounds, pace))[0]

        try:
            at = pace_for(job, kind, choose, pace, Aim(1.0, child)) if timed else pace
            choice, words = _control(job, controls, kind, paced(bounds, at))
        except Infeasible as error:
            print(f"control {kind} is left out: {error}")
            continue
        made[kind] = make(controls, kind, job.run.path / "controls" / kind, choice, words)
    for path in job.recipe.controls.models if controls else ():
        made |= _guest(job, judge, path, made)
    return made


def _guest(job: Job, judge: Callable[[], Judge], path: str, known: Collection[str]) -> dict[str, Child]:
    """A control that was made elsewhere, by its name: mended where its blocks can be told, it learns what the others
    learn."""
    name, mark = next(n for n in guest_names(path) if n not in known), text.checkpoint_print(locate(path))
    opened = functools.cache(lambda: load(path, dtype=job.model.dtype)[0].requires_grad_(False))

    stands = functools.cache(lambda: origins(job.model, opened(), job.batch(0, ALIGNED_ON, text.MENDING)))

    def fitted(guest: Decoder, sinks: bool) -> Matrices:
        if stands() is None:
            print(f"{path} is not mended: it has more blocks than the parent, or a stream of another width.")
            return {}
        return fit(job, guest, [*stands()[1:], len(job.model.blocks)], f"mending {name}", sinks)

    mending = _mend(job, judge, name, (mark, job.recipe.mend, job.recipe.data), opened, fitted)

    def start() -> tuple[Decoder, list[Boundary]]:
        model = _begun(opened(), mending)
        return model, [Boundary(len(job.model.blocks), len(model.blocks))]  # its layers need not be the parent's

    folder = job.run.path / "controls" / name
    stage, curve = _learnt(job, judge, name, folder, start, [], mark, *_printed(mending))
    words = f"made elsewhere: {path}"
    return {name: Child(name, folder, words, [], {}, stage.fingerprint, curve, mending.facts if mending else {})}


def _control(job: Job, problem: Problem, kind: str, bounds: list[Bound]) -> tuple[Choice, str]:
    """What a simpler method chooses within `bounds`, and a description of it."""
    width = _width(job, problem, bounds) if kind == "uniform" else None
    seed = job.recipe.data.seed
    rest = (problem.fixed, width, seed, job.placement)
    return control_choice(kind, job.sites, job.options, problem.sites, bounds, *rest)


def _width(job: Job, problem: Problem, bounds: list[Bound]) -> int | None:
    """The uniform FFN width that meets the targets; None where one is on a part of the time, or the parent's own widths
    differ."""
    sites = [s for s in job.sites if s.ffn is not None and isinstance(job.options[s.ffn][0].block, FeedForward)]
    blocks = {job.options[s.ffn][0].block for s in sites}
    asked = [b for b in bounds if b.name in KINDS]
    timed = [b for b in asked if on_whole_time(b)]
    sized = [b for b in asked if not set(b.weights) & set(PHASES)]
    if len(blocks) != 1 or not asked or len(timed) + len(sized) < len(asked):
        return None
    block, multiple = next(iter(blocks)), max(1, job.recipe.options.multiple // 4)
    limits = [s.block.intermediate_size for s in job.options[sites[0].ffn] if s.method == "prefix"]
    limits = [max(limits)] if limits else []
    if timed:
        limits.append(uniform_width(sites, block, job.table, min(b.limit for b in timed), multiple))
    if sized:
        costs = problem.parent_costs()
        limits.append(uniform_width_within(block, len(sites), costs, _channel(job, block), sized, multiple))
    return min(limits)


def _channel(job: Job, block: FeedForward) -> dict[str, float]:
    """What one channel of an FFN costs beside time."""
    less = dataclasses.replace(block, intermediate_size=block.intermediate_size - 1)
    params = block_parameters(block, job.model.arch.hidden_size) - block_parameters(less, job.model.arch.hidden_size)
    return {"params": params, "weight_bytes": params * job.model.embed.weight.element_size()}


def _make(
    job: Job, judge: Callable[[], Judge], problem: Problem, name: str, folder: Path, choice: Choice, words: str
) -> Child:
    library = (name == "child" and job.coupled) or job.library
    assembled = functools.cache(lambda: _assemble(job, unpacked_choice(choice), library))
    mending = _mend(
        job, judge, name, made_from(job, choice), assembled,
        lambda child, sinks: mended(job, child, choice, f"mending {name}", sinks=sinks),
        lambda child: packed(library, job.sites, choice, child),
    )  # fmt: skip
    if name == "child":  # which may have been a finalist
        forget(job)

    def start() -> tuple[Decoder, list[Boundary]]:
        made = _begun(assembled(), mending)
        where = places(made.arch.blocks, job.recipe.fusion.most)
        return fuse(made, where), outside(boundaries(job.sites, choice), where)

    parts = (job.library_print(), names(choice), *_printed(mending))
    stage, curve = _learnt(job, judge, name, folder, start, precisions(choice), *parts, *fusion(job))
    told = mending.facts if mending else {}
    return Child(name, folder, words, choice, _predicted(job, problem, choice), stage.fingerprint, curve, told)


def _mend(
    job: Job, judge: Callable[[], Judge], name: str, parts: tuple, assembled: Callable[[], Decoder],
    fitted: Callable[[Decoder, bool], Matrices], run: Callable[[Decoder], Decoder] = lambda model: model,
) -> Stage | None:
    """The stage in which the blocks of a model are `fitted` to each other: where that does harm, for the sake of their
    `sinks`, and if it still does, not at all. None where there is no text for it. Its facts: the KL to the teacher
    before it and behind it, of the model as it will `run`."""
    if not job.mends:
        return None
    with job.stage(f"mend-{name}", *parts, job.judged_by, *job.taught()) as stage:
        if not stage.done:
            child = assembled()
            before = judge()(run(child))["kl"]
            for sinks in (False, True):
                matrices = fitted(child, sinks)
                behind = judge()(run(with_matrices(child, matrices)))["kl"] if matrices else before
                if behind <= before:
                    break
                instead = "undone" if sinks else "done again for its first tokens"
                print(f"mending {name} did harm, {before:.3f} became {behind:.3f} nats, and is {instead}.")
                matrices, behind = {}, before
            store_matrices(matrices, stage.folder)
            stage.finish(kl_before=before, kl=behind, tokens=job.recipe.mend.tokens)
    return stage


def _begun(model: Decoder, mending: Stage | None) -> Decoder:
    """A model before it learns."""
    return with_matrices(model, stored_matrices(mending.folder)) if mending else model


def _printed(mending: Stage | None) -> list[str]:
    return [mending.fingerprint] if mending else []


def _learnt(
    job: Job, judge: Callable[[], Judge], name: str, folder: Path, start: Callable[[], tuple[Decoder, list[Boundary]]],
    kinds: list[str], *parts: Any,
) -> tuple[Stage, list[dict]]:
    """The stage in which what `start` gives (a model, and the ends of its layers) learns and is saved; its curve.
    `kinds`: how its blocks will be packed; none: as all are that are not packed narrower."""
    recipe = job.recipe.distill
    with job.stage(f"distill-{name}", *parts, recipe, job.judged_by, *job.taught()) as stage:
        if not stage.done or not (folder / "config.json").exists():
            model, ends = start()
            looked, settle = judge(), settling(kinds, model, recipe, functools.partial(of_child, job, model))
            student, curve = distill(
                model, make_teacher(job, ends), ends, recipe, stage.folder,
                lambda m: looked(as_run(m, kinds, of_child(job, m, kinds))), f"distilling {name}",
                log=lambda row: job.run.metrics({"stage": f"distill-{name}"} | row), settle=settle,
            )  # fmt: skip
            kinds = kinds or [""] * len(student.blocks)
            held = [kind or BASE for kind in kinds] if job.table.packed else None
            matters = of_child(job, student, kinds)
            save(student, folder, job.tokenizer, source=job.parent_path, weights=held, importance=matters)
            stage.finish(curve=curve)
        (stage.folder / STATE).unlink(missing_ok=True)
        return stage, stage.facts["curve"]


def _assemble(job: Job, choice: Choice, library: Library | Coupled) -> Decoder:
    """The child before distillation; widths that the library does not hold are fitted first."""
    strange = {
        site.ffn: pair[1] for site, pair in zip(job.sites, choice)
        if pair[1] is not None and pair[1].method == "prefix" and pair[1] not in job.options[site.ffn]
    }  # fmt: skip
    if not strange:
        return assemble(library, job.sites, choice)
    _, batches = job.passes(job.recipe.library.refit_tokens, text.FITTING)
    with Progress("fitting the control's width", 1):
        made = job.library.widened(strange, batches)
    blocks = []
    for site, pair in zip(job.sites, choice):
        for index, spec in zip((site.attention, site.ffn), pair):
            block = made.get(index) if index in strange else (None if index is None else job.library.block(index, spec))
            if block is not None:
                blocks.append(block)
    return with_blocks(job.model, blocks)


def teacher(job: Job) -> None:
    """Have the parent answer once for all students, where they learn from stored answers."""
    recipe = job.recipe.distill
    if not recipe.stores:
        return
    top = min(recipe.teacher_top, job.model.arch.vocab_size) if recipe.teacher == "stored" else 0
    parts = (job.corpus.fingerprint, recipe.tokens, recipe.batch_tokens, job.recipe.data, top, *job.taught())
    with job.stage("teacher", *parts) as stage:
        if not stage.done:
            live = Teacher(job.teacher(), _distilled_text(job), [], top=top)
            store(stage.folder, recipe.tokens // recipe.batch_tokens, job.teacher().arch.vocab_size, live.answer)
            stage.finish(top=top)


def make_teacher(job: Job, ends) -> Teacher:
    """The parent as a teacher, or what it has answered."""
    recipe = job.recipe.distill
    if not recipe.stores or recipe.tokens < recipe.batch_tokens:
        return Teacher(job.teacher(), _distilled_text(job), ends)
    stage = job.run.path / "stages" / "teacher"
    top, rest = read_json(stage / "done.json")["top"], nullcontext
    if top:  # nothing of the parent is needed but what the judge reads, and that is its head
        rest = functools.partial(set_aside, job.model, job.parent_path)
    return Teacher(job.teacher(), _distilled_text(job), ends, Answers(stage), top, rest)


def _distilled_text(job: Job) -> Callable[[int], torch.Tensor]:
    begun = job.later.begun if job.later else 0
    return lambda step: job.batch(begun + step, job.recipe.distill.batch_tokens, text.DISTILLING)


def make_judge(job: Job) -> Judge:
    """KL to the teacher and agreement with it on a few held-out sequences, while the distillation goes on."""
    tokens, model = job.judged(), job.teacher()
    hidden = hidden_states(model, tokens)

    def judge(student: Decoder) -> dict[str, float]:
        found = compare(model, student, tokens, parent_hidden=hidden)
        return {"kl": found["kl"]["value"], "kl_se": found["kl"]["se"], "top1": found["top1"]["value"]}

    return judge


def _predicted(job: Job, problem: Problem, choice: Choice) -> dict[str, float]:
    """Total costs of a choice, and its score if all of it was scored."""
    names = [name_of(pair) for pair in choice]
    places = [[o.name for o in site] for site in problem.sites]
    if all(name in known for name, known in zip(names, places)):
        picked = [known.index(name) for name, known in zip(names, places)]
        costs = total_costs(problem.sites, picked, problem.fixed)
        return costs | {"score": sum(site[i].score for site, i in zip(problem.sites, picked))}
    return {}


def architecture(folder: Path) -> Architecture:
    """What lies in a child's folder."""
    return open_checkpoint(folder).architecture


def loaded(job: Job, child: Child) -> Decoder:
    """A saved child in the run's precision, packed if that was chosen."""
    return load(child.folder, dtype=job.model.dtype, weights="recorded")[0].requires_grad_(False)


def speed(job: Job, made: dict[str, Child]) -> dict[str, Any]:
    """All models timed in turns at the whole scenario, and the memory of parent and child in processes of their own."""
    with job.stage("speed", str(job.scenario), [c.fingerprint for c in made.values()], SPEED_REPEATS) as stage:
        if not stage.done:
            parent = job.original() if job.later else job.runner()
            models = {"parent": parent} | {name: loaded(job, child) for name, child in made.items()}
            with Progress("speed of whole models", (SPEED_REPEATS + 1) * len(models)) as progress:
                found = compare_speed(models, job.scenario, SPEED_REPEATS, advance=progress.advance)
            counted = {
                name: weight_bytes(m) + memory.cache_bytes(m, job.scenario)
                for name, m in models.items() if name in ("parent", "child")
            }  # fmt: skip
            places = {"parent": job.origin_path, "child": made["child"].folder}
            real = {name: memory.in_process(path, job.scenario, job.model.dtype) for name, path in places.items()}
            write_json(stage.folder / "speed.json", {"speed": found, "memory": counted, "process": real})
            stage.finish()
        return read_json(stage.folder / "speed.json")


def evaluate(job: Job, made: dict[str, Child]) -> dict[str, dict]:
    """KL, agreement, bits per byte, tasks and a sample of every model; each model is a file that is kept."""
    recipe = job.recipe.evaluate
    prints = {"parent": fingerprint(job.recipe.data)} | {name: child.fingerprint for name, child in made.items()}
    found = {}
    tokens, hidden = job.evaluated(), None
    if job.later:  # the original was looked at in the first round
        del prints["parent"]
        found["parent"] = read_json(job.later.folder(1) / "stages" / "evaluate-parent" / "figures.json")
    for name, mark in prints.items():
        with job.stage(f"evaluate-{name}", job.corpus.fingerprint, mark, recipe, job.recipe.controls) as stage:
            if not stage.done:
                model = job.model if name == "parent" else loaded(job, made[name])
                hidden = hidden_states(job.original(), tokens) if hidden is None else hidden
                with_tasks = name in ("parent", "child") or job.recipe.controls.tasks
                rows = _figures(job, name, model, tokens, hidden, with_tasks)
                write_json(stage.folder / "figures.json", rows)
                stage.finish()
            found[name] = read_json(stage.folder / "figures.json")
    return found


def _figures(job: Job, name: str, model: Decoder, tokens, hidden, with_tasks: bool) -> dict[str, Any]:
    recipe = job.recipe.evaluate
    rows: dict[str, Any] = {}
    if name != "parent":
        rows |= compare(job.original(), model, tokens, parent_hidden=hidden, title=f"{name}: distance from the parent")
    documents = {c: job.corpus.documents("heldout", c, recipe.documents) for c in job.corpus.categories}
    length = job.recipe.data.length
    short = {c: [shorten(d, length, job.tokenizer) for d in docs] for c, docs in documents.items() if docs}
    rows["bits_per_byte"] = bits_per_byte(model, short, separator=job.tokenizer.eos_id, title=f"{name}: bits per byte")
    rows["tasks"] = {}
    if with_tasks and recipe.tasks:
        folder = fetch("tasks", log=lambda line: None)
        for task in recipe.tasks:
            rows["tasks"][task] = run_task(model, job.tokenizer, task, load_task(task, folder, recipe.limit))
    if name in ("parent", "child"):
        ids = generate(model, job.tokenizer.encode(recipe.prompt), 40, stop_ids=())
        rows["sample"] = job.tokenizer.decode(list(ids), skip_special_tokens=True)
    return rows


def blocks_of(spec: OptionSpec | None) -> dict | None:
    """A block as JSON, None for nothing."""
    return None if spec is None or spec.block is None else block_to_dict(spec.block)
