"""Coupled re-training of the options that the search keeps (Puzzle, arXiv 2411.19146, section 3, the two-stage recipe).

Decoupled, an option learns as if the other slot of its layer stayed the parent's. So the candidates of a first search
say which options matter; every pair [attention, FFN] of these is trained together, teacher-forced on the stream before
the layer towards the layer's whole update, scored as it is, and searched again. Options that no candidate wants are
then not offered. Controls stay with the decoupled library.
"""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from safetensors.torch import load_file, save_file

from intarsia.base.files import append_jsonl, atomic_path, read_json, write_json
from intarsia.base.progress import Progress
from intarsia.compress import search, text
from intarsia.compress.library import Library, Options
from intarsia.compress.options import NONE, PARENT, OptionSpec, Pair, Site, slot_names
from intarsia.compress.problem import ABSENT, choice_of, name_of
from intarsia.compress.recipe import Library as Recipe
from intarsia.compress.score import Scored, compose, score_pair, scored
from intarsia.compress.solve import Solution
from intarsia.compress.stages import heldout, make_scorer, make_takeover, print_of
from intarsia.compress.targets import Problem, check_feasible
from intarsia.model import Decoder, ResidualBlock
from intarsia.model.packed import Importance
from intarsia.ops.losses import normalised_mse
from intarsia.train.optimizer import MasterAdamW, cosine

if TYPE_CHECKING:
    from intarsia.compress.pipeline import Job

SLOTS = ("attention", "ffn")


@dataclass
class Coupled:
    """Trained pairs in a folder, over the library that they began from: where a pair did not learn, its blocks."""

    folder: Path
    library: Library
    print: str  # what it was made from
    rows: Sequence[Scored] = ()  # scores of the pairs

    @property
    def parent(self) -> Decoder:
        return self.library.parent

    def importance(self, index: int, spec: OptionSpec) -> Importance | None:
        return self.library.importance(index, spec)

    def pair(self, site: Site, specs: Pair) -> list[ResidualBlock]:
        """The blocks that stand at a layer, in order."""
        return [block for block in self.slots(site, specs) if block is not None]

    def slots(self, site: Site, specs: Pair) -> list[ResidualBlock | None]:
        """The block in each slot of a layer, those of an option trained beside the other; None for nothing."""
        file, name = _file(self.folder, site), name_of(specs)
        blocks = self.library.slots(site, specs)
        stored = load_file(file) if file.exists() and any(_learns(spec) for spec in specs) else {}
        for slot, block, spec in zip(SLOTS, blocks, specs):
            start = f"{name}/{slot}."
            own = {n.removeprefix(start): t for n, t in stored.items() if n.startswith(start)}
            if own and _learns(spec):
                block.mixer.load_state_dict(own)
        return blocks


def _file(folder: Path, site: Site) -> Path:
    return folder / f"site_{site.layer:03}.safetensors"


def _learns(spec: OptionSpec | None) -> bool:
    return spec is not None and spec.method not in (PARENT, NONE)


def couple(job: Job, problem: Problem) -> Problem:
    """Train and score the pairs of the survivors; the problem of the second search. Sets `job.coupled`."""
    recipe, ranks, settings = job.recipe.library, job.ranks, search.made_from(job)
    parts = (*settings, recipe.coupled, recipe.survivors, recipe.batch_tokens, recipe.lr, recipe.tokens)
    with job.together("coupled", job.library_print(), print_of(job, "score"), *parts, *job.recipe.score.seen) as stage:
        if not stage.done:
            file = stage.folder / "survivors.json"
            with ranks.first_alone():
                if not file.exists():
                    found = search.candidates(problem, problem.bounds(job.targets), *search.settings(job))
                    write_json(file, survivors(job.sites, job.options, list(found.values()), recipe.survivors))
            kept, mine = _kept(job, file), job.sites[ranks.rank :: ranks.world]
            _train(job, kept, stage.folder, mine, stage.part("losses", ranks.rank), job.known(stage, "losses"))
            known = job.known(stage, "scores")
            coupled = Coupled(stage.folder, job.library, stage.fingerprint)
            _score(job, kept, coupled, mine, stage.part("scores", ranks.rank), known)
            ranks.wait()
            if ranks.first:
                stage.finish(pairs=len(scored(stage.rows("scores"), job.sites)))
        ranks.wait()
        rows = scored(stage.rows("scores"), job.sites)
    job.coupled = Coupled(stage.folder, job.library, stage.fingerprint, rows)
    scores = compose(rows, job.recipe.score.metric)
    problem = job.problem(scores, _kept(job, stage.folder / "survivors.json"))
    check_feasible(problem, job.targets)
    return problem


