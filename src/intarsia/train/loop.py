"""The training loop. It reads downwards: prepare, then step after step, looking and saving on the way.

The state of a training is the optimiser's tensors, the guard's memory and one number: the step. What a step reads and
how fast it learns are pure functions of that number, so that a run that is killed goes on to the same bits.
"""

from __future__ import annotations

import io
import os
import time
from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch

from intarsia.base.files import read_json, write_json
from intarsia.base.progress import Progress
from intarsia.base.recipe import load_recipe
from intarsia.base.runfolder import RunFolder
from intarsia.data import tokens_of
from intarsia.formats import save
from intarsia.train.guard import worst
from intarsia.train.plan import training_flops
from intarsia.train.ranks import joined
from intarsia.train.recipe import Recipe
from intarsia.train.schedule import rate
from intarsia.train.speed import peak_flops
from intarsia.train.start import Job, prepare

SUMMARY = "summary.json"


def train(
    recipe: Recipe | str | os.PathLike, out: str | os.PathLike, overrides: Sequence[str] = ()
) -> dict[str, Any]:
    """Train as the recipe says in the run folder `out`; returns what `out/summary.json` holds.

    `recipe`: a `Recipe`, or its name or TOML file, with `overrides` such as "data.tokens=2M". Run again after any
    interruption, it continues; under `torchrun` the ranks share the work. The model is left in `out/model`. Raises
    `IntarsiaError` with a sentence for whatever is not possible.
    """
    if not isinstance(recipe, Recipe):
        recipe = load_recipe(Recipe, recipe, overrides)
    run = RunFolder(out)
    with joined(recipe.parallel.tensor) as ranks, run.lock() if ranks.first else nullcontext():
        job = prepare(recipe, run, ranks)
        try:
            if job.optimizer.steps == recipe.steps and (run.path / SUMMARY).exists():
                return read_json(run.path / SUMMARY)
            return _go_on(job)
        finally:
            job.reader.close()


def _go_on(job: Job) -> dict[str, Any]:
    """From the step that the optimiser is at to the last one."""
    recipe, optimizer, began = job.recipe, job.optimizer, time.monotonic()
    pace = Pace(job)
    marks = (recipe.evaluate.every, recipe.checkpoint.export, recipe.checkpoint.every)
    look_every, export_every, save_every = map(recipe.steps_of, marks)
    stream = None if job.ranks.first else io.StringIO()  # one line is enough for all
    with Progress("training", recipe.steps, done=optimizer.steps, stream=stream) as bar:
        while (step := optimizer.steps) < recipe.steps:
            row = take_step(job, step)
            bar.advance(note=pace.after(row))
            job.note(row)
            job.guard.check_going_on(step)
            done, last = step + 1, step + 1 == recipe.steps
            if look_every and done % look_every == 0 and not last:
                look(job, done)
            if export_every and done % export_every == 0 and not last:
                export(job, job.run.path / "exports" / f"step_{done:09d}")
            if last or (save_every and done % save_every == 0):
                # After the row, the look and the export: what is saved is never done again.
                job.checkpoints.save(
                    optimizer, job.layout, guard=job.guard.state, reads=job.material.samples.fingerprint
                )
    return _finish(job, time.monotonic() - began)


def take_step(job: Job, step: int) -> dict[str, Any]:
    """Forward, backward and update on the samples of a step; its row of metrics."""
    recipe, ranks, optimizer = job.recipe, job.ranks, job.optimizer
    reading = job.reader.step(step)
    batches = reading.tensors(ranks.device)
    valid = torch.zeros(recipe.batch, dtype=torch.float64, device=ranks.device)
    losses = torch.zeros_like(valid)
    for batch, rows in zip(batches, reading.rows):
        valid[rows] = job.trainee.counted(batch).double()
    count = float(ranks.sum(valid).sum())
    for batch, rows in zip(batches, reading.rows):
        total, each = job.trainee(batch, job.teacher)[:2]
        # Each token (or pair) of the step counts the same, whichever pass and rank it is in; FSDP averages over ranks.
        (total * (ranks.data[1] / max(1.0, count))).backward()
        optimizer.collect()
        losses[rows] = each.double().sum(1)
    job.layout.average(optimizer)
    loss = float(ranks.sum(losses).sum()) / max(1.0, count)
    norm = optimizer.norm()
    tokens = (step + 1) * recipe.step_tokens
    lr = rate(tokens, tokens_of(recipe.data.tokens), recipe.optimizer.lr, recipe.schedule)
    row = {"step": step, "tokens": tokens, "loss": loss, "lr": lr, "gradient_norm": norm}
    if why := job.guard.judge(loss, norm):
        optimizer.skip()
        samples = worst(job.material.samples, step * recipe.batch, (losses / valid.clamp(min=1)).cpu())
        return row | {"skipped": job.guard.skipped, "why": why, "samples": samples}
    optimizer.step(lr, recipe.optimizer.clip, norm)
    return row


class Pace:
    """Tokens a second and MFU of the last steps."""

    def __init__(self, job: Job):
        self.tokens, self.world = job.recipe.step_tokens, job.ranks.world
        self.flops = training_flops(job.arch, job.recipe.data.length)
        self.peak = peak_flops(job.ranks.device, job.dtype)
        self.last, self.smooth = time.perf_counter(), 0.0

    def after(self, row: dict[str, Any]) -> str:
        """Add the figures of a step that ends now to its row; the line for the progress."""
        now = time.perf_counter()
        seconds, self.last = now - self.last, now
        self.smooth = seconds if not self.smooth else 0.9 * self.smooth + 0.1 * seconds
        row["tokens_per_second"] = round(self.tokens / seconds, 1)
        row["mfu"] = round(self.flops * self.tokens / seconds / (self.peak * self.world), 4)
        speed, share = self.tokens / self.smooth, self.flops * self.tokens / self.smooth / (self.peak * self.world)
        skipped = f", {row['skipped']} steps left out" if "skipped" in row else ""
        return f"loss {row['loss']:.4f}, {speed:,.0f} tokens/s, MFU {100 * share:.0f} %{skipped}"


def look(job: Job, step: int) -> dict[str, Any]:
    """What held-out documents say of the model after `step` steps, as a row of metrics."""
    found = job.heldout.look(job.trainee, job.teacher, job.ranks)
    row = {"step": step, "tokens": step * job.recipe.step_tokens, job.heldout.NAME: found["all"]["value"]}
    job.note(row | {"heldout": found})
    return found


def export(job: Job, path: Path) -> None:
    """Write the model for use, in the dtype it computes in."""
    model = job.trainee.model
    if job.ranks.world > 1:
        model = job.layout.gathered(job.optimizer, job.arch, job.dtype)
    if job.ranks.first:
        save(model, path, job.material.tokenizer)
    job.ranks.wait()


def _finish(job: Job, seconds: float) -> dict[str, Any]:
    """The model, and what is to be said of the run."""
    found = look(job, job.optimizer.steps)
    export(job, job.run.path / "model")
    summary = {
        "model": job.recipe.model, "steps": job.optimizer.steps,
        "tokens": job.optimizer.steps * job.recipe.step_tokens, "loss": _last_loss(job),
        job.heldout.NAME: found, "skipped": job.guard.skipped, "seconds": round(seconds, 1),
    }  # fmt: skip
    if job.ranks.first:
        write_json(job.run.path / SUMMARY, summary)
    return summary


def _last_loss(job: Job) -> float | None:
    """Of the last step that was taken."""
    return job.guard.losses[-1] if job.guard.losses else None
