"""Uniform children of a parent: so many blocks of each kind, every FFN at one width (MiniPuzzle, Nemotron-H, arXiv
2504.03624, section 3.1). What stays of a kind is what matters most by a ranking, so a member is told by its counts.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from intarsia.arch import Architecture, FeedForward, block_cache_bytes, kind, parameters
from intarsia.base.errors import IntarsiaError

Ranking = Mapping[str, Sequence[int]]  # kind of block -> indices of the parent's blocks, least important first


@dataclass(frozen=True)
class Member:
    """How many blocks of every kind stay, and the channels of every FFN."""

    kept: Mapping[str, int]
    width: int

    @property
    def depth(self) -> int:
        return sum(self.kept.values())


@dataclass(frozen=True)
class Precision:
    """Bits of one number where a model is served, and what the engine needs beside the model. States of scans are
    float32 (`arch.cost`)."""

    weight_bits: float = 16
    cache_bits: float = 16
    reserve_bytes: float = 0.0

    def weight_bytes(self, arch: Architecture) -> float:
        return parameters(arch) * self.weight_bits / 8

    def cache_bytes(self, arch: Architecture, context: int, batch: int = 1) -> float:
        """Of `batch` sequences of `context` tokens."""
        return sum(block_cache_bytes(b, context, batch, self.cache_bits / 8) for b in arch.blocks)

    def total_bytes(self, arch: Architecture, context: int, batch: int = 1) -> float:
        return self.weight_bytes(arch) + self.cache_bytes(arch, context, batch) + self.reserve_bytes


def counts_of(arch: Architecture) -> dict[str, int]:
    """How many blocks of every kind a model has, in the order in which they first appear."""
    kinds = [kind(block) for block in arch.blocks]
    return {name: kinds.count(name) for name in dict.fromkeys(kinds)}


def in_order(arch: Architecture) -> dict[str, list[int]]:
    """A ranking that knows nothing: blocks leave from the first on. Enough where only counts matter."""
    return {name: [i for i, b in enumerate(arch.blocks) if kind(b) == name] for name in counts_of(arch)}


def members(choices: Mapping[str, Sequence[int]], widths: Sequence[int]) -> Iterator[Member]:
    """Every combination of counts (by kind of block) and FFN widths."""
    for counts in itertools.product(*choices.values()):
        for width in widths:
            yield Member(dict(zip(choices, counts)), width)


def dropped(arch: Architecture, ranking: Ranking, kept: Mapping[str, int]) -> set[int]:
    """The indices of the blocks that leave: of every kind the least important. Kinds that are not named stay.

    Raises `IntarsiaError` where more of a kind is to leave than the ranking names.
    """
    gone: set[int] = set()
    for name, there in counts_of(arch).items():
        count = there - kept.get(name, there)
        order = ranking.get(name, ())
        if not 0 <= count <= len(order):
            raise IntarsiaError(
                f"{kept[name]} of {there} {name} blocks cannot stay: between {there - len(order)} and {there} can, as "
                f"the ranking names {len(order)} that may leave."
            )
        gone.update(order[:count])
    return gone


def child_of(arch: Architecture, ranking: Ranking, member: Member) -> Architecture:
    """The architecture of a member."""
    gone = dropped(arch, ranking, member.kept)
    blocks = [
        dataclasses.replace(b, intermediate_size=member.width) if isinstance(b, FeedForward) else b
        for index, b in enumerate(arch.blocks) if index not in gone
    ]  # fmt: skip
    return arch.replace(blocks=tuple(blocks))


def check_ranking(arch: Architecture, ranking: Ranking) -> None:
    """Raise `IntarsiaError` unless every index names a block of its kind, once."""
    for name, order in ranking.items():
        wrong = [i for i in order if not 0 <= i < len(arch.blocks) or kind(arch.blocks[i]) != name]
        if wrong or len(set(order)) != len(order):
            raise IntarsiaError(f"the ranking of {name} names {wrong or 'a block twice'}: blocks of that kind, once.")

