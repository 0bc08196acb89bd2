"""Rows of documents: nothing lost, nothing twice, every target from the same document."""

import time

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from intarsia.base.errors import IntarsiaError
from intarsia.data.indexed import Indexed, writer
from intarsia.data.packing import IGNORED, Rows, pack

sizes = st.lists(st.integers(0, 40), min_size=1, max_size=60)


def stored(folder, counts):
    """Documents whose tokens say where they are from: 100 * document + position."""
    docs = [[100 * d + p for p in range(n)] for d, n in enumerate(counts)]
    with writer(folder / "t", 65_000) as out:
        for doc in docs:
            out.add(doc)
    return Indexed(folder / "t"), docs


def expected(pieces, docs, length, padding):
    """The row, written out by a plain loop from its pieces."""
    tokens, targets, segments, positions = [], [], [], []
    for number, piece in enumerate(pieces):
        doc = docs[piece.document]
        for at in range(piece.start, piece.stop):
            tokens.append(doc[at])
            targets.append(doc[at + 1] if at + 1 < len(doc) else IGNORED)
            segments.append(number)
            positions.append(at - piece.start)
    for extra in range(length - len(tokens)):
        tokens.append(padding)
        targets.append(IGNORED)
        segments.append(len(pieces))
        positions.append(extra)
    return tokens, targets, segments, positions


@pytest.mark.parametrize("packing", ["split", "whole"])
@given(counts=sizes, length=st.integers(1, 24))
@settings(max_examples=60, deadline=None)
def test_rows_hold_what_their_pieces_say_and_every_token_once(tmp_path_factory, packing, counts, length):
    data, docs = stored(tmp_path_factory.mktemp("rows"), counts)
    rows = Rows(data, length, packing, padding=7)
    seen = []
    for number in range(len(rows)):
        row, pieces = rows[number], rows.pieces(number)
        assert [a.tolist() for a in (row.tokens, row.targets, row.segments, row.positions)] == list(
            expected(pieces, docs, length, 7)
        )
        assert [a.dtype for a in (row.tokens, row.targets, row.segments, row.positions)] == [
            np.int64, np.int64, np.int32, np.int32,
        ]
        seen += [(p.document, at) for p in pieces for at in range(p.start, p.stop)]
    everything = [(d, at) for d, doc in enumerate(docs) for at in range(len(doc))]
    if packing == "split":  # in order, but for a rest shorter than a row
        assert seen == everything[: len(everything) // length * length]
    else:
        assert sorted(seen) == everything
        cut = {p.document for n in range(len(rows)) for p in rows.pieces(n) if p.stop - p.start < len(docs[p.document])}
        assert all(len(docs[d]) > length for d in cut)


@given(st.lists(st.integers(1, 30), min_size=1, max_size=80), st.integers(2, 31))
@settings(max_examples=80, deadline=None)
def test_packing_is_best_fit_decreasing(counts, length):
    """The same number of rows as the plain algorithm, one document after the other."""
    plain: list[int] = []  # room left
    for size in sorted((n % length for n in counts if n % length), reverse=True):
        fitting = [room for room in plain if room >= size]
        if fitting:
            plain[plain.index(min(fitting))] -= size
        else:
            plain.append(length - size)
    edges = np.concatenate([[0], np.cumsum(counts)])
    _, lengths, first = pack(edges, length)
    used = np.add.reduceat(lengths, first[:-1])
    assert used.max() <= length and used.sum() == sum(counts)
    assert sorted(used[sum(n // length for n in counts) :]) == sorted(length - room for room in plain)


def test_crossing_has_no_boundaries(tmp_path):
    data, docs = stored(tmp_path, [5, 9, 3, 14, 2])
    stream = [token for doc in docs for token in doc]
    rows = Rows(data, 8, "split", cross=True)
    for number in range(len(rows)):
        row = rows[number]
        after = stream[number * 8 + 1 : number * 8 + 9]
        assert row.targets.tolist() == after + [IGNORED] * (8 - len(after))
        assert not row.segments.any() and row.positions.tolist() == list(range(8))
    packed = Rows(data, 16, "whole", cross=True)
    for number in range(len(packed)):
        row, used = packed[number], sum(p.stop - p.start for p in packed.pieces(number))
        assert row.targets.tolist() == row.tokens[1:used].tolist() + [IGNORED] * (17 - used)
        assert not row.segments.any()


def test_documents_of_several_sequences_stay_one(tmp_path):
    """As Megatron writes them: boundaries count sequences."""
    data, _ = stored(tmp_path, [4, 4, 4, 0, 4])
    data.boundaries = np.array([0, 2, 2, 3, 5])  # documents of 8, 0, 4 and 4 tokens
    rows = Rows(data, 16)
    assert rows[0].segments.tolist() == [0] * 8 + [1] * 4 + [2] * 4
    assert [(p.document, p.start, p.stop) for p in rows.pieces(0)] == [(0, 0, 8), (2, 0, 4), (3, 0, 4)]


def test_a_million_documents_are_packed_at_once_and_tightly():
    edges = np.concatenate([[0], np.cumsum(np.random.default_rng(0).lognormal(6, 1.2, 1_000_000).astype(np.int64) + 1)])
    began = time.process_time()
    _, lengths, first = pack(edges, 8192)
    assert time.process_time() - began < 10
    assert lengths.sum() / ((len(first) - 1) * 8192) > 0.995


def test_what_is_not_possible_gets_a_sentence(tmp_path):
    data, _ = stored(tmp_path, [5])
    with pytest.raises(IntarsiaError, match="no packing 'best': it is split or whole"):
        Rows(data, 4, "best")
    with pytest.raises(IntarsiaError, match="at least 1"):
        Rows(data, 0)
