import itertools
import struct

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from intarsia.base.errors import IntarsiaError
from intarsia.data.indexed import Indexed, best_dtype, merge, writer


@given(st.lists(st.lists(st.integers(0, 65_498), max_size=7), max_size=9), st.sampled_from([65_499, 65_500]))
@settings(max_examples=40, deadline=None)
def test_round_trip(tmp_path_factory, docs, vocab_size):
    stem = tmp_path_factory.mktemp("pair") / "train"
    with writer(stem, vocab_size) as out:
        for doc in docs:
            out.add(doc)
    data = Indexed(stem)
    assert [list(data[i]) for i in range(len(data))] == docs
    assert list(data.tokens) == [t for doc in docs for t in doc]
    assert data.dtype == (np.uint16 if vocab_size < 65_500 else np.int32)
    assert list(data.boundaries) == list(range(len(docs) + 1))


def test_the_bytes_are_megatrons(tmp_path):
    with writer(tmp_path / "t", 1000) as out:
        out.add([1, 2, 3])
        out.add(np.array([999]))
    assert (tmp_path / "t.bin").read_bytes() == struct.pack("<4H", 1, 2, 3, 999)
    assert (tmp_path / "t.idx").read_bytes() == (
        b"MMIDIDX\x00\x00" + struct.pack("<QBQQ", 1, 8, 2, 3) + struct.pack("<2i", 3, 1) + struct.pack("<2q", 0, 6)
        + struct.pack("<3q", 0, 1, 2)
    )
    assert best_dtype(131_072) == np.int32


def read_as_megatron(stem):
    """A reader from the format's description alone: documents as lists of sequences, by offsets as Megatron reads."""
    raw, data = stem.with_suffix(".idx").read_bytes(), stem.with_suffix(".bin").read_bytes()
    assert raw[:9] == b"MMIDIDX\x00\x00"
    version, code, sequences, bounds = struct.unpack("<QBQQ", raw[9:34])
    assert version == 1
    letter = {4: "i", 8: "H"}[code]
    lengths = struct.unpack(f"<{sequences}i", raw[34 : 34 + 4 * sequences])
    places = struct.unpack(f"<{sequences}q", raw[34 + 4 * sequences : 34 + 12 * sequences])
    documents = struct.unpack(f"<{bounds}q", raw[34 + 12 * sequences :])
    assert documents[0] == 0 and documents[-1] == sequences
    read = [list(struct.unpack_from(f"<{n}{letter}", data, at)) for n, at in zip(lengths, places, strict=True)]
    return [read[a:b] for a, b in itertools.pairwise(documents)]


def write_as_megatron(stem, documents, letter):
    """The same the other way, with several sequences in a document."""
    flat = [s for d in documents for s in d]
    size, ends, bounds = struct.calcsize(letter), [0], [0]
    for s in flat:
        ends.append(ends[-1] + size * len(s))
    for d in documents:
        bounds.append(bounds[-1] + len(d))
    stem.with_suffix(".bin").write_bytes(b"".join(struct.pack(f"<{len(s)}{letter}", *s) for s in flat))
    stem.with_suffix(".idx").write_bytes(
        b"MMIDIDX\x00\x00" + struct.pack("<QBQQ", 1, {"i": 4, "H": 8}[letter], len(flat), len(bounds))
        + struct.pack(f"<{len(flat)}i", *map(len, flat)) + struct.pack(f"<{len(flat)}q", *ends[:-1])
        + struct.pack(f"<{len(bounds)}q", *bounds)
    )


@pytest.mark.parametrize(("vocab_size", "letter"), [(60_000, "H"), (131_072, "i")])
def test_megatron_in_both_directions(tmp_path, vocab_size, letter):
    random = np.random.default_rng(0)
    docs = [random.integers(0, vocab_size, n).tolist() for n in random.integers(0, 40, 30)]
    with writer(tmp_path / "ours", vocab_size) as out:
        for doc in docs:
            out.add(doc)
    assert read_as_megatron(tmp_path / "ours") == [[doc] for doc in docs]
    theirs = [docs[i : i + 1 + i % 3] for i in range(0, 30, 5)]  # one to three sequences in a document
    write_as_megatron(tmp_path / "theirs", theirs, letter)
    data = Indexed(tmp_path / "theirs")
    assert [[data[i].tolist() for i in range(a, b)] for a, b in itertools.pairwise(data.boundaries)] == theirs
    count = merge([tmp_path / "ours", tmp_path / "ours"], tmp_path / "twice")
    assert read_as_megatron(tmp_path / "twice") == [[doc] for doc in docs * 2] and count == 2 * sum(map(len, docs))


def test_nothing_appears_when_writing_fails(tmp_path):
    with pytest.raises(IntarsiaError, match="the id 10, but its vocabulary has 10"), writer(tmp_path / "t", 10) as out:
        out.add([9])
        out.add([10])
    assert list(tmp_path.iterdir()) == []


def test_damaged_pairs_are_refused(tmp_path):
    stem = tmp_path / "t"
    with pytest.raises(IntarsiaError, match="there is no"):
        Indexed(stem)
    with writer(stem, 1000) as out:
        out.add([1, 2, 3])
    index, data = stem.with_suffix(".idx"), stem.with_suffix(".bin")
    whole_index, whole_data = index.read_bytes(), data.read_bytes()
    data.write_bytes(whole_data[:-2])
    with pytest.raises(IntarsiaError, match="does not hold the 3 tokens"):
        Indexed(stem)
    data.write_bytes(whole_data)
    for broken, words in [
        (whole_index[:-1], "cut short"),
        (whole_index[:20], "no index"),
        (b"x" + whole_index[1:], "no index"),
        (whole_index[:9] + struct.pack("<Q", 2) + whole_index[17:], "version 2"),
        (whole_index[:17] + b"\x07" + whole_index[18:], "floating-point"),
        (whole_index[:34] + struct.pack("<i", 4) + whole_index[38:], "contradicts itself|does not hold the 4"),
        (whole_index[:38] + struct.pack("<q", 2) + whole_index[46:], "t.idx contradicts itself"),
        (whole_index[:-8] + struct.pack("<q", 2), "t.idx contradicts itself"),
    ]:
        index.write_bytes(broken)
        with pytest.raises(IntarsiaError, match=words):
            Indexed(stem)
    index.write_bytes(whole_index)
    assert list(Indexed(stem)[0]) == [1, 2, 3]
