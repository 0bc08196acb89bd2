"""Distillation of a whole child: KL of the logits, and the cosine of the streams layer by layer (Puzzle 4.3).

bfloat16 (or whatever the model is in) for the work, float32 masters for what is learned. The state is the optimiser and
a step number; the text of a step is a pure function of the step. So a run that was killed goes on to the same bits.
"""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch

from intarsia.base.errors import IntarsiaError
from intarsia.base.files import append_jsonl, read_jsonl
from intarsia.base.progress import Progress
from intarsia.compress.answers import Answers
from intarsia.compress.assemble import Choice, independent
from intarsia.compress.options import Site, is_covered
from intarsia.compress.recipe import Distill
from intarsia.model import Decoder, ExpertsMixer, rounding
from intarsia.model.packed import Importance
from intarsia.ops.losses import cosine_loss, kl_divergence
from intarsia.ops.top_kl import TopLogits, top_kl, top_logits
from intarsia.train.forward_only import ForwardOnly
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
    """The end of every layer in both models, where their streams are compared; of a span only the end of its last."""
    found, count = [], 0
    for site, specs in zip(sites, choice, strict=True):
        if is_covered(specs):
            found.pop()  # the span goes on to here
        count += sum(spec is not None and spec.block is not None for spec in specs)
        found.append(Boundary(site.blocks[-1] + 1, count))
    return found


class Teacher:
    """Whom a student learns from: the parent, or its stored answers (`answers`).

    `top`: how many of the largest logits are stored of every token; 0: final hidden states, for the parent's head to
    read. With logits stored `parent` may be None. `rest`: what is done with the parent while a student learns.
    """

    def __init__(
        self, parent: Decoder | None, batches: Batches, ends: list[Boundary], answers: Answers | None = None,
        top: int = 0, rest: Callable[[], AbstractContextManager] = nullcontext,
    ):
        self.parent, self.batches, self.ends, self.answers = parent, batches, ends, answers
        self.top, self.rest = top, rest

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
    def answer(self, step: int) -> dict[str, torch.Tensor]:
        """What is stored of the text of a step, computed now: (B, L, ...)."""
        hidden = self.parent.hidden(self.batches(step))
        return vars(top_logits(hidden, self.parent.head_weight, self.top)) if self.top else {"hidden": hidden}

    def target(self, step: int) -> torch.Tensor | TopLogits:
        """What the student is to say to the text of a step: final hidden states (B, L, D) or logits."""
        known = self.answer(step) if self.answers is None else self.answers[step]
        return TopLogits(**known) if self.top else known["hidden"]

    def divergence(self, target: torch.Tensor | TopLogits, hidden: torch.Tensor, head: torch.Tensor) -> torch.Tensor:
        """KL of the student, given by its final hidden states and head, to the target: the mean over tokens."""
        if isinstance(target, TopLogits):
            return top_kl(target, hidden, head)
        return kl_divergence(target, hidden, self.parent.head_weight, head)

    def check(self, student: Decoder) -> None:
        """Raise `IntarsiaError` where the student does not speak of the teacher's tokens."""
        theirs = self.parent.arch.vocab_size if self.answers is None else self.answers.vocab_size
        if theirs != student.arch.vocab_size:
            raise IntarsiaError(
                f"the teacher has a vocabulary of {theirs:,} and the student one of {student.arch.vocab_size:,}: a "
                "distillation compares the same tokens, so take a teacher with the student's tokenizer."
            )


