"""Taking turns by exact proportions, at random access: whose turn number j is, and how many turns everyone had before.

Of two parties with shares p and 1 - p, the first has had round(p j) of the first j turns: a Beatty sequence, exact at
every j. More than two are split two by two along a Huffman tree of their weights: the turns of a branch are counted by
its own parent. Nothing is stored but the tree and everything is integer arithmetic, so that any number of turns costs
the same and proportions never drift. A branch is off by at most 1/2 plus its share of its parent's error, which adds up
to less than two turns for any weights, after any number of turns.
"""

from __future__ import annotations

import heapq
import math
from collections.abc import Iterator, Mapping
from fractions import Fraction


class Turns:
    """`weights`: positive numbers by name, in any unit; floats count as the decimals that they are written as.

    `.shares` are the exact proportions by name; `.errors` how many turns a count can be off, after any number of them.
    """

    def __init__(self, weights: Mapping[str, float | Fraction]):
        exact = {name: Fraction(str(weight)) for name, weight in weights.items() if weight}
        scale = math.lcm(*(weight.denominator for weight in exact.values()))
        self.shares = {name: weight / sum(exact.values()) for name, weight in exact.items()}
        heap = [(int(weight * scale), place, name) for place, (name, weight) in enumerate(exact.items())]
        heapq.heapify(heap)
        while len(heap) > 1:  # the second entry decides between equal weights, so that the tree is always the same
            light, heavy = heapq.heappop(heap), heapq.heappop(heap)
            node = (light[2], heavy[2], light[0], light[0] + heavy[0])
            heapq.heappush(heap, (light[0] + heavy[0], light[1] + len(exact), node))
        self._root = heap[0][2]
        self.errors = dict(_errors(self._root, 0.0))

    def at(self, turn: int) -> tuple[str, int]:
        """Whose turn number `turn` (from 0) is, and the how-manieth of its own (from 0)."""
        node = self._root
        while not isinstance(node, str):
            light, heavy, share, total = node
            before = _rounded(turn, share, total)
            mine = _rounded(turn + 1, share, total) > before
            node, turn = (light, before) if mine else (heavy, turn - before)
        return node, turn

    def counts(self, turns: int) -> dict[str, int]:
        """How many of the first `turns` turns everyone has had."""
        counts, left = {}, [(self._root, turns)]
        while left:
            node, count = left.pop()
            if isinstance(node, str):
                counts[node] = count
            else:
                light, heavy, share, total = node
                had = _rounded(count, share, total)
                left += [(light, had), (heavy, count - had)]
        return counts


def _rounded(turns: int, share: int, total: int) -> int:
    """round(turns * share / total), halves upwards."""
    return (2 * turns * share + total) // (2 * total)


def _errors(node: str | tuple, error: float) -> Iterator[tuple[str, float]]:
    if isinstance(node, str):
        yield node, error
    else:
        light, heavy, share, total = node
        yield from _errors(light, 0.5 + error * share / total)
        yield from _errors(heavy, 0.5 + error * (total - share) / total)
