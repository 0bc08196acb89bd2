"""How good a model is: bits per byte, distance from its parent, tasks; every figure with a standard error."""

from __future__ import annotations

import os
from collections.abc import Sequence

import torch

from intarsia.base.errors import IntarsiaError
from intarsia.data import Corpus, fetch
from intarsia.evaluate.compare import compare, hidden_states, mean
from intarsia.evaluate.tasks import TASKS, Answers, answers, load_task, run_task
from intarsia.evaluate.text import bits_per_byte, shorten
from intarsia.formats import load
from intarsia.model import Decoder

__all__ = [
    "TASKS", "Answers", "answers", "bits_per_byte", "compare", "evaluate", "heldout_tokens", "hidden_states",
    "load_task", "mean", "run_task", "shorten",
]  # fmt: skip

Model = Decoder | str | os.PathLike


def evaluate(
    model: Model,
    tokenizer=None,
    corpus: Corpus | str | os.PathLike | None = None,
    tasks: Sequence[str] = TASKS,
    limit: int | None = None,
    parent: Model | None = None,
    length: int = 1024,
    rows: int = 16,
    documents: int | None = 20,
    tasks_folder: str | os.PathLike | None = None,
    weights: str | None = None,
) -> dict:
    """Everything that can be said about a model, as JSON-able figures {value, se, n}.

    With a `corpus`: `bits_per_byte` by category and of `all`, on the first `length` tokens of up to `documents`
    held-out documents a category. With a corpus and a `parent`: `kl` (nats a token) and `top1` on `rows` held-out
    sequences of that length. For each of `tasks`, on its first `limit` items: its figure under `tasks`. With a
    parent, the parent's own figures stand under `parent`. Models are given as paths or as loaded; tasks need the
    tokenizer that comes with the path, or `tokenizer`. `weights` ("bf16", "int8", "int4", "int4+", "fp8") packs those
    of the model, given as a path, and not those of the parent: what that costs in quality.
    """
    unknown = [name for name in tasks if name not in TASKS]
    if unknown:
        raise IntarsiaError(f"the task {unknown[0]!r} is not known; known: {', '.join(TASKS)}.")
    if corpus is None and not tasks:
        raise IntarsiaError("there is nothing to measure: give a corpus (--data), tasks, or both.")
    model, tokenizer = _loaded(model, tokenizer, weights)
    parent, tokenizer = (None, tokenizer) if parent is None else _loaded(parent, tokenizer)
    corpus = Corpus(corpus) if isinstance(corpus, (str, os.PathLike)) else corpus
    found: dict = {}
    if corpus is not None and parent is not None:
        found.update(compare(parent, model, heldout_tokens(corpus, model, rows, length)))
    folder = None if not tasks else tasks_folder or fetch("tasks", log=lambda line: None)
    items = {name: load_task(name, folder, limit) for name in tasks}
    for name, each in {"model": model, "parent": parent}.items():
        if each is not None:
            figures = _alone(each, tokenizer, corpus, items, length, documents)
            found.update(figures if name == "model" else {"parent": figures})
    return found


def heldout_tokens(corpus: Corpus, model: Decoder, rows: int, length: int) -> torch.Tensor:
    """(rows, length) int64 of held-out text, all categories mixed."""
    return torch.from_numpy(corpus.batch(0, rows, min(length, model.arch.max_positions), split="heldout"))


def _alone(model: Decoder, tokenizer, corpus: Corpus | None, items: dict, length: int, documents: int | None) -> dict:
    """The figures that need no second model."""
    found: dict = {}
    if corpus is not None:
        texts = {c: corpus.documents("heldout", c, documents) for c in corpus.categories}
        if tokenizer is not None:  # a few long documents would take all of the time and say little more
            texts = {c: [shorten(d, length, tokenizer) for d in each] for c, each in texts.items()}
        separator = None if tokenizer is None else tokenizer.eos_id
        found["bits_per_byte"] = bits_per_byte(model, texts, length, separator)
    if items:
        if tokenizer is None:
            raise IntarsiaError("tasks are text and the model has no tokenizer: give one, or leave the tasks out.")
        found["tasks"] = {name: run_task(model, tokenizer, name, each) for name, each in items.items()}
    return found


def _loaded(model: Model, tokenizer, weights: str | None = None) -> tuple[Decoder, object]:
    if isinstance(model, (str, os.PathLike)):
        model, own = load(model, weights=weights)
        tokenizer = tokenizer or own
    return model.eval(), tokenizer
