"""Bits per byte of held-out text while a model trains, by category."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch

from intarsia.data.packing import IGNORED
from intarsia.evaluate import bits_per_byte, shorten
from intarsia.train.material import Material
from intarsia.train.ranks import Ranks
from intarsia.train.recipe import Recipe
from intarsia.train.trainee import Tensors, Trainee


class Heldout:
    """The same documents at every look: up to `evaluate.documents` of each category, their first tokens."""

    def __init__(self, recipe: Recipe, material: Material):
        corpus, tokenizer = material.corpus, material.tokenizer
        self.length = recipe.evaluate.length or recipe.data.length
        self.separator = None if tokenizer is None else tokenizer.eos_id
        self.rows = max(1, 2048 // self.length)
        self.documents = {c: corpus.documents("heldout", c, recipe.evaluate.documents) for c in corpus.categories}
        if tokenizer is not None:
            self.documents = {c: [shorten(d, self.length, tokenizer) for d in each]
                              for c, each in self.documents.items()}  # fmt: skip

    def bits_per_byte(self, trainee: Trainee, ranks: Ranks) -> dict[str, dict[str, Any]]:
        """{category or `all`: {value, se, n}}. Many ranks look together: each holds a part of the model."""
        trainee.eval()
        score = None if ranks.world == 1 else self._together(trainee, ranks)
        found = bits_per_byte(
            trainee.model, self.documents, self.length, self.separator, "held-out text", scores=score
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
