import struct

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from intarsia.base.errors import IntarsiaError
from intarsia.data.indexed import Indexed, best_dtype, writer


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
    ]:
        index.write_bytes(broken)
        with pytest.raises(IntarsiaError, match=words):
            Indexed(stem)
    index.write_bytes(whole_index)
    assert list(Indexed(stem)[0]) == [1, 2, 3]
