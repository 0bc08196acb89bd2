"""`compress`: from a checkpoint to a child, its controls and a report, in stages that each leave files behind.

Every stage is skipped when its files carry the fingerprint of what it would be made from, and continues from what it
has otherwise; nothing is passed between stages that is not also on disk.
"""

from __future__ import annotations

import contextlib
import dataclasses
import datetime
import os
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from intarsia.arch import Architecture
from intarsia.base.errors import IntarsiaError
from intarsia.base.files import fingerprint, read_json, write_json
from intarsia.base.recipe import load_recipe, save_resolved
from intarsia.base.runfolder import RunFolder, Stage
from intarsia.compress import text
from intarsia.compress.library import Library
from intarsia.compress.measure import CostTable, as_packed
from intarsia.compress.options import Site, options_for, sites_of
from intarsia.compress.placement import Placement
from intarsia.compress.problem import Options, check_placement, make_problem
from intarsia.compress.profiles import Profile, check_tokenizer, export, fitted
from intarsia.compress.recipe import Recipe
from intarsia.compress.sensitivity import of_library
from intarsia.compress.spans import with_spans
from intarsia.compress.targets import Problem, Target, parse_targets
from intarsia.engine.scenario import Scenario
from intarsia.formats import load, native_bfloat16, open_checkpoint
from intarsia.model import Decoder
from intarsia.train.ranks import Ranks, joined

if TYPE_CHECKING:
    from intarsia.compress.coupled import Coupled
    from intarsia.compress.rounds import Round

JUDGED = 4  # of as many tokens as evaluate a model, one in so many judges
ALONE = Ranks(0, 1, torch.device("cpu"))
PATIENCE = datetime.timedelta(days=30)  # with which ranks wait for a stage that one of them does


