"""Uniform choices of a problem: so many blocks of every kind, one option for all that stay (MiniPuzzle, Nemotron-H,
arXiv 2504.03624, section 3.1). What stays of a kind is what matters most by a ranking.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from intarsia.arch import Architecture, kind
from intarsia.base.errors import IntarsiaError
from intarsia.compress.grid import Ranking, counts_of, dropped
from intarsia.compress.options import NONE, PARENT, Site
from intarsia.compress.problem import Options, pair_name
from intarsia.compress.solve import Bound, total_costs, untied
from intarsia.compress.targets import Problem

WIDTHS = (PARENT, "prefix", "narrow")  # methods that make a block narrower and nothing else


@dataclass(frozen=True)
class Uniform:
    """Blocks that stay and the option of those that stay, both by kind."""

    kept: Mapping[str, int]
    options: Mapping[str, str]

    @property
    def name(self) -> str:
        """`24 mamba2, 20 ffn at ffn 96`."""
        return ", ".join(f"{count} {name}" + ("" if self.options[name] == PARENT else f" at {self.options[name]}")
                         for name, count in self.kept.items())  # fmt: skip


class Space:
    """All uniform choices of a problem. Raises `IntarsiaError` where a block cannot be left out."""

    def __init__(
        self, arch: Architecture, sites: Sequence[Site], options: Options, problem: Problem, ranking: Ranking
    ):
        self.arch, self.sites, self.problem, self.ranking = arch, sites, problem, ranking
        self.known = counts_of(arch)
        self.ladder = _ladders(arch, options)
        self.places = [{option.name: n for n, option in enumerate(site)} for site in problem.sites]

    def picks(self, member: Uniform) -> list[int]:
        """The index of the option of every site."""
        gone = dropped(self.arch, self.ranking, member.kept)

        def name(index: int | None) -> str:
            if index is None:
                return PARENT
            return NONE if index in gone else member.options[kind(self.arch.blocks[index])]

        return [place[pair_name(name(site.attention), name(site.ffn))] for site, place in zip(self.sites, self.places)]

    def met(self, member: Uniform, bounds: Sequence[Bound]) -> bool:
        """Whether it is within the bounds, and tied as the problem wants it."""
        picks, sites = self.picks(member), self.problem.sites
        costs = total_costs(sites, picks, self.problem.fixed)
        return not untied(sites, picks) and all(bound.met(costs) for bound in bounds)

    def maximal(self, bounds: Sequence[Bound], least: float) -> Iterator[Uniform]:
        """Members within the bounds to which no block can be added. `least` of every kind stays at the least."""
        lows = {name: math.ceil(least * count) for name, count in self.known.items()}
        *outer, last = sorted(self.known, key=self.known.__getitem__)  # the longest count is halved and not walked
        for names in itertools.product(*self.ladder.values()):
            options = dict(zip(self.ladder, names))
            for counts in itertools.product(*(range(lows[name], self.known[name] + 1) for name in outer)):
                member = self._most(dict(zip(outer, counts)), options, last, lows[last], bounds)
                if member is None:
                    continue
                more = ({**member.kept, k: n + 1} for k, n in member.kept.items() if n < self.known[k])
                if not any(self.met(Uniform(kept, options), bounds) for kept in more):
                    yield member

    def _most(
        self, kept: dict[str, int], options: dict[str, str], last: str, low: int, bounds: Sequence[Bound]
    ) -> Uniform | None:
        """The member with most blocks of the kind `last` within the bounds: each adds to the costs, so halving finds
        it."""
        high = self.known[last]
        if not self.met(Uniform({**kept, last: low}, options), bounds):
            return None
        while low < high:
            middle = (low + high + 1) // 2
            fits = self.met(Uniform({**kept, last: middle}, options), bounds)
            low, high = (middle, high) if fits else (low, middle - 1)
        kept = {**kept, last: low}
        return Uniform({name: kept[name] for name in self.known}, options)


def _ladders(arch: Architecture, options: Options) -> dict[str, list[str]]:
    """For every kind the widths that all blocks of the kind have, the parent's own first."""
    found: dict[str, list[str]] = {}
    for index, block in enumerate(arch.blocks):
        if not any(spec.method == NONE for spec in options[index]):
            raise IntarsiaError("MiniPuzzle leaves blocks out: set options.absent to true.")
        names = [spec.name for spec in options[index] if spec.method in WIDTHS]
        found[kind(block)] = [name for name in found.get(kind(block), names) if name in names]
    return found
