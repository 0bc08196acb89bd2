"""What held-out documents say of a model while it trains, by category: the same documents at every look."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch

from intarsia.base.errors import IntarsiaError
from intarsia.data.packing import IGNORED, Rows
from intarsia.data.samples import Batch, side_by_side
from intarsia.evaluate import bits_per_byte, shorten
from intarsia.evaluate.text import ratio
from intarsia.train.material import Material
from intarsia.train.preference import PreferenceTrainee
from intarsia.train.ranks import Ranks
from intarsia.train.recipe import Recipe
from intarsia.train.trainee import Answers, Tensors, Trainee, to_tensors

Found = dict[str, dict[str, Any]]  # {category or `all`: {value, se, n}}


class Heldout:
    """Bits per byte of up to `evaluate.documents` of each category, of their first tokens; of conversations, of what
    the assistant says in them."""

    NAME = "bits_per_byte"

    def __init__(self, recipe: Recipe, material: Material):
        corpus, tokenizer = material.corpus, material.tokenizer
        self.length = recipe.evaluate.length or recipe.data.length
        self.rows, count = max(1, 2048 // self.length), recipe.evaluate.documents
        self.documents = {c: corpus.documents("heldout", c, count) for c in corpus.categories}
        masks = {c: corpus.masks("heldout", c, count) for c in corpus.categories}
        self.masks = None if None in masks.values() else masks
        # A conversation is ended by its template and by no separator.
        self.separator = None if tokenizer is None or self.masks else tokenizer.eos_id
        if self.masks:
            self._shorten_said(tokenizer)
        elif tokenizer is not None:
            self.documents = {c: [shorten(d, self.length, tokenizer) for d in each]
                              for c, each in self.documents.items()}  # fmt: skip

    def _shorten_said(self, tokenizer: Any) -> None:
        """The first tokens of every conversation, and the bytes that the assistant says in them."""
        for category, masks in self.masks.items():
            cut = [(ids[: self.length], mask[: self.length]) for (ids, _), mask in
                   zip(self.documents[category], masks)]  # fmt: skip
            cut = [(ids, mask) for ids, mask in cut if mask[1:].any()]
            self.documents[category] = [(ids, len(tokenizer.decode(ids[mask != 0].tolist()).encode()))
                                        for ids, mask in cut]  # fmt: skip
            self.masks[category] = [mask for _, mask in cut]

    def look(self, trainee: Trainee, teacher: Answers | None, ranks: Ranks) -> Found:
        """Many ranks look together: each holds a part of the model."""
        trainee.eval()
        score = None if ranks.world == 1 else self._together(trainee, ranks)
        found = bits_per_byte(
            trainee.model, self.documents, self.length, self.separator, "held-out text", score, self.masks
        )
        trainee.train()
        return found

    def _together(self, trainee: Trainee, ranks: Ranks) -> Callable[..., list]:
        """`evaluate.likelihood.token_scores` through the forward pass of the trainee, which knows of the shards."""

        @torch.no_grad()
        def scores(sequences: Sequence[Sequence[int]], advance: Callable[[int], None]) -> list:
            found = []
            for first in range(0, len(sequences), self.rows):
                some = sequences[first : first + self.rows]
                longest = max(map(len, some)) - 1
                tokens = torch.zeros(len(some), longest, dtype=torch.int64)
                targets = torch.full_like(tokens, IGNORED)
                for row, ids in enumerate(some):
                    tokens[row, : len(ids) - 1] = torch.as_tensor(ids[:-1])
                    targets[row, : len(ids) - 1] = torch.as_tensor(ids[1:])
                _, nll = trainee(Tensors(tokens.to(ranks.device), targets.to(ranks.device), None))
                found += [(one[: len(ids) - 1].cpu(), None) for one, ids in zip(nll, some)]
                advance(len(some))
            return found

        return scores


class HeldoutPairs:
    """Of held-out pairs of answers, the share whose chosen answer the model is more for than its reference is."""

    NAME = "accuracy"

    def __init__(self, recipe: Recipe, material: Material):
        self.batches: dict[str, list[Batch]] = {}
        corpus, length = material.corpus, recipe.data.length
        for category in corpus.categories:
            pairs, left = corpus.pairs("heldout", category), recipe.evaluate.documents
            if pairs is None:
                continue
            rows = Rows(corpus.data("heldout", category), length, "whole", mask=corpus.mask("heldout", category),
                        pairs=pairs)  # fmt: skip
            for number in range(len(rows)):
                if left > 0:
                    row = rows[number]
                    left -= len(rows.pieces(number))
                    self.batches.setdefault(category, []).append(side_by_side([row]))
        if not self.batches:
            raise IntarsiaError(f"no held-out pair of {corpus.path} fits a sample of {length:,} tokens: give more, "
                                "a longer data.length, or a larger data.heldout.")

    @torch.no_grad()
    def look(self, trainee: PreferenceTrainee, teacher: Answers, ranks: Ranks) -> Found:
        trainee.eval()
        right: dict[str, list[np.ndarray]] = {}
        for category, batches in self.batches.items():
            for batch in (to_tensors(each, ranks.device) for each in batches):
                _, _, margin = trainee(batch, teacher)
                there = trainee.counted(batch)
                right.setdefault(category, []).append((margin[0, : int(there[0])] > 0).double().cpu().numpy())
        trainee.train()
        each = {category: np.concatenate(parts) for category, parts in right.items()}
        each["all"] = np.concatenate(list(each.values()))
        return {category: ratio(values, np.ones_like(values)) for category, values in each.items()}
