"""The order of samples: from which source sample n comes, and how much of every source was read before it.

Both are pure functions of n: no table, no file, the same for every rank and worker, at the same cost for any n. A
training is a row of stretches, each with turns of its own (turns.py). A phase is a stretch; a blend that is changed in
the middle is more of them, and because every source counts its own samples through all stretches, it goes on where it
was.
"""

from __future__ import annotations

import bisect
from collections.abc import Mapping
from dataclasses import dataclass, replace

from intarsia.base.errors import IntarsiaError
from intarsia.data.blend import Blend
from intarsia.data.turns import Turns


@dataclass(frozen=True)
class Stretch:
    """Samples `start` to `end` - 1 with one set of proportions; the last stretch of an order goes on after its end."""

    name: str
    start: int
    end: int
    turns: Turns


class Order:
    """Stretches end to end. `.total` is the number of samples that were planned; more can be asked for."""

    def __init__(self, stretches: list[Stretch]):
        self.stretches = stretches
        self.total = stretches[-1].end
        self._starts = [stretch.start for stretch in stretches]
        self._before: list[dict[str, int]] = [{}]  # samples of each source before each stretch
        for stretch in stretches:
            self._before.append(_plus(self._before[-1], stretch.turns.counts(stretch.end - stretch.start)))

    @property
    def sources(self) -> list[str]:
        """Every source that has a share in some stretch."""
        return list(dict.fromkeys(name for stretch in self.stretches for name in stretch.turns.shares))

    def at(self, index: int) -> tuple[str, int]:
        """The source of sample `index` (from 0), and how many samples of that source came before it."""
        number = self._stretch(index)
        source, rank = self.stretches[number].turns.at(index - self._starts[number])
        return source, rank + self._before[number].get(source, 0)

    def consumed(self, index: int) -> dict[str, int]:
        """How many of the first `index` samples came from each source."""
        number = self._stretch(index)
        had = self.stretches[number].turns.counts(index - self._starts[number])
        return dict.fromkeys(self.sources, 0) | _plus(self._before[number], had)

    def phase(self, index: int) -> str:
        """The name of the stretch that sample `index` is in."""
        return self.stretches[self._stretch(index)].name

    def changed(self, index: int, other: Order) -> Order:
        """This order up to sample `index`, and `other` from there on, with every source where it is by then."""
        if not 0 <= index < other.total:
            raise IntarsiaError(f"the new blend is planned for {other.total:,} samples and cannot begin at {index:,}: "
                                "its budget counts from the beginning of the training.")
        old = [replace(s, end=min(s.end, index)) for s in self.stretches if s.start < index]
        if old and old[-1].end < index:
            old[-1] = replace(old[-1], end=index)  # past its plan, the last stretch goes on
        return Order(old + [replace(s, start=max(s.start, index)) for s in other.stretches if s.end > index])

    def _stretch(self, index: int) -> int:
        if index < 0:
            raise IntarsiaError(f"there is no sample {index}: samples are counted from 0.")
        return bisect.bisect_right(self._starts, index) - 1


def make_order(blend: Blend, tokens: Mapping[str, int], budget: int, length: int) -> Order:
    """The order of a training of `budget` tokens in samples of `length`, over sources that have `tokens` each."""
    samples = budget // length
    if samples < 1:
        raise IntarsiaError(f"a budget of {budget:,} tokens is not one sample of {length:,}: give more tokens.")
    ends = [end // length for end in blend.ends(budget)]
    stretches, start = [], 0
    for number, (phase, end, weights) in enumerate(zip(blend.phases, ends, blend.weights(tokens), strict=True), 1):
        if end > start:  # a phase shorter than a sample has none
            stretches.append(Stretch(phase.name or str(number), start, end, Turns(weights)))
        start = max(start, end)
    return Order(stretches)


def _plus(a: Mapping[str, int], b: Mapping[str, int]) -> dict[str, int]:
    return {name: a.get(name, 0) + b.get(name, 0) for name in {**a, **b}}


@dataclass(frozen=True)
class Draw:
    """What one stretch reads of one source; `number` is the stretch's, from 0, `phase` its name."""

    number: int
    phase: str
    source: str
    samples: int
    tokens: int
    epochs: float


def budget_table(order: Order, rows: Mapping[str, int], length: int) -> list[Draw]:
    """What every phase reads of every source; `rows` are the samples that each source has in an epoch."""
    draws = []
    for number, stretch in enumerate(order.stretches):
        for source, count in stretch.turns.counts(stretch.end - stretch.start).items():
            draws.append(Draw(number, stretch.name, source, count, count * length, count / rows[source]))
    return draws


def check_epochs(order: Order, rows: Mapping[str, int], length: int, max_epochs: float) -> None:
    """Raise `IntarsiaError` if some source is read more than `max_epochs` times."""
    had = order.consumed(order.total)
    over = {s: had[s] / rows[s] for s in had if had[s] > max_epochs * rows[s]}
    if over:
        worst = max(over, key=over.get)
        told = ", ".join(f"{s} {e:.1f} times ({had[s] * length:,} tokens of {rows[s] * length:,})"
                         for s, e in sorted(over.items(), key=lambda item: -item[1]))
        most = int(order.total * length * max_epochs / over[worst])
        raise IntarsiaError(
            f"{order.total * length:,} tokens of this blend read {told}, and max_epochs is {max_epochs:g}. Train on at "
            f"most about {most:,} tokens, give more text, change the weights or sources, or set max_epochs higher."
        )
