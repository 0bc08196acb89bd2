"""Rows of `length` tokens made of documents, two ways, each at random access by the number of the row.

`split`: the documents stand end to end and are cut every `length` tokens; a document goes on in the next row.
`whole`: a document shorter than a row stays whole. Longer ones are cut into full rows and a rest, and all that is
shorter than a row is packed by best fit decreasing (Ding et al., "Fewer Truncations Improve Language Modeling", 2024);
what stays free at the end of a row is padding. The packing is worked out when the rows are opened, from the lengths of
the documents alone, in time linear in documents.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from intarsia.base.errors import IntarsiaError
from intarsia.data.indexed import Indexed

PACKINGS = ("split", "whole")
IGNORED = -100  # a target that counts for nothing, as losses know it


@dataclass(frozen=True)
class Row:
    """One row: arrays (length,).

    `tokens` int64; `targets` int64, the token that follows in the same document, or IGNORED where none does;
    `segments` int32 from 0, one more at every document, padding last; `positions` int32 from 0 in every segment.
    Of pairs of answers, each answer is a segment, the chosen one before the rejected one, and `gaps` float32 says
    at every token of both how much higher the chosen one's reward is; None where documents are no pairs.
    """

    tokens: np.ndarray
    targets: np.ndarray
    segments: np.ndarray
    positions: np.ndarray
    gaps: np.ndarray | None = None


@dataclass(frozen=True)
class Piece:
    """A stretch of one document in a row: tokens `start` to `stop` - 1 of document number `document`."""

    document: int
    start: int
    stop: int


class Rows:
    """The rows of one source. `len` is their number. With `cross`, state and targets go over document ends.

    `padding` is the id that fills a row that is not full. A token whose `mask` is 0 is no target. `pairs`: see
    marks.py. Raises `IntarsiaError` for pairs that are not read whole.
    """

    def __init__(self, data: Indexed, length: int, packing: str = "split", cross: bool = False, padding: int = 0,
                 mask: np.ndarray | None = None, pairs: np.ndarray | None = None):
        if packing not in PACKINGS:
            raise IntarsiaError(f"there is no packing '{packing}': it is {' or '.join(PACKINGS)}.")
        if length < 1:
            raise IntarsiaError(f"a sequence of {length} tokens cannot be read: the length is at least 1.")
        self.stream, self.length, self.cross, self.padding = data.tokens, length, cross, padding
        self.documents = np.flatnonzero(np.diff(data.edges))  # an empty document is in no row
        self.edges = np.append(data.edges[:-1][self.documents], data.edges[-1])
        self.mask, self.pairs = mask, None if pairs is None else pairs[self.documents]
        if pairs is not None:
            self._check_pairs(packing)
        self.packed = pack(self.edges, length) if packing == "whole" else None
        self.count = data.tokens.size // length if self.packed is None else len(self.packed[2]) - 1

    def _check_pairs(self, packing: str) -> None:
        if packing != "whole" or self.cross:
            raise IntarsiaError('pairs of answers are read whole and apart: set data.packing = "whole" and data.cross '
                                "= false.")
        if long := int((np.diff(self.edges) > self.length).sum()):
            raise IntarsiaError(f"{long:,} pairs of answers are longer than a sample of {self.length:,} tokens: build "
                                "the data for this length, or choose a longer one.")

    def __len__(self) -> int:
        return self.count

    def _pieces(self, row: int) -> tuple[np.ndarray, np.ndarray]:
        """Where each piece of a row begins in the stream, and its length; documents in order."""
        if self.packed is not None:
            starts, lengths, first = self.packed
            return starts[first[row] : first[row + 1]], lengths[first[row] : first[row + 1]]
        begin, end = row * self.length, (row + 1) * self.length
        inner = self.edges[np.searchsorted(self.edges, begin, "right") : np.searchsorted(self.edges, end, "left")]
        cuts = np.concatenate([[begin], inner, [end]])
        return cuts[:-1], np.diff(cuts)

    def pieces(self, row: int) -> list[Piece]:
        """The documents of a row."""
        starts, lengths = self._pieces(row)
        owners = np.searchsorted(self.edges, starts, "right") - 1
        return [Piece(int(self.documents[d]), int(s - self.edges[d]), int(s + n - self.edges[d]))
                for d, s, n in zip(owners, starts, lengths)]

    def __getitem__(self, row: int) -> Row:
        starts, lengths = self._pieces(row)
        owners = np.searchsorted(self.edges, starts, "right") - 1
        ends, gaps = self.edges[owners + 1], None
        if self.pairs is not None:
            gaps = np.zeros(self.length, np.float32)
            gaps[: int(lengths.sum())] = np.repeat(self.pairs[owners, 1] - self.pairs[owners, 2], lengths)
            first = self.pairs[owners, 0].astype(np.int64)
            starts, lengths = (np.stack(each, 1).ravel() for each in
                               ((starts, starts + first), (first, lengths - first)))
            ends = starts + lengths
        used = int(lengths.sum())
        begins = np.cumsum(lengths) - lengths
        inside = np.arange(used) - np.repeat(begins, lengths)  # position within the piece
        place = np.repeat(starts, lengths) + inside  # position in the stream
        tokens = np.full(self.length, self.padding, np.int64)
        tokens[:used] = self.stream[place]
        targets = np.full(self.length, IGNORED, np.int64)
        if self.cross:
            targets[: used - 1] = tokens[1:used]
            last = int(place[-1]) + 1
            if self.packed is None and last < self.stream.size:
                targets[used - 1] = self.stream[last]
            if self.mask is not None:
                counts = np.append(self.mask[place[1:]], self.mask[last] if last < self.stream.size else 0)
                targets[:used][counts == 0] = IGNORED
            return Row(tokens, targets, np.zeros(self.length, np.int32), np.arange(self.length, dtype=np.int32))
        known = place + 1 < np.repeat(ends, lengths)
        if self.mask is not None:
            known[known] = self.mask[place[known] + 1] != 0
        targets[:used][known] = self.stream[place[known] + 1]
        segments = np.full(self.length, len(starts), np.int32)
        segments[:used] = np.repeat(np.arange(len(starts)), lengths)
        positions = np.arange(self.length, dtype=np.int32) - used
        positions[:used] = inside
        return Row(tokens, targets, segments, positions, gaps)


def pack(edges: np.ndarray, length: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Best fit decreasing over documents between `edges` (D+1,): (piece starts (P,), piece lengths (P,), the first
    piece of every row and the end (R+1,)), all int64. Full rows come first."""
    sizes = np.diff(edges)
    full, rest = sizes // length, sizes % length
    ordinal = np.arange(full.sum()) - np.repeat(np.cumsum(full) - full, full)
    full_starts = np.repeat(edges[:-1], full) + ordinal * length
    short = np.flatnonzero(rest)
    order = short[np.argsort(-rest[short], kind="stable")]
    rows = _best_fit(rest[order], length)
    by_row = np.argsort(rows, kind="stable")
    order = order[by_row]
    starts = np.concatenate([full_starts, edges[:-1][order] + full[order] * length])
    lengths = np.concatenate([np.full(full_starts.size, length), rest[order]])
    members = np.concatenate([np.ones(full_starts.size, np.int64), np.bincount(rows)]).astype(np.int64)
    return starts, lengths, np.concatenate([[0], np.cumsum(members)])