def distill(
    child: Decoder, teacher: Teacher, ends: list[Boundary], recipe: Distill, folder: Path,
    evaluate: Callable[[Decoder], dict], title: str = "distillation", log: Callable[[dict], None] = lambda row: None,
    settle: Callable[[Decoder], None] | None = None,
) -> tuple[Decoder, list[dict]]:
    """Train a copy of `child` on the teacher; returns it and its curve: rows of tokens, loss and `evaluate`'s figures.

    A training that did harm (the KL is looked at before and behind it) is undone, and that is said: too high a rate
    does so to a child that is near its teacher, for the first steps of Adam are as large as the rate.
    State is written to `folder` every `checkpoint_seconds`; an interrupted call continues from it. `log` is given every
    new row of the curve. `settle` changes the student's weights after every step, and the masters that learn keep
    theirs: gradients are taken where it has left the weights (`settling`). None: nothing is changed.
    """
    teacher.check(child)
    student = independent(child)
    forward = recipe.learning == "forward"
    optimizer = _optimizer(student, teacher, ends, recipe, apart=settle is not None)
    settle = settle or (lambda student: None)
    state, file = folder / STATE, folder / "curve.jsonl"
    if state.exists():
        optimizer.load(state)
    settle(student)
    steps, rate = recipe.tokens // recipe.batch_tokens, rate_of(child, teacher, ends, recipe)
    curve = {row["step"]: row for row in read_jsonl(file)}  # the state may be older, but comes to the same figures
    marks = {round(steps * k / max(1, recipe.evaluations)) for k in range(1, recipe.evaluations + 1)} | {0}

    def look(step: int, loss: float | None) -> None:
        if step in marks and step not in curve:
            curve[step] = {"step": step, "tokens": step * recipe.batch_tokens, "loss": loss} | evaluate(student)
            append_jsonl(file, curve[step])
            log(curve[step])

    look(0, None)
    saved = time.monotonic()
    with teacher.rest(), Progress(title, steps, done=optimizer.steps) as progress:
        for step in range(optimizer.steps, steps):
            lr = cosine(step, steps, rate, recipe.warmup)
            _densely(student, recipe.dense, step / steps)
            if forward:
                loss, norm = optimizer.step(partial(_value, student, teacher, ends, recipe, step), lr, recipe.clip)
            else:
                loss = _backward(student, teacher, ends, recipe, step)
                norm = optimizer.step(lr, recipe.clip)
            _densely(student, 0.0, 1.0)
            settle(student)
            progress.advance(note=f"loss {loss:.4f}, {'slope' if forward else 'gradient'} {norm:.2f}")
            look(step + 1, loss)  # before the state: a step that is saved is never looked at again
            if time.monotonic() - saved > recipe.checkpoint_seconds:
                optimizer.save(state)
                saved = time.monotonic()
    rows = [curve[step] for step in sorted(curve)]
    if _harmed(rows):
        before, behind = rows[0]["kl"], rows[-1]["kl"]
        print(f"{title} did harm, {before:.3f} became {behind:.3f} nats, and is undone: lower distill.lr.")
        student = independent(child)
        settle(student)
        rows[-1] = rows[-1] | {"undone": True}
    return student.eval().requires_grad_(False), rows


def _optimizer(
    student: Decoder, teacher: Teacher, ends: list[Boundary], recipe: Distill, apart: bool
) -> MasterAdamW | ForwardOnly:
    """What moves the weights that learn. `apart`: they are changed between steps."""
    if recipe.learning == "forward":
        return ForwardOnly(student.requires_grad_(False).blocks[recipe.frozen :])
    named = trainable(student, recipe.train_embeddings, recipe.frozen)
    return MasterAdamW(named, shares=shares_of(named, student, teacher, ends, recipe), apart=apart)


def _densely(student: Decoder, share: float, done: float) -> None:
    """How much experts that are not chosen count, with so much of the steps `done`: all at first, falling to none when
    `share` of the steps are done. (DS-MoE, arXiv 2404.05567, trains densely to the end and weighs experts by their
    scores; here they are pieces of an FFN that is exact while all count alike, and have to learn to do without.)"""
    unchosen = max(0.0, 1.0 - done / share) if share else 0.0
    for block in student.blocks:
        if isinstance(block.mixer, ExpertsMixer):
            block.mixer.unchosen = unchosen


def rate_of(child: Decoder, teacher: Teacher, ends: list[Boundary], recipe: Distill) -> float:
    """The learning rate of a child: in proportion to its first loss where that is below `recipe.near`."""
    if not recipe.near or recipe.tokens < recipe.batch_tokens:
        return recipe.lr
    first = _value(child, teacher, ends, recipe, 0)
    return recipe.lr * (min(1.0, first / recipe.near) if math.isfinite(first) else 1.0)


