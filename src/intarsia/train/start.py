"""Everything that a training needs before its first step, in the order in which it can be refused."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from intarsia.arch import Architecture, catalog
from intarsia.base.errors import IntarsiaError
from intarsia.base.files import read_json, write_json
from intarsia.base.recipe import save_resolved
from intarsia.base.runfolder import RunFolder
from intarsia.data import tokens_of
from intarsia.formats import load, open_checkpoint
from intarsia.model import Decoder
from intarsia.ops.fp8 import describe
from intarsia.train.fp8 import convert, told
from intarsia.train.guard import Guard
from intarsia.train.heldout import Heldout, HeldoutPairs
from intarsia.train.material import Material, blends_so_far, gather
from intarsia.train.optimizer import MasterAdamW
from intarsia.train.parallel import Layout, drawn, shard_root
from intarsia.train.precision import compute_dtype
from intarsia.train.preference import PreferenceTrainee
from intarsia.train.ranks import Ranks
from intarsia.train.reading import Reader
from intarsia.train.recipe import Recipe
from intarsia.train.state import STATE, Checkpoints
from intarsia.train.trackers import Send, trackers
from intarsia.train.trainee import Answers, Trainee, recompute_blocks

# Parts of a recipe that may change while a run goes on: when something is written, how memory is used, and the blend,
# which is noted with the sample from which it holds.
FREE = ("about", "micro_tokens", "recompute", "compile", "trackers", "parallel", "guard", "evaluate", "checkpoint")
FREE_DATA = ("blend", "tokens", "verify", "max_epochs")


@dataclass
class Job:
    """A training under way."""

    recipe: Recipe
    run: RunFolder
    ranks: Ranks
    arch: Architecture
    dtype: torch.dtype
    material: Material
    reader: Reader
    trainee: Trainee | PreferenceTrainee
    teacher: Answers | None
    layout: Layout
    optimizer: MasterAdamW
    guard: Guard
    checkpoints: Checkpoints
    heldout: Heldout | HeldoutPairs
    senders: list[Send]

    def note(self, row: dict[str, Any]) -> None:
        """Write a row of metrics, on the first rank, and tell the trackers its figures."""
        if self.ranks.first:
            self.run.metrics(row)
            figures = {name: value for name, value in row.items() if isinstance(value, (int, float))}
            for send in self.senders:
                send(row["step"], figures)


def prepare(recipe: Recipe, run: RunFolder, ranks: Ranks) -> Job:
    """Settle what the run is, read what it reads, make the model and go back to where it was."""
    arch = architecture(recipe)
    senders = trackers(recipe.trackers, run.path, recipe.model_dump(mode="json")) if ranks.first else []
    dtype = compute_dtype(recipe.precision, ranks.device)
    if ranks.first:
        run.claim({"model": recipe.model}, recipe=identity(recipe))
        save_resolved(recipe, run.path / "recipe.toml")
        run.write_environment(dtype=str(dtype), threads=torch.get_num_threads(), ranks=ranks.world)
    checkpoints = Checkpoints(run.path / "checkpoints", recipe.checkpoint.keep, ranks)
    newest = ranks.agree(checkpoints.newest_whole() if ranks.first else None)
    done = 0 if newest is None else read_json(newest / STATE)["step"]
    with ranks.first_alone():
        changes = blends_so_far(recipe, run.path, done * recipe.batch)
        material = gather(recipe, arch, run.path / "data", changes, verify=recipe.data.verify and ranks.first)
    micro = max(1, tokens_of(recipe.micro_tokens) // recipe.data.length)
    reader = Reader(material.samples, recipe.batch, micro, ranks, arch.vocab_size)
    trainee, layout = make_model(recipe, arch, dtype, ranks, run)
    optimizer = MasterAdamW(
        layout.named.items(), recipe.optimizer.betas, recipe.optimizer.weight_decay, recipe.optimizer.eps
    )
    state = checkpoints.load(newest, optimizer, layout)
    if state and state["reads"] != material.samples.fingerprint:
        raise IntarsiaError(f"{material.corpus.path} is not the corpus that this run has read so far: its tokens "
                            "differ. Put it back, or begin a new run with --out.")
    teacher = None if recipe.teacher is None and not recipe.prefers else make_teacher(recipe, arch, dtype, ranks)
    heldout = HeldoutPairs(recipe, material) if recipe.prefers else Heldout(recipe, material)
    return Job(
        recipe, run, ranks, arch, dtype, material, reader, trainee, teacher, layout, optimizer,
        Guard(recipe.guard, state.get("guard")), checkpoints, heldout, senders,
    )  # fmt: skip


def architecture(recipe: Recipe) -> Architecture:
    """The shape of the recipe's model: of the catalog, or of a checkpoint."""
    path = Path(recipe.model).expanduser()
    return open_checkpoint(path).architecture if path.is_dir() else catalog.get(recipe.model)