def _best_fit(sizes: np.ndarray, length: int) -> np.ndarray:
    """The row of each size (N,), where sizes fall and are under `length`: each goes where it leaves least room.

    Equal sizes go together. The tightest row that takes one stays the tightest while it takes more, so it is filled
    before another is touched, and rows with equal room are filled at once.
    """
    rows = np.empty(len(sizes), np.int64)
    open_rows: dict[int, list[np.ndarray]] = {}  # by the room left
    rooms = 0  # bit r is set where some row has room r: finds the tightest in one step
    made = at = 0
    for size, count in zip(*(a[::-1].tolist() for a in np.unique(sizes, return_counts=True))):
        while count:
            fitting = rooms >> size
            if fitting:
                room = size + (fitting & -fitting).bit_length() - 1
                ids = np.concatenate(open_rows.pop(room))
                rooms ^= 1 << room
            else:
                room, each = length, length // size
                ids = np.arange(made, made + -(-count // each))
                made += ids.size
            each = room // size
            taken = min(count, ids.size * each)
            rows[at : at + taken] = np.repeat(ids, each)[:taken]
            at, count = at + taken, count - taken
            filled, partly = divmod(taken, each)
            for group, left in (
                (ids[:filled], room - each * size), (ids[filled : filled + 1], room - partly * size),
                (ids[filled + 1 :], room),
            ):
                if group.size and left:
                    open_rows.setdefault(left, []).append(group)
                    rooms |= 1 << left
    return rows
