"""A built corpus, read at random: every sample is a pure function of (index, length, seed), whatever the rank or order.

Three small ideas carry it. A category's documents stand end to end and are cut into windows. An epoch visits the
windows in a pseudo-random order that needs no table: a Feistel network is a bijection of [0, 4^k), and walking its
cycle until the value falls below n makes it one of [0, n) (Black & Rogaway, "Ciphers with arbitrary finite domains",
2002). Categories take turns in a fixed cycle in which each comes up as evenly as its weight allows.
"""

from __future__ import annotations

import functools
import hashlib
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from intarsia.base.errors import IntarsiaError
from intarsia.base.files import hash_file, read_json
from intarsia.base.progress import Progress
from intarsia.data.indexed import Indexed
from intarsia.data.marks import FILES, load_mask, load_pairs

CYCLE = 1024  # slots of the turn-taking cycle: weights are kept to a thousandth


class Corpus:
    """The folder that `build` wrote. Splits are `train` and `heldout`; tokens come as int64."""

    def __init__(self, path: str | os.PathLike):
        self.path = Path(path)
        if not (self.path / "manifest.json").is_file():
            raise IntarsiaError(
                f"{self.path} is no built data (it has no manifest.json, or its building was interrupted): "
                "build it, or run the same command again."
            )
        self.manifest = read_json(self.path / "manifest.json")
        self.data = functools.cache(self._open)
        self._plans: dict[tuple, _Plan] = {}

    @property
    def categories(self) -> list[str]:
        return list(self.manifest["categories"])

    @property
    def fingerprint(self) -> str:
        """What the tokens are, not where they came from: equal for equal tokens from an equal tokenizer."""
        return self.manifest["fingerprint"]

    @property
    def vocab_size(self) -> int:
        return self.manifest["vocab_size"]

    def tokens(self, split: str = "train", category: str | None = None) -> int:
        """How many tokens a split has, in one category or in all."""
        self._check(split, category)
        names = self.categories if category is None else [category]
        return sum(self.manifest["categories"][name][split]["tokens"] for name in names)

    def sample(self, index: int, length: int, split: str = "train", seed: int = 0,
               weights: Mapping[str, float] | None = None) -> np.ndarray:
        """Window number `index` (from 0, without end): token ids (length,) int64.

        Categories are mixed by `weights` (by default by their tokens). No window of a category comes again before
        all of its windows came; each epoch has another order. A window may span documents.
        """
        plan = self._plan(split, length, weights)
        category, turn = plan.turn(index)
        windows = plan.windows[category]
        epoch, step = divmod(turn, windows)
        start = permute(step, windows, (seed, split, category, epoch)) * length
        return self.data(split, category).tokens[start : start + length].astype(np.int64)

    def batch(self, first: int, count: int, length: int, split: str = "train", seed: int = 0,
              weights: Mapping[str, float] | None = None) -> np.ndarray:
        """Samples `first` to `first + count - 1`: (count, length) int64."""
        return np.stack([self.sample(i, length, split, seed, weights) for i in range(first, first + count)])

    def documents(self, split: str, category: str, limit: int | None = None) -> list[tuple[np.ndarray, int]]:
        """Whole documents as (token ids (N,) int64, UTF-8 bytes of the text).

        The ids end with the separator, which has no bytes. With `limit`, that many spread evenly over the category.
        """
        self._check(split, category)
        data = self.data(split, category)
        sizes = np.load(self.path / category / f"{split}.bytes.npy", allow_pickle=False)
        if len(sizes) != len(data):
            raise IntarsiaError(f"{self.path / category} is not whole: {len(sizes)} sizes for {len(data)} documents. "
                                "Delete the folder and build the data again.")
        return [(data[i].astype(np.int64), int(sizes[i])) for i in _spread(len(data), limit)]

    def masks(self, split: str, category: str, limit: int | None = None) -> list[np.ndarray] | None:
        """Which tokens of the same documents count in the loss, (N,) uint8 each; None where all do."""
        mask, data = self.mask(split, category), self.data(split, category)
        if mask is None:
            return None
        return [mask[data.starts[i] : data.starts[i] + data.lengths[i]] for i in _spread(len(data), limit)]

    def mask(self, split: str, category: str) -> np.ndarray | None:
        """Which tokens of a split count in the loss, (tokens,) uint8; None where all do."""
        return load_mask(self.path / category, split, len(self.data(split, category).tokens))

    def pairs(self, split: str, category: str) -> np.ndarray | None:
        """Of pairs of answers, (documents, 3): see marks.py; None where documents are no pairs."""
        return load_pairs(self.path / category, split, len(self.data(split, category)))

    def verify(self) -> None:
        """Read everything once and compare it with the manifest; raises `IntarsiaError` naming the first file that
        is missing, cut short or has other bytes than were built."""
        files = [(self.path / c / f"{split}{end}", self.manifest["categories"][c][split].get(key))
                 for c in self.categories for split in ("train", "heldout")
                 for end, key in ((".idx", "index_sha256"), (".bin", "sha256"),
                                  *((f".{file}", f"{name}_sha256") for name, file in FILES.items()))
                 if key in ("index_sha256", "sha256") or key in self.manifest["categories"][c][split]]
        for category in self.categories:
            for split in ("train", "heldout"):
                self._open(split, category)
        with Progress(f"check {self.path.name}", sum(path.stat().st_size for path, _ in files)) as progress:
            for path, expected in files:
                if expected is not None and hash_file(path) != expected:
                    raise IntarsiaError(f"{path} is damaged: its bytes are not those that were built (SHA-256 differs "
                                        f"from the manifest's). Delete the folder {path.parent} and build the data "
                                        "again; the other categories are kept.")
                progress.advance(path.stat().st_size)

    def _open(self, split: str, category: str) -> Indexed:
        """The tokens of a category's split (Indexed); called through `data`, which keeps it open."""
        self._check(split, category)
        found = Indexed(self.path / category / split)
        expected = self.manifest["categories"][category][split]["tokens"]
        if len(found.tokens) != expected:
            raise IntarsiaError(f"{self.path / category / split}.idx counts {len(found.tokens):,} tokens and the "
                                f"manifest {expected:,}: they are of different builds. Build the data again.")
        return found

    def _check(self, split: str, category: str | None = None) -> None:
        if split not in ("train", "heldout"):
            raise IntarsiaError(f"there is no split '{split}': it is train or heldout.")
        if category is not None and category not in self.categories:
            raise IntarsiaError(f"there is no category '{category}' in {self.path}: {', '.join(self.categories)}.")

    def _plan(self, split: str, length: int, weights: Mapping[str, float] | None) -> _Plan:
        key = (split, length, None if weights is None else tuple(sorted(weights.items())))
        if key not in self._plans:
            self._plans[key] = self._make_plan(split, length, weights)
        return self._plans[key]

    def _make_plan(self, split: str, length: int, weights: Mapping[str, float] | None) -> _Plan:
        self._check(split)
        if length < 1:
            raise IntarsiaError(f"a sequence of {length} tokens cannot be read: the length is at least 1.")
        windows = {c: self.tokens(split, c) // length for c in self.categories}
        if weights is None:  # a category shorter than one window has none to give
            weights = {c: self.tokens(split, c) for c, n in windows.items() if n}
            if not weights:
                longest = max(self.categories, key=lambda c: self.tokens(split, c))
                raise IntarsiaError(
                    f"no category of the {split} split in {self.path} is as long as one sequence of {length:,} tokens "
                    f"(the longest is {longest} with {self.tokens(split, longest):,}): give more text or a shorter "
                    "sequence."
                )
        for category, weight in weights.items():
            self._check(split, category)
            if not (weight >= 0 and np.isfinite(weight)):
                raise IntarsiaError(f"the weight of {category} is {weight}: weights are finite and not negative.")
            if weight > 0 and not windows[category]:
                raise IntarsiaError(
                    f"{category} has {self.tokens(split, category):,} tokens in the {split} split, fewer than one "
                    f"sequence of {length:,}: give more text, a shorter sequence, or no weight to {category}."
                )
        return _Plan.make(windows, weights)


def _spread(count: int, limit: int | None) -> list[int]:
    """`limit` of `count` numbers, evenly; all of them without a limit."""
    some = count if limit is None else min(limit, count)
    return [k * count // some for k in range(some)]


@dataclass(frozen=True)
class _Plan:
    """Turn-taking: which category sample `index` comes from, and the how-manieth of that category it is."""

    names: list[str]
    windows: dict[str, int]
    order: np.ndarray  # (CYCLE,) category of each slot
    rank: np.ndarray  # (CYCLE,) earlier slots of the same category in the cycle
    slots: np.ndarray  # (categories,) slots of each category in the cycle

    @classmethod
    def make(cls, windows: dict[str, int], weights: Mapping[str, float]) -> _Plan:
        names = [name for name in windows if weights.get(name, 0) > 0]
        if not names:
            raise IntarsiaError("every weight is zero: give at least one category a positive weight.")
        slots = _apportion(np.array([weights[name] for name in names], float))
        # The k-th of n slots of a category belongs at (k + 1/2) / n of the cycle; sorting merges the categories evenly.
        category = np.repeat(np.arange(len(names)), slots)
        rank = np.concatenate([np.arange(n) for n in slots])
        order = np.argsort((rank + 0.5) / slots[category], kind="stable")
        return cls(names, windows, category[order], rank[order], slots)

    def turn(self, index: int) -> tuple[str, int]:
        if index < 0:
            raise IntarsiaError(f"there is no sample {index}: samples are counted from 0.")
        cycle, slot = divmod(int(index), CYCLE)
        category = self.order[slot]
        return self.names[category], cycle * int(self.slots[category]) + int(self.rank[slot])


def _apportion(weights: np.ndarray) -> np.ndarray:
    """CYCLE slots by largest remainder, at least one for each weight."""
    shares = weights / weights.sum() * (CYCLE - len(weights))
    slots = np.floor(shares).astype(np.int64) + 1
    rest = CYCLE - int(slots.sum())
    slots[np.argsort(np.floor(shares) - shares, kind="stable")[:rest]] += 1
    return slots


def permute(index: int, size: int, key: tuple) -> int:
    """A pseudo-random bijection of [0, size) chosen by `key`."""
    half = max(1, ((size - 1).bit_length() + 1) // 2)
    mask = (1 << half) - 1
    keys = _round_keys(key)
    while True:
        left, right = index >> half, index & mask
        for k in keys:
            left, right = right, left ^ (_mix(right ^ k) & mask)
        index = left << half | right
        if index < size:
            return index


@functools.lru_cache(maxsize=1024)
def _round_keys(key: tuple) -> tuple[int, ...]:
    digest = hashlib.sha256(repr(key).encode()).digest()
    return tuple(int.from_bytes(digest[i : i + 8]) for i in range(0, 32, 8))


def _mix(value: int) -> int:
    """The finaliser of SplitMix64."""
    value = (value ^ value >> 30) * 0xBF58476D1CE4E5B9 & (1 << 64) - 1
    value = (value ^ value >> 27) * 0x94D049BB133111EB & (1 << 64) - 1
    return value ^ value >> 31