def identity(recipe: Recipe) -> dict[str, Any]:
    """What of a recipe may not change while a run goes on."""
    values = recipe.model_dump(mode="json", exclude={*FREE, "data"})
    return {**values, "data": recipe.data.model_dump(mode="json", exclude=set(FREE_DATA))}


def make_model(
    recipe: Recipe, arch: Architecture, dtype: torch.dtype, ranks: Ranks, run: RunFolder
) -> tuple[Trainee | PreferenceTrainee, Layout]:
    """The model with its loss, drawn or read, in FP8 where that is asked, shared by the ranks."""
    model, layout = drawn(arch, dtype, recipe.seed, ranks, lambda whole: in_fp8(recipe, whole, ranks, run))
    prefers = recipe.loss.preference
    trainee = PreferenceTrainee(model, prefers) if recipe.prefers else Trainee(model, recipe.loss.z, recipe.loss.kl)
    if recipe.recompute:
        recompute_blocks(model)
    if recipe.compile:
        for block in model.blocks:
            block.compile()
    shard_root(trainee, dtype, ranks)
    layout.renamed(model)
    if recipe.init is not None:
        given = open_checkpoint(recipe.init)
        if given.architecture.blocks != arch.blocks or given.architecture.vocab_size != arch.vocab_size:
            raise IntarsiaError(f"{recipe.init} (init) is not of the shape of {recipe.model}: choose another model.")
        for name, tensor in given.tensors(torch.float32):
            layout.fill(name, tensor)
    return trainee.train(), layout


def in_fp8(recipe: Recipe, model: Decoder, ranks: Ranks, run: RunFolder) -> None:
    """Let a model compute in FP8 where the recipe says so, and say what became of its layers."""
    if recipe.precision.fp8:
        layers = convert(model, recipe.precision.fp8_keep, ranks.tensor, recipe.precision.fp8_gather)
        if ranks.first:
            write_json(run.path / "fp8.json", layers)
            print(f"{told(layers)}\n  {describe(ranks.device)}", file=sys.stderr)


def make_teacher(recipe: Recipe, arch: Architecture, dtype: torch.dtype, ranks: Ranks) -> Answers:
    """The teacher of a distillation, or the reference of preferences, sharded as the student is."""
    path = recipe.teacher or recipe.init
    given = open_checkpoint(path).architecture
    if given.vocab_size != arch.vocab_size:
        raise IntarsiaError(f"the teacher {path} has a vocabulary of {given.vocab_size:,} and {recipe.model} "
                            f"one of {arch.vocab_size:,}: they must share one.")
    if ranks.world == 1:
        return Answers(load(path, dtype=dtype)[0].to(ranks.device))
    model, layout = drawn(given, dtype, 0, ranks)
    answers = Answers(model)
    shard_root(answers, dtype, ranks)
    layout.renamed(model)
    for name, tensor in open_checkpoint(path).tensors(torch.float32):
        layout.fill(name, tensor)
    return answers
