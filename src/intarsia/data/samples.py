"""The samples of a training: a blend over a corpus, packed into rows; sample n is a pure function of n.

    n -> source and how-manieth of it (order.py) -> epoch and step -> row (a permutation of its own each epoch)
      -> tokens, targets, segments (packing.py)

So the state of the data is one integer, and every rank and worker takes any samples it likes.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from intarsia.base.errors import IntarsiaError
from intarsia.base.files import fingerprint
from intarsia.data.blend import Blend
from intarsia.data.corpus import Corpus, permute
from intarsia.data.marks import FILES
from intarsia.data.order import Draw, Order, budget_table, check_epochs, make_order
from intarsia.data.packing import Piece, Row, Rows


class Batch(NamedTuple):
    """Rows side by side: `tokens`, `targets` (B, L) int64, `segments`, `positions` (B, L) int32, `gaps` (B, L) float32
    of pairs of answers; see packing.Row."""

    tokens: np.ndarray
    targets: np.ndarray
    segments: np.ndarray
    positions: np.ndarray
    gaps: np.ndarray | None = None


def side_by_side(rows: Sequence[Row]) -> Batch:
    """Rows of one kind as a batch."""
    each = {name: [getattr(row, name) for row in rows] for name in Batch._fields}
    return Batch(**{name: None if arrays[0] is None else np.stack(arrays) for name, arrays in each.items()})


class Place(NamedTuple):
    """Where a sample comes from: row `row` of `source`, in its epoch `epoch` (from 0)."""

    source: str
    epoch: int
    row: int


@dataclass(frozen=True)
class Change:
    """A blend that held from sample `start` on (0 for the first), and the budget that it was planned for."""

    start: int
    blend: Blend
    tokens: int


class Samples:
    """`order` over the categories of `corpus`, in rows of `length` tokens; made by `mix`.

    `.order` says what comes when, `.rows` maps a source to its rows, `.total` is the number of planned samples.
    """

    def __init__(self, corpus: Corpus, order: Order, length: int, packing: str = "split", cross: bool = False,
                 seed: int = 0, split: str = "train", padding: int = 0):
        self.corpus, self.order, self.length, self.seed, self.split = corpus, order, length, seed, split
        self.total = order.total
        self.rows: dict[str, Rows] = {}
        for source in order.sources:
            self.rows[source] = rows = Rows(corpus.data(split, source), length, packing, cross, padding,
                                            corpus.mask(split, source), corpus.pairs(split, source))
            if not len(rows):
                raise IntarsiaError(
                    f"{source} has {rows.stream.size:,} tokens in the {split} split, fewer than one sequence of "
                    f"{length:,}: give more text or a shorter sequence, or leave {source} out of the blend."
                )
        content = {s: self._content(corpus.manifest["categories"][s][split]) for s in order.sources}
        self.fingerprint = fingerprint(content, length, packing, cross, seed, split)

    @staticmethod
    def _content(entry: dict[str, Any]) -> Any:
        beside = [entry[key] for name in FILES if (key := f"{name}_sha256") in entry]
        return [entry.get("sha256"), *beside] if beside else entry.get("sha256")

    def place(self, index: int) -> Place:
        """Where sample `index` comes from. No row of a source comes again before all of its rows came."""
        source, rank = self.order.at(index)
        epoch, step = divmod(rank, len(self.rows[source]))
        return Place(source, epoch, permute(step, len(self.rows[source]), (self.seed, self.split, source, epoch)))

    def __getitem__(self, index: int) -> Row:
        place = self.place(index)
        return self.rows[place.source][place.row]

    def batch(self, first: int, count: int, stride: int = 1) -> Batch:
        """Samples `first`, `first + stride`, ...: `count` of them. A rank r of R takes (first + r, count, R)."""
        rows = [self[first + i * stride] for i in range(count)]
        return side_by_side(rows)

    def pieces(self, index: int) -> tuple[Place, list[Piece]]:
        """The very documents of a sample: numbers within the source's split, and from which to which token."""
        place = self.place(index)
        return place, self.rows[place.source].pieces(place.row)

    def budget(self) -> list[Draw]:
        """Tokens and epochs of every source in every phase, padding included."""
        return budget_table(self.order, self._epoch(), self.length)

    def check_epochs(self, max_epochs: float) -> None:
        """Raise `IntarsiaError` if the plan reads some source more than `max_epochs` times."""
        check_epochs(self.order, self._epoch(), self.length, max_epochs)

    def _epoch(self) -> dict[str, int]:
        return {source: len(rows) for source, rows in self.rows.items()}


def mix(corpus: Corpus, blend: Blend, tokens: int, length: int, *, packing: str = "split", cross: bool = False,
        seed: int = 0, split: str = "train", padding: int = 0, start: int = 0, before: Iterable[Change] = ()
        ) -> Samples:
    """The samples of a training of `tokens` tokens by `blend`, in rows of `length`.

    Where the blend was changed on the way, `before` names what held earlier, from the beginning, and `start` is the
    sample at which `blend` took over: `tokens` counts from the beginning of the training all the same, and every
    source goes on where it was. Raises `IntarsiaError` for a plan that is not possible, or reads a source more often
    than the blend's `max_epochs`.
    """
    have = {category: corpus.tokens(split, category) for category in corpus.categories}
    changes = [*before, Change(start, blend, tokens)]
    if changes[0].start != 0 or any(a.start >= b.start for a, b in itertools.pairwise(changes)):
        raise IntarsiaError("the blends of a training must follow each other, the first from sample 0: they begin at "
                            f"{', '.join(str(c.start) for c in changes)}.")
    order = make_order(changes[0].blend, have, changes[0].tokens, length)
    for change in changes[1:]:
        order = order.changed(change.start, make_order(change.blend, have, change.tokens, length))
    samples = Samples(corpus, order, length, packing, cross, seed, split, padding)
    samples.check_epochs(blend.max_epochs)
    return samples
