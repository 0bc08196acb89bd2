"""The stages of a compression that make the child: data, cost, importance, library, scores, search.

Each reads and writes its own folder; `children` has the stages that come after.
"""

from __future__ import annotations

import dataclasses
import time
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from intarsia.base.files import atomic_path, read_json, write_json
from intarsia.base.progress import Progress
from intarsia.compress import gates, text
from intarsia.compress.children import evaluate, models, speed, teacher
from intarsia.compress.library import Builder, Library, Options, share_name, stored_losses, unpacked
from intarsia.compress.measure import CostTable, count_runs, measure_costs
from intarsia.compress.options import Site
from intarsia.compress.pipeline import Job
from intarsia.compress.score import Scored, Scorer, compose, count_measurements, score_library, scored
from intarsia.compress.spans import Place, make_spans, places
from intarsia.compress.statistics import Statistics, collect
from intarsia.compress.takeover import Takeover, leaves_out
from intarsia.compress.targets import Problem, check_feasible
from intarsia.data import fetch

__all__ = ["cost", "data", "evaluate", "importance", "library", "models", "score", "spans", "speed", "teacher"]

STATE_SECONDS = 60.0  # between two savings of the library's training


def data(job: Job) -> None:
    """Read and encode the text."""
    recipe = job.recipe.data
    with job.stage("data", recipe.path, recipe.max_bytes, job.tokenizer.fingerprint) as stage:
        run = job.round.folder(1) if job.round else job.run.path  # all rounds read the text of the first
        folder = run / "stages" / "data" / "corpus"
        corpus = text.open_corpus(recipe.path, job.tokenizer, folder, recipe.max_bytes, recipe.length)
        text.check_length(corpus, recipe.length)
        if job.recipe.evaluate.tasks:
            fetch("tasks", log=lambda line: None)  # now, not after an hour of work
        if not stage.done:
            stage.finish(tokens=corpus.tokens("train"), heldout=corpus.tokens("heldout"))
    job.corpus = corpus


def cost(job: Job) -> None:
    """Time every kind of option on this machine."""
    recipe = job.recipe.cost
    parts = ("cost", str(job.scenario), *job.offered(), recipe, torch.get_num_threads())
    with job.stage("cost", *parts) as stage:
        if not stage.done:
            runs = count_runs(job.options, job.sites, recipe.repeats, recipe.calibration)
            with Progress("cost of every option", runs) as progress:
                table = measure_costs(
                    job.model, job.scenario, job.sites, job.options, recipe.repeats, recipe.calibration,
                    advance=progress.advance,
                )  # fmt: skip
            rows = dataclasses.asdict(table)
            del rows["parent_blocks"]
            write_json(stage.folder / "costs.json", rows)
            stage.finish(error=table.error)
        job.table = CostTable(**read_json(stage.folder / "costs.json"))
        job.table.parent_blocks = list(job.model.arch.blocks)


def importance(job: Job) -> None:
    """The calibration pass: second moments of every block."""
    with job.stage("importance", *_made_from(job)) as stage:
        if not stage.done:
            passes, batches = job.passes(job.recipe.importance.tokens, text.CALIBRATION)
            with Progress("calibration pass", passes) as progress:
                found = collect(job.model, batches, lambda tokens: progress.advance(), _marks(job))
            for index, statistics in found.items():
                with atomic_path(stage.folder / f"block_{index:03}.safetensors") as temporary:
                    save_file(statistics.tensors(), temporary)
            facts = {str(i): {"tokens": s.tokens, "power": s.power} for i, s in found.items()}
            stage.finish(blocks=facts)


def _made_from(job: Job) -> tuple:
    """What the moments depend on."""
    more = ["marks"] if _marks(job) else []
    return job.corpus.fingerprint, job.recipe.data, job.recipe.importance.tokens, *more


def _marks(job: Job) -> bool:
    """Whether FFNs are to be cut into experts by what their channels do."""
    return bool(job.recipe.options.moe)


def _statistics(job: Job) -> dict[int, Statistics]:
    """The moments, collected again where an earlier library has already used them up."""
    stage = job.run.stage("importance", job.fingerprint(*_made_from(job)))
    if not all((stage.folder / f"block_{int(i):03}.safetensors").exists() for i in stage.facts["blocks"]):
        stage.remove()
        importance(job)
    return {
        int(index): Statistics(**facts, **load_file(stage.folder / f"block_{int(index):03}.safetensors"))
        for index, facts in stage.facts["blocks"].items()
    }


def library(job: Job) -> None:
    """Train and fit every option of every site; under `torchrun` each rank takes some of the blocks, and those that a
    lost rank left undone are taken up by the next run."""
    recipe, calibration = job.recipe.library, job.recipe.importance
    moments = job.fingerprint(*_made_from(job))
    with job.together("library", moments, *job.offered(), calibration, recipe.decoupled) as stage:
        if not stage.done:
            options, finished = unpacked(job.options), stored_losses(stage.folder)
            left = [index for index in options if index not in finished]
            with job.ranks.first_alone():
                statistics = _statistics(job)
            mine = {index: options[index] for index in left[job.ranks.rank :: job.ranks.world]}
            if mine:
                _build(job, mine, statistics, stage.folder)
            job.ranks.wait()
            if job.ranks.first:
                stage.finish()
    if job.ranks.first:  # the moments and the optimiser's state are larger than the model and have done their work
        for file in [*job.run.path.glob("stages/importance/*.safetensors"), *stage.folder.glob("state.*.safetensors")]:
            file.unlink(missing_ok=True)
    job.library = Library.open(stage.folder, job.model)


