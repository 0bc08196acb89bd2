"""Which blocks a model can do without: every block left out in turn, once or one after another.

Blocks that can each be spared are not spared together: with the first gone, the second may carry its work. So the order
is conditional: the least important block leaves, all others are looked at again, and so on (Nemotron Nano 2, arXiv
2508.14444; Nemotron-H, 2504.03624, section 3.1, removes one at a time from the whole model). Only forward passes are
needed.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable

import torch

from intarsia.arch import Architecture, kind
from intarsia.base.errors import IntarsiaError
from intarsia.compress.score import Scorer

MEASURES = ("mse", "logits", "kl")


class Removal:
    """What a model loses without some of its blocks, on the positions of a scorer.

    `mse`: mean square of the change of what the head reads (MiniPuzzle). `logits`: the change of the logits, in
    squares, over their own squares (Nemotron Elastic, 2511.16664). `kl`: from the parent's predictions.
    """

    def __init__(self, scorer: Scorer, measure: str):
        if measure not in MEASURES:
            raise IntarsiaError(f"depth measure {measure!r} is not known; known: {', '.join(MEASURES)}.")
        self.scorer, self.measure = scorer, measure
        self.head = scorer.head.T @ scorer.head if measure == "logits" else None  # (D, D): |W h|^2 = h' W'W h

    @torch.inference_mode()
    def damage(self, x: torch.Tensor, start: int, gone: set[int]) -> float:
        """Of the stream x (B, L, D) before block `start`, from where on the blocks `gone` are left out."""
        scorer = self.scorer
        for index in range(start, len(scorer.model.blocks)):
            if index not in gone:
                x = scorer.change(x, scorer.model.blocks[index])
        last = scorer.pick(x)
        if self.measure == "kl":
            return scorer.compare(last)["kl"]
        change = last - scorer.last
        if self.measure == "mse":
            return float(change.square().mean())
        return self._power(change) / self._power(scorer.last)

    def _power(self, rows: torch.Tensor) -> float:
        return float(((rows @ self.head) * rows).sum())

    @torch.inference_mode()
    def damages(self, gone: set[int], advance: Callable[[], None] = lambda: None) -> dict[int, float]:
        """Of every further block that leaves a model without `gone`; one that is no number counts as infinite."""
        scorer, found = self.scorer, {}
        x = scorer.model.embed_tokens(scorer.ids)
        for index, block in enumerate(scorer.model.blocks):
            if index in gone:
                continue
            damage = self.damage(x, index + 1, gone)
            found[index] = damage if math.isfinite(damage) else math.inf
            x = scorer.change(x, block)
            advance()
        return found


def removal_order(
    removal: Removal, removals: int, advance: Callable[[], None] = lambda: None
) -> list[tuple[int, float]]:
    """All blocks with their damage, least important first: `removals` of them conditionally, one after another; the
    rest by the last look, with those gone. The damage of a block counts those before it among the `removals`."""
    order: list[tuple[int, float]] = []
    damages = removal.damages(set(), advance)
    for _ in range(min(removals, len(damages) - 1)):
        least = min(damages, key=damages.__getitem__)
        order.append((least, damages[least]))
        damages = removal.damages({index for index, _ in order}, advance)
    return order + sorted(damages.items(), key=lambda pair: pair[1])


def count_looks(blocks: int, removals: int) -> int:
    """How many passes `removal_order` makes."""
    return sum(blocks - gone for gone in range(min(removals, blocks - 1) + 1))


def by_kind(arch: Architecture, order: Iterable[int]) -> dict[str, list[int]]:
    """A `grid.Ranking`: the order within every kind of block."""
    ranking: dict[str, list[int]] = {}
    for index in order:
        ranking.setdefault(kind(arch.blocks[index]), []).append(index)
    return ranking
