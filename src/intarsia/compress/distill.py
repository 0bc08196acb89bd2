"""Distillation of a whole child: KL of the logits, and the cosine of the streams layer by layer (Puzzle 4.3).

bfloat16 (or whatever the model is in) for the work, float32 masters for what is learned. The state is the optimiser and
a step number; the text of a step is a pure function of the step. So a run that was killed goes on to the same bits.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file

from intarsia.base.files import append_jsonl, atomic_path, read_jsonl
from intarsia.base.progress import Progress
from intarsia.compress.assemble import Choice, independent
from intarsia.compress.options import Site
from intarsia.compress.recipe import Distill
from intarsia.model import Decoder
from intarsia.ops.losses import cosine_loss, kl_divergence
from intarsia.train.optimizer import MasterAdamW, cosine

Batches = Callable[[int], torch.Tensor]  # step -> token ids (B, L)
STATE = "state.safetensors"
MICRO_TOKENS = 2048  # of one forward and backward pass; larger batches accumulate


@dataclass(frozen=True)
class Boundary:
    """Where a layer ends: the block after it in the parent and in the child."""

    parent: int
    child: int


def boundaries(sites: list[Site], choice: Choice) -> list[Boundary]:
    """The end of every layer in both models, where their streams are compared."""
    found, count = [], 0
    for site, specs in zip(sites, choice, strict=True):
        present = [i for i in (site.attention, site.ffn) if i is not None]
        count += sum(spec is not None and spec.block is not None for spec in specs)
        found.append(Boundary(present[-1] + 1, count))
    return found


class Teacher:
    """The parent's hidden states for every step: computed anew, or read from a file that several students share."""

    def __init__(self, parent: Decoder, batches: Batches, ends: list[Boundary], file: Path | None = None):
        self.parent, self.batches, self.ends, self.file = parent, batches, ends, file

    @torch.no_grad()
    def streams(self, ids: torch.Tensor) -> tuple[list[torch.Tensor], torch.Tensor]:
        """The stream at the end of every layer, each (B, L, D), and the final hidden states."""
        x, found, start = self.parent.embed_tokens(ids), [], 0
        for end in self.ends:
            x = self.parent.run(x, start, end.parent)
            start = end.parent
            found.append(x)
        return found, self.parent.final_norm(self.parent.run(x, start))

    @torch.no_grad()
    def hidden(self, step: int) -> torch.Tensor:
        """Final hidden states (B, L, D) of the text of a step."""
        if self.file is None:
            return self.parent.hidden(self.batches(step))
        with safe_open(self.file, "pt") as stored:
            return stored.get_tensor(f"step_{step:06}")

    def store(self, file: Path, steps: int) -> None:
        """Compute the hidden states of all steps once, so that further students need no parent."""
        if not file.exists():
            with Progress("parent's answers", steps) as progress:
                rows = {}
                for step in range(steps):
                    rows[f"step_{step:06}"] = self.hidden(step)
                    progress.advance()
            with atomic_path(file) as temporary:
                save_file(rows, temporary)
        self.file = file


def distill(
    child: Decoder, teacher: Teacher, ends: list[Boundary], recipe: Distill, folder: Path,
    evaluate: Callable[[Decoder], dict], title: str = "distillation", log: Callable[[dict], None] = lambda row: None,
) -> tuple[Decoder, list[dict]]:
    """Train a copy of `child` on the teacher; returns it and its curve: rows of tokens, loss and `evaluate`'s figures.

    State is written to `folder` every `checkpoint_seconds`; an interrupted call continues from it. `log` is given every
    new row of the curve.
    """
    student = independent(child)
    named = trainable(student, recipe.train_embeddings)
    optimizer = MasterAdamW(named)
    state, file = folder / STATE, folder / "curve.jsonl"
    if state.exists():
        optimizer.load(state)
    steps = recipe.tokens // recipe.batch_tokens
    curve = {row["step"]: row for row in read_jsonl(file)}  # the state may be older, but comes to the same figures
    marks = {round(steps * k / max(1, recipe.evaluations)) for k in range(1, recipe.evaluations + 1)} | {0}

    def look(step: int, loss: float | None) -> None:
        if step in marks and step not in curve:
            curve[step] = {"step": step, "tokens": step * recipe.batch_tokens, "loss": loss} | evaluate(student)
            append_jsonl(file, curve[step])
            log(curve[step])

    look(0, None)
    saved = time.monotonic()
    with Progress(title, steps, done=optimizer.steps) as progress:
        for step in range(optimizer.steps, steps):
            loss = _backward(student, teacher, ends, recipe, step)
            norm = optimizer.step(cosine(step, steps, recipe.lr, recipe.warmup), recipe.clip)
            progress.advance(note=f"loss {loss:.4f}, gradient {norm:.2f}")
            look(step + 1, loss)  # before the state: a step that is saved is never looked at again
            if time.monotonic() - saved > recipe.checkpoint_seconds:
                optimizer.save(state)
                saved = time.monotonic()
    return student.eval().requires_grad_(False), [curve[step] for step in sorted(curve)]


def trainable(student: Decoder, embeddings: bool) -> list[tuple[str, torch.nn.Parameter]]:
    """Blocks and final norm, and the embedding and head where asked; everything else is frozen."""
    named = []
    for name, parameter in student.named_parameters():
        learns = embeddings or not name.startswith(("embed.", "head."))
        parameter.requires_grad_(learns)
        if learns:
            named.append((name, parameter))
    return named


def _backward(student: Decoder, teacher: Teacher, ends: list[Boundary], recipe: Distill, step: int) -> float:
    """Accumulate the gradients of one step; returns its loss."""
    ids = teacher.batches(step)
    rows = max(1, MICRO_TOKENS // ids.shape[1])
    whole = None if recipe.cosine_weight else teacher.hidden(step)
    total = 0.0
    for first in range(0, len(ids), rows):
        part = ids[first : first + rows]
        share = len(part) / len(ids)
        if whole is None:
            streams, target = teacher.streams(part)
            loss = _loss(student, part, streams, target, ends, teacher.parent, recipe.cosine_weight)
        else:
            target = whole[first : first + rows]
            loss = kl_divergence(target, student.hidden(part), teacher.parent.head_weight, student.head_weight)
        (loss * share).backward()
        total += loss.item() * share
    return total


def _loss(
    student: Decoder, ids: torch.Tensor, streams: list[torch.Tensor], target: torch.Tensor, ends: list[Boundary],
    parent: Decoder, weight: float,
) -> torch.Tensor:
    """KL + weight x sum over layers of (1 - cosine of the streams)."""
    x, start, apart = student.embed_tokens(ids), 0, []
    for end, wanted in zip(ends, streams):
        if end.child > start:
            x = student.run(x, start, end.child)
            start = end.child
        apart.append(cosine_loss(x, wanted))
    hidden = student.final_norm(student.run(x, start))
    return kl_divergence(target, hidden, parent.head_weight, student.head_weight) + weight * torch.stack(apart).sum()