def _build(job: Job, options: Options, statistics: dict[int, Statistics], folder: Path) -> None:
    """The options of some blocks, from surgery to their files."""
    recipe, calibration = job.recipe.library, job.recipe.importance
    with Progress("ranking and surgery", 1):
        mine = {index: statistics[index] for index in options if index in statistics}
        builder = Builder(job.model, options, mine, recipe, calibration.method, folder, calibration.states)
    if job.ranks.first:
        _check_rankings(job, builder, folder)
    _train_library(job, builder, folder)


def _check_rankings(job: Job, builder: Builder, folder: Path) -> None:
    """Hold the rankings against orders that know nothing; one that is no better is worth a sentence, not an end."""
    found = list(gates.check(make_scorer(job), builder.statistics, builder.orders, builder.states))
    write_json(folder / "gates.json", [dataclasses.asdict(gate) | {"passed": gate.passed} for gate in found])
    for gate in found:
        if not gate.passed:
            print(f"the ranking of {gate.axis} is not better than another order: KL {gate.ranking:.4f} by the ranking, "
                  f"{gate.original:.4f} in the original order, {gate.reversed:.4f} backwards")  # fmt: skip


def heldout(job: Job) -> torch.Tensor:
    """The text on which options are held against the parent's blocks, (B, L)."""
    return job.batch(0, job.recipe.library.eval_tokens, text.HELDOUT, "heldout", min(256, job.recipe.data.length))


def _train_library(job: Job, builder: Builder, folder: Path) -> None:
    recipe, share = job.recipe.library, share_name(builder.options)
    state, start = folder / f"state.{share}.safetensors", folder / f"before.{share}.json"
    held = heldout(job)
    if not start.exists():
        write_json(start, builder.losses(held))
    before = {int(i): rows for i, rows in read_json(start).items()}
    if state.exists():
        builder.optimizer.load(state)
    saved = time.monotonic()

    def save() -> None:
        nonlocal saved
        if time.monotonic() - saved > STATE_SECONDS or builder.optimizer.steps == builder.steps:
            builder.optimizer.save(state)
            saved = time.monotonic()

    size, done = recipe.batch_tokens, builder.optimizer.steps
    with Progress("block library", builder.steps * size, done * size) as progress:
        builder.train(lambda step: job.batch(step, size, text.TRAINING), save, progress.advance)
    passes, batches = job.passes(recipe.refit_tokens, text.FITTING)
    with Progress("fitting last matrices", passes * text.PASS_TOKENS) as progress:
        after = builder.fit(batches, held, progress.advance)
    builder.store(before, after)


def spans(job: Job) -> None:
    """Fit what may stand in place of several layers, where that is asked; shared by the ranks as the library is."""
    if not job.spanned():
        return

    def found(*sites: Site) -> list[Place]:
        return places(job.model, job.sites, sites)

    with job.together("spans", *job.spanned()) as stage:
        if not stage.done:
            known = stored_losses(stage.folder)
            left = [site for site in job.sites if not known.keys() >= {p.index for p in found(site)}]
            where = found(*left[job.ranks.rank :: job.ranks.world])
            passes, batches = job.passes(job.recipe.library.refit_tokens, text.FITTING)
            job.ranks.wait()
            if where:
                with Progress("fitting spans of layers", passes * text.PASS_TOKENS) as progress:
                    make_spans(job.model, where, batches, heldout(job), stage.folder, progress.advance)
            job.ranks.wait()
            if job.ranks.first:
                stage.finish()
    job.library.spans = stage.folder


def score(job: Job) -> tuple[Problem, list[Scored]]:
    """Replace-one-site scores, each rank some of the sites; the problem with them in it."""
    recipe, ranks = job.recipe.score, job.ranks
    more = [print_of(job, "spans")] if job.spanned() else []
    more += [job.recipe.mend.tokens] if _takes_over(job) else []
    with job.together("score", job.library_print(), *recipe.seen, *more) as stage:
        if not stage.done:
            known, scorer, mine = job.known(stage, "scores"), make_scorer(job), job.sites[ranks.rank :: ranks.world]
            with Progress("replace-one-site scores", count_measurements(mine, job.options)) as progress:
                score_library(
                    scorer, job.library, job.sites, job.options, stage.part("scores", ranks.rank), progress.advance,
                    mine, known, make_takeover(job, scorer),
                )  # fmt: skip
            ranks.wait()
            if ranks.first:
                stage.finish(measurements=len(scored(stage.rows("scores"), job.sites)))
    rows = scored(stage.rows("scores"), job.sites)
    problem = job.problem(compose(rows, recipe.metric))
    check_feasible(problem, job.targets)
    return problem, rows


def make_scorer(job: Job) -> Scorer:
    """The scorer of a run: always on the same held-out text."""
    recipe = job.recipe.score
    ids = job.batch(0, recipe.tokens, text.SCORING, "heldout", min(recipe.length, job.recipe.data.length))
    return Scorer(job.model, ids, recipe.stride)


def make_judging(job: Job) -> Scorer:
    """What tells candidates of a search apart, who differ by less than the few sequences of the scores can tell."""
    return Scorer(job.model, job.judged(), job.recipe.score.stride)


def make_takeover(job: Job, scorer: Scorer) -> Takeover | None:
    """What lets blocks take over what is left out behind them, on the text that mends a child; None where none is, or
    nothing may be left out."""
    if not _takes_over(job):
        return None
    return Takeover(job.model, scorer.ids, job.batch(0, job.recipe.mend.tokens, text.MENDING))


def _takes_over(job: Job) -> bool:
    return job.mends and any(leaves_out(specs) for specs in job.options.values())


def print_of(job: Job, name: str) -> str:
    """The fingerprint of a stage that is done."""
    return read_json(job.run.path / "stages" / name / "done.json")["fingerprint"]