def survivors(sites: Sequence[Site], options: Options, found: Sequence[Solution], most: int) -> dict[str, list[str]]:
    """Names of at most `most` options of every block, in the library's order: the parent's own, the one of the first
    solution (the optimum of the scores as they are, so that the targets stay within reach), then those that most
    solutions chose."""
    choices = [choice_of(solution.names, sites, options) for solution in found]
    kept = {}
    for n, site in enumerate(sites):
        for slot, index in enumerate((site.attention, site.ffn)):
            if index is None:
                continue
            chosen = [choice[n][slot].name for choice in choices]
            often = [name for name, _ in Counter(chosen).most_common()]
            wanted = list(dict.fromkeys([PARENT, chosen[0], *often]))[:most]
            kept[str(index)] = [s.name for s in options[index] if s.name in wanted]
    return kept


def _kept(job: Job, file: Path) -> Options:
    """The options that survived."""
    names = read_json(file)
    return {index: [s for s in specs if s.name in names[str(index)]] for index, specs in job.options.items()}


def pairs(site: Site, kept: Options) -> list[Pair]:
    """Every pair of a layer's survivors but the parent's own; None stands for a slot that the parent does not have."""
    both = [kept.get(index, ABSENT) for index in (site.attention, site.ffn)]
    found = [tuple(None if i is None else s for i, s in zip((site.attention, site.ffn), specs))
             for specs in itertools.product(*both)]  # fmt: skip
    return [specs for specs in found if any(spec is not None and spec.method != PARENT for spec in specs)]


# ------------------------------------------------------------------------------------------------------------ training


@dataclass
class Lesson:
    """What the pairs of a layer learn from: streams before the layer, each (B, L, D), the parent's updates of them, and
    the last of either held out."""

    model: Decoder
    streams: list[torch.Tensor]
    updates: list[torch.Tensor]

    def update(self, blocks: Sequence[ResidualBlock | None], x: torch.Tensor) -> torch.Tensor:
        """What blocks one after the other add to a stream; not the difference of streams, which bfloat16 rounds."""
        rope, total = self.model.rope_tables(0, x.shape[1]), torch.zeros_like(x)
        for block in blocks:
            if block is not None:
                total = total + block.update(x + total, rope.get(getattr(block.spec, "head_dim", 0)))
        return total

    def loss(self, blocks: Sequence[ResidualBlock | None], step: int) -> torch.Tensor:
        """Normalised MSE of the layer's update at a step; -1: on the held-out text."""
        return normalised_mse(self.update(blocks, self.streams[step]), self.updates[step])