@dataclasses.dataclass
class Job:
    """All that the stages of one run share."""

    run: RunFolder
    recipe: Recipe
    parent_path: Path
    parent_print: str
    model: Decoder
    tokenizer: Any
    scenario: Scenario
    sites: list[Site]
    options: Options
    targets: list[Target]
    placement: Placement | None = None  # where attention may stay, if that was asked
    profile: Profile | None = None  # None: anything may be chosen
    corpus: Any = None
    table: CostTable | None = None
    library: Library | None = None
    coupled: Coupled | None = None  # where pairs were trained together, of which the child is made
    packed: Decoder | None = None
    others: dict[Path, Decoder] = dataclasses.field(default_factory=dict)  # models that are not the parent, by path
    ranks: Ranks = ALONE
    round: Round | None = None  # where this run is one of several on the way to a child

    def fingerprint(self, *parts: Any) -> str:
        """Of a stage that is made from the parent, its precision and `parts`."""
        return fingerprint(self.parent_print, str(self.model.dtype), *parts)

    def stage(self, name: str, *parts: Any) -> Stage:
        stage = self.run.stage(name, self.fingerprint(*parts))
        if stage.done:
            print(f"{name}: already done")
        return stage

    @contextlib.contextmanager
    def together(self, name: str, *parts: Any) -> Iterator[Stage]:
        """A stage that the ranks share: its folder is there for all of them, and behind it all that they made."""
        with self.ranks.first_alone():
            stage = self.stage(name, *parts)
        with stage if self.ranks.first else contextlib.nullcontext():
            yield stage
        self.ranks.wait()

    def known(self, stage: Stage, name: str) -> list[Any]:
        """The rows of a shared stage before any rank adds to them."""
        rows = stage.rows(name)
        self.ranks.wait()
        return rows

    def library_print(self) -> str:
        """The fingerprint of the finished library, with it of its sensitivities and its pairs once it has them."""
        folders = (self.run.path / "stages" / "library", self.library.sensitivity)
        prints = [read_json(folder / "done.json")["fingerprint"] for folder in folders if folder]
        prints += [self.coupled.print] if self.coupled else []
        return prints[0] if len(prints) == 1 else fingerprint(*prints)

    def offered(self) -> tuple:
        """What the options of single blocks depend on."""
        options = self.recipe.options.model_dump(mode="json", exclude={"spans", "span_methods"})
        return options, *([self.profile.name] if self.profile else [])

    def spanned(self) -> tuple:
        """What spans of layers depend on; empty where none are asked for."""
        options = self.recipe.options
        asked = any(site.spans for site in self.sites)
        return (self.library_print(), options.spans, options.span_methods) if asked else ()

    @property
    def mends(self) -> bool:
        """Whether there is text to fit the blocks of a child to each other."""
        return self._mends_on(self.recipe.mend.tokens)

    def mending(self, tokens: int) -> torch.Tensor | None:
        """(rows, length) int64 of text for that; None where so many tokens are too few."""
        return self.batch(0, tokens, text.MENDING) if self._mends_on(tokens) else None

    def _mends_on(self, tokens: int) -> bool:
        return tokens >= 2 * self.recipe.data.length  # one sequence in some tells how the fits of the others are mixed

    @property
    def later(self) -> Round | None:
        """The round, if there was one before: the parent is then a child, and not what figures are against."""
        return self.round if self.round and self.round.number > 1 else None

    @property
    def origin_path(self) -> Path:
        """Where `original` lies."""
        return self.later.origin if self.later else self.parent_path

    def original(self) -> Decoder:
        """What all figures are against: the parent, or in a later round that of the first."""
        return self._other(self.later.origin) if self.later else self.model

    def teacher(self) -> Decoder:
        """Whom children learn from: the original, or another checkpoint where that is asked."""
        path = self.recipe.distill.teacher_model
        return self._other(Path(path)) if path else self.original()

    def _other(self, path: Path) -> Decoder:
        if path not in self.others:
            self.others[path] = load(path, dtype=self.model.dtype)[0].requires_grad_(False)
        return self.others[path]

    def taught(self) -> list[Any]:
        """What another teacher, and a text that goes on where an earlier round ended, add to a fingerprint."""
        path = self.recipe.distill.teacher_model or (self.later and self.later.origin)
        begun = [self.later.begun] if self.later else []
        return ([text.checkpoint_print(Path(path))] if path else []) + begun

    def runner(self) -> Decoder:
        """The parent as it runs beside the children: packed where they are."""
        if not self.table.packed:
            return self.model
        if self.packed is None:
            self.packed = as_packed(self.model)
        return self.packed

    def problem(self, scores: dict | None = None, options: Options | None = None) -> Problem:
        size = self.model.embed.weight.element_size()
        given = (self.sites, options or self.options, self.table, self.scenario, size, scores, self.placement,
                 self.profile)  # fmt: skip
        return make_problem(self.model.arch, *given)

    def batch(self, step: int, tokens: int, salt: int, split: str = "train", length: int | None = None) -> torch.Tensor:
        """(B, L) int64: `tokens` tokens for a step; a pure function of its arguments and the recipe's seed."""
        length = length or self.recipe.data.length
        rows = max(1, tokens // length)
        return text.batch(self.corpus, step * rows, rows, length, split, self.recipe.data.seed + salt)

    def evaluated(self) -> torch.Tensor:
        """Held-out text (B, L) that tells how good finished models are. Nothing is chosen by it."""
        return self.batch(0, self.recipe.evaluate.tokens, text.EVALUATING, "heldout")

    def judged(self) -> torch.Tensor:
        """Held-out text (B, L) by which candidates, finalists and trainings are judged: the windows behind those of
        `evaluated`, a quarter as many or as many as scores are of. (Of text that has fewer than both want they come
        again.)"""
        length, first = self.recipe.data.length, len(self.evaluated())
        rows = max(1, self.recipe.evaluate.tokens // JUDGED // length, self.recipe.score.tokens // length)
        return text.batch(self.corpus, first, rows, length, "heldout", self.recipe.data.seed + text.EVALUATING)

    @property
    def judged_by(self) -> tuple[int, int]:
        """What the text of `judged` depends on beside the corpus: for the fingerprints of all that is chosen by it."""
        return self.recipe.evaluate.tokens, self.recipe.score.tokens

    def passes(self, tokens: int, salt: int) -> tuple[int, Iterator[torch.Tensor]]:
        """At least `tokens` training tokens in batches for one forward pass each: how many batches, and the batches."""
        count = -(-tokens // text.PASS_TOKENS)
        return count, (self.batch(n, text.PASS_TOKENS, salt) for n in range(count))


def compress(
    parent: str | os.PathLike, recipe: Recipe | str | None = None, out: str | os.PathLike = "runs/run",
    controls: bool = False, overrides: Sequence[str] = (),
) -> dict[str, Any]:
    """Make the parent cheaper as the recipe says; returns what `out/summary.json` holds.

    `parent`: a Hugging Face folder or a .gguf file. `recipe`: a `Recipe`, a preset's name or a TOML file, with
    `overrides` such as "distill.tokens=100000". `controls` also builds what simpler methods make at the same speed.
    Run again after any interruption, it continues. Under `torchrun` the ranks share library, scores and tournament;
    those after the first then return nothing. Raises `IntarsiaError` with a sentence for whatever is not possible.
    """
    from intarsia.compress import rounds

    if not isinstance(recipe, Recipe):
        recipe = load_recipe(Recipe, recipe or "quick", overrides)
    read_targets(recipe)
    with joined(patience=PATIENCE) as ranks, _heard(ranks):
        run = RunFolder(out)
        with run.lock() if ranks.first else contextlib.nullcontext():
            work = one_round if recipe.rounds == 1 else rounds.all_rounds
            work(run, Path(parent).expanduser(), recipe, ranks, controls)
        return read_json(run.path / "summary.json") if ranks.first else {}


def one_round(
    run: RunFolder, parent: Path, recipe: Recipe, ranks: Ranks, controls: bool, round: Round | None = None
) -> None:
    """From a parent to `summary.json`, stage after stage."""
    from intarsia.compress import coupled, rounds, stages, summary
    from intarsia.report import render

    with ranks.first_alone():
        job = prepare(run, parent, recipe, ranks, round)
    for stage in (stages.data, stages.cost):
        with ranks.first_alone():
            stage(job)
    problem = job.problem()
    rounds.check(job, problem)
    with ranks.first_alone():
        stages.importance(job)
    stages.library(job)
    of_library(job)
    stages.spans(job)
    simple, rows = stages.score(job)
    problem = coupled.couple(job, simple) if recipe.library.coupled else simple
    with ranks.first_alone():
        stages.teacher(job)
    solution, pace, found, extra, frontier = chosen(job, problem)
    if not ranks.first:  # what is left is not shared
        return
    models = stages.models(job, problem, solution, pace, simple if controls else None)
    exported = export(job, models["child"].folder, models["child"].fingerprint)
    extra |= {"export": exported} if exported else {}
    speeds = stages.speed(job, models)
    figures = stages.evaluate(job, models)
    result = summary.summarise(job, problem, rows, found, frontier, models, speeds, figures) | extra
    write_json(run.path / "summary.json", summary.finite(result | rounds.told(job, result)))
    render(run.path)


def chosen(job: Job, problem: Problem) -> tuple[Any, float, list, dict[str, Any], list[dict]]:
    """The solution to be built, its pace, all that were considered, what the summary tells of that, the frontier."""
    from intarsia.compress import minipuzzle, search, tournament

    if job.recipe.method == "minipuzzle":
        solution, found, extra = minipuzzle.minipuzzle(job, problem)
        if not job.ranks.first:
            return solution, 1.0, found, extra, []
        nearest = minipuzzle.nearest(job, problem, solution)
        return *search.at_speed(job, problem, solution, nearest), found, extra, search.frontier(problem)
    with job.ranks.first_alone():
        named, frontier = search.search(job, problem)
        uniform = minipuzzle.entrant(job, problem) if job.recipe.method == "both" else {}
    best, held = tournament.decide(job, named, uniform)
    found, extra = [*named.values(), *uniform.values()], {"tournament": held} if held else {}
    solution = (named | uniform)[best]
    if not job.ranks.first:
        return solution, 1.0, found, extra, frontier
    again = minipuzzle.nearest(job, problem, solution) if best in uniform else search.again(job, problem, best)
    return *search.at_speed(job, problem, solution, again), found, extra, frontier


@contextlib.contextmanager
def _heard(ranks: Ranks) -> Iterator[None]:
    """Only the first rank speaks."""
    if ranks.first:
        yield
        return
    with open(os.devnull, "w", encoding="utf-8") as silence:
        with contextlib.redirect_stdout(silence), contextlib.redirect_stderr(silence):
            yield


def prepare(
    run: RunFolder, parent: Path, recipe: Recipe, ranks: Ranks = ALONE, round: Round | None = None
) -> Job:
    """Load the parent and settle what the run is; refuses before anything expensive."""
    arch = open_checkpoint(parent).architecture
    recipe = recipe.model_copy(update={"options": fitted(recipe, arch)})
    dtype = dtype_of(recipe)
    for other in (recipe.distill.teacher_model, *recipe.controls.models):
        if other and open_checkpoint(other).architecture.vocab_size != arch.vocab_size:
            raise IntarsiaError(f"{other} has another vocabulary than the parent: take a model with its tokenizer.")
    scenario = Scenario.parse(recipe.scenario)
    began = time.monotonic()
    check_parent(arch, scenario, recipe)
    model, tokenizer = load(parent, dtype=dtype)
    if tokenizer is None:
        raise IntarsiaError(f"{parent} holds no tokenizer; text cannot be read without one: add its tokenizer.json.")
    model.requires_grad_(False)
    mark = text.checkpoint_print(parent)
    if round is None:
        claim(run, parent, mark)
    save_resolved(round.asked if round else recipe, run.path / "recipe.toml")
    run.write_environment(dtype=dtype, threads=torch.get_num_threads())
    stage = run.stage("load", fingerprint(mark, dtype))
    with stage:
        stage.finish(seconds=time.monotonic() - began)
    options = {i: options_for(b, recipe.options) for i, b in enumerate(model.arch.blocks)}
    sites, share = sites_of(model.arch), recipe.target.keep_attention
    profile = None
    if recipe.profile != "free":
        profile = Profile(recipe.profile, model.arch, options, sites)
        check_tokenizer(profile, tokenizer)
        options = profile.usable(options, sites)
    placement = None if share is None else Placement(share, sites)
    if placement:
        check_placement(placement, sites, options)
    if recipe.method != "minipuzzle":  # its children leave blocks out, one by one
        sites = with_spans(sites, options, recipe.options)
    targets = read_targets(recipe)
    return Job(run, recipe, parent, mark, model, tokenizer, scenario, sites, options, targets, placement, profile,
               ranks=ranks, round=round)  # fmt: skip


def claim(run: RunFolder, parent: Path, mark: str) -> None:
    """Say whose run folder this is; `mark`: the parent's fingerprint."""
    run.claim({"parent_path": str(parent)}, parent=mark)


def dtype_of(recipe: Recipe) -> str:
    """In which all models of the run compute here."""
    auto = "bfloat16" if native_bfloat16() or torch.cuda.is_available() else "float32"
    return auto if recipe.dtype == "auto" else recipe.dtype


def read_targets(recipe: Recipe) -> list[Target]:
    """The targets on the child's costs; none are needed where its attention is limited."""
    given = recipe.target.given()
    return [] if not given and recipe.target.keep_attention is not None else parse_targets(given)


def check_parent(arch: Architecture, scenario: Scenario, recipe: Recipe) -> None:
    """Raise `IntarsiaError` where a model has nothing to compress, or its context is too short for the recipe."""
    if not arch.attentions and not arch.feed_forwards:
        raise IntarsiaError("this model has neither attention nor FFN blocks: there is nothing to make cheaper.")
    scenario.check(arch)
    if recipe.data.length > arch.max_positions:
        raise IntarsiaError(
            f"data.length is {recipe.data.length}, but the model's context is {arch.max_positions}: choose less."
        )