def shares_of(
    named: Sequence[tuple[str, torch.nn.Parameter]], student: Decoder, teacher: Teacher, ends: list[Boundary],
    recipe: Distill,
) -> dict[str, float]:
    """What each parameter has of the learning rate, where `recipe.even` asks: of a block whose matrices have greater
    gradients (root mean square, in the first step) than the median block's, so much less.

    Every step of Adam is as large as the rate in every weight, so that it throws the model furthest where the loss is
    steepest; a Mamba-2 block made of an attention can be sixty times as steep as an FFN.
    """
    if not recipe.even or recipe.tokens < recipe.batch_tokens:
        return {}
    _backward(student, teacher, ends, recipe, 0)
    gradients: dict[str, list[torch.Tensor]] = {}
    for name, parameter in named:
        if parameter.grad is not None and parameter.dim() >= 2:
            gradients.setdefault(_room(name), []).append(parameter.grad)
        parameter.grad = None
    steep = {room: _root_mean_square(those) for room, those in gradients.items()}
    steep = {room: value for room, value in steep.items() if value and math.isfinite(value)}
    middle = statistics.median(steep.values()) if steep else 0.0
    return {name: min(1.0, middle / steep[room]) for name, _ in named if (room := _room(name)) in steep}


def _root_mean_square(tensors: Sequence[torch.Tensor]) -> float:
    return math.sqrt(sum(float(t.float().square().sum()) for t in tensors) / sum(t.numel() for t in tensors))


def _room(name: str) -> str:
    """A parameter's block, or what else it is part of: `blocks.3.mixer.q.weight` -> `blocks.3`."""
    first, second, *_ = name.split(".")
    return f"{first}.{second}" if first == "blocks" else first


def _harmed(rows: list[dict]) -> bool:
    """Is a student further from its teacher than before? A KL that is no number is far."""
    before, behind = (row.get("kl") for row in (rows[0], rows[-1]))
    return before is not None and behind is not None and not behind <= before


def settling(
    kinds: Sequence[str], child: Decoder, recipe: Distill,
    importance: Callable[[Sequence[str]], Mapping[int, Importance]] = lambda kinds: {},
) -> Callable[[Decoder], None] | None:
    """Keeps the blocks of a child's copy as packing will round them; `kinds`: of every block, "" for none. None where
    there is nothing to round. `importance` costs backward passes, and is asked only of the kinds that are rounded."""
    coded = recipe.rounded and recipe.learning == "gradients"
    kinds = [kind if coded or kind == "sparse" else "" for kind in kinds]
    if not any(kinds):
        return None
    matters = importance(kinds)
    ways = {
        index: rounding(child.blocks[index], kind, matters.get(index)) for index, kind in enumerate(kinds) if kind
    }  # fmt: skip

    def settle(student: Decoder) -> None:
        for index, way in ways.items():
            way(student.blocks[index])

    return settle


def trainable(student: Decoder, embeddings: bool, frozen: int = 0) -> list[tuple[str, torch.nn.Parameter]]:
    """Blocks but the first `frozen`, and final norm, and the embedding and head where asked; all else is frozen."""
    named, still = [], tuple(f"blocks.{index}." for index in range(frozen))
    for name, parameter in student.named_parameters():
        learns = (embeddings or not name.startswith(("embed.", "head."))) and not name.startswith(still)
        parameter.requires_grad_(learns)
        if learns:
            named.append((name, parameter))
    return named


def _backward(student: Decoder, teacher: Teacher, ends: list[Boundary], recipe: Distill, step: int) -> float:
    """Accumulate the gradients of one step; returns its loss."""
    total = 0.0
    for loss in _losses(student, teacher, ends, recipe, step):
        loss.backward()
        total += loss.item()
    return total


@torch.no_grad()
def _value(student: Decoder, teacher: Teacher, ends: list[Boundary], recipe: Distill, step: int) -> float:
    """The loss of one step."""
    return sum(loss.item() for loss in _losses(student, teacher, ends, recipe, step))


def _losses(
    student: Decoder, teacher: Teacher, ends: list[Boundary], recipe: Distill, step: int
) -> Iterator[torch.Tensor]:
    """The loss of one step in parts that add up."""
    ids = teacher.batches(step)
    rows = max(1, MICRO_TOKENS // ids.shape[1])
    whole = None if recipe.cosine_weight else teacher.target(step)
    for first in range(0, len(ids), rows):
        part = ids[first : first + rows]
        share = len(part) / len(ids)
        if whole is None:
            streams, target = teacher.streams(part)
            loss = _loss(student, part, streams, target, ends, teacher.parent, recipe.cosine_weight)
        else:
            loss = teacher.divergence(whole[first : first + rows], student.hidden(part), student.head_weight)
        yield loss * share


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