def _train(job: Job, kept: Options, folder: Path, mine: Sequence[Site], losses: Path, known: Sequence[dict]) -> None:
    """Train the pairs of the sites in `mine`, each site a file; one that has a row of losses is not trained again.

    The streams of the whole text go up the parent together, one layer a time, so that one pass serves all sites.
    """
    recipe, model, done = job.recipe.library, job.model, {row["layer"] for row in known}
    first, steps = recipe.tokens // recipe.batch_tokens, recipe.coupled // recipe.batch_tokens
    ids = [job.batch(first + step, recipe.batch_tokens, text.TRAINING) for step in range(steps)]
    ids.append(heldout(job))
    with torch.no_grad():
        streams = [model.embed_tokens(batch) for batch in ids]
    with Progress("coupled pairs", len(mine), len(done & {site.layer for site in mine})) as progress:
        for site in job.sites:
            blocks = [None if i is None else model.blocks[i] for i in (site.attention, site.ffn)]
            lesson = Lesson(model, streams, [])
            with torch.no_grad():
                lesson.updates = [lesson.update(blocks, x) for x in streams]
            if site in mine and site.layer not in done:
                append_jsonl(losses, {"layer": site.layer} | _site(job, kept, folder, site, lesson))
                progress.advance()
            streams = [x + update for x, update in zip(streams, lesson.updates)]


def _site(job: Job, kept: Options, folder: Path, site: Site, lesson: Lesson) -> dict[str, list[float]]:
    """Train every pair of a layer and store those that became better on held-out text; losses before and after."""
    rows, tensors = {}, {}
    for specs in pairs(site, kept):
        if not any(_learns(spec) for spec in specs):
            continue
        # All blocks that learn are copies: only the parent's own are not.
        blocks, learn = job.library.slots(site, specs), [_learns(spec) for spec in specs]
        with torch.no_grad():
            before = float(lesson.loss(blocks, -1))
        train_pair(blocks, learn, lesson, job.recipe.library)
        with torch.no_grad():
            after = float(lesson.loss(blocks, -1))
        if after < before:  # NaN is no improvement
            tensors |= {f"{name_of(specs)}/{slot}.{name}": tensor.contiguous()
                        for slot, block, learns in zip(SLOTS, blocks, learn) if learns
                        for name, tensor in block.mixer.state_dict().items()}  # fmt: skip
        rows[name_of(specs)] = [before, min(after, before) if after == after else before]
    if tensors:
        with atomic_path(_file(folder, site)) as temporary:
            save_file(tensors, temporary)
    return {"losses": rows}


def train_pair(blocks: Sequence[ResidualBlock | None], learn: Sequence[bool], lesson: Lesson, recipe: Recipe) -> None:
    """Train the blocks of a pair that `learn`, in place, a step a stream; their norms and the parent's own stay."""
    named = [(f"{n}.{name}", p) for n, block in enumerate(blocks) if learn[n]
             for name, p in block.mixer.named_parameters()]  # fmt: skip
    for _, parameter in named:
        parameter.requires_grad_(True)
    optimizer, steps = MasterAdamW(named), len(lesson.streams) - 1
    for step in range(steps):
        lesson.loss(blocks, step).backward()
        optimizer.step(cosine(step, steps, recipe.lr))
    for _, parameter in named:
        parameter.requires_grad_(False)


def _score(job: Job, kept: Options, coupled: Coupled, mine: Sequence[Site], file: Path, known: Sequence[dict]) -> None:
    """Replace-one-site scores of every pair of the sites in `mine`; rows go to `file`, `known` are not measured."""
    scorer, done = make_scorer(job), {(r["layer"], r["attention"], r["ffn"]) for r in known}
    wanted = {site.layer: pairs(site, kept) for site in mine}
    x, takeover = scorer.model.embed_tokens(scorer.ids), make_takeover(job, scorer)
    with Progress("scores of coupled pairs", sum(map(len, wanted.values()))) as progress:
        for site in job.sites:
            if takeover:
                takeover.enter(site)
            for specs in wanted.get(site.layer, []):
                if (site.layer, *slot_names(specs)) not in done:
                    alone = None if any(map(_learns, specs)) else takeover  # what has learned beside nothing is it all
                    append_jsonl(file, score_pair(scorer, coupled, site, specs, x, site.reach[1], alone))
                progress.advance()
            with torch.no_grad():
                x = scorer.model.run(x, *site.reach, rope=scorer.rope)
