import subprocess
import sys

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from intarsia.base.errors import IntarsiaError
from intarsia.base.files import write_json
from intarsia.data import Corpus
from intarsia.data.corpus import permute
from intarsia.data.indexed import writer

LENGTH = 8


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Categories of 400, 90, 40 and 5 tokens; token values never repeat, so that a window tells where it is from."""
    out, first, categories = tmp_path_factory.mktemp("corpus"), 0, {}
    for category, count in {"a": 400, "b": 90, "c": 40, "tiny": 5}.items():
        categories[category] = {}
        for split in ("train", "heldout"):
            (out / category).mkdir(exist_ok=True)
            with writer(out / category / split, 65_000) as made:
                for start in range(first, first + count, 10):
                    made.add(range(start, min(start + 10, first + count)))
            np.save(out / category / f"{split}.bytes.npy", np.full(-(-count // 10), 33))
            categories[category][split] = {"tokens": count}
            first += 1000
    write_json(out / "manifest.json", {"fingerprint": "f", "vocab_size": 65_000, "categories": categories})
    return out


def starts(corpus, indices, **options):
    samples = [corpus.sample(i, LENGTH, **options) for i in indices]
    assert all(s.dtype == np.int64 and list(s) == list(range(s[0], s[0] + LENGTH)) for s in samples)
    return [int(s[0]) for s in samples]


def test_a_sample_is_a_function_of_index_and_seed_alone(folder):
    forward = starts(Corpus(folder), range(200))
    corpus = Corpus(folder)
    corpus.sample(7, 5, seed=3)
    assert starts(corpus, reversed(range(200))) == forward[::-1]
    assert starts(corpus, range(200), seed=1) != forward
    assert [int(row[0]) for row in corpus.batch(50, 20, LENGTH)] == forward[50:70]
    assert corpus.batch(50, 20, LENGTH).shape == (20, LENGTH)
    # Another process has other hash seeds; the samples must not notice.
    read = f"c = Corpus({str(folder)!r}); print([int(c.sample(i, {LENGTH})[0]) for i in range(20)])"
    program = f"from intarsia.data import Corpus; {read}"
    said = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True).stdout
    assert said.strip() == str(forward[:20])


@pytest.mark.parametrize(("category", "windows"), [("a", 50), ("b", 11), ("c", 5)])
def test_no_window_repeats_within_an_epoch(folder, category, windows):
    seen = starts(Corpus(folder), range(4 * windows), weights={category: 1})
    epochs = [seen[i : i + windows] for i in range(0, len(seen), windows)]
    for epoch in epochs:
        assert len(set(epoch)) == windows and set(epoch) == set(epochs[0])
    assert len({tuple(epoch) for epoch in epochs}) > 1
    assert epochs[0] != sorted(epochs[0])


@pytest.mark.parametrize("weights", [None, {"a": 1, "b": 1, "c": 1}, {"a": 0.9, "b": 0, "c": 0.1}, {"b": 2, "c": 1}])
def test_categories_take_turns_by_weight_in_every_prefix(folder, weights):
    taken = [start // 2000 for start in starts(Corpus(folder), range(3000), weights=weights)]
    full = weights or {"a": 400, "b": 90, "c": 40}
    total = sum(full.values())
    for number, category in enumerate("abc"):
        counts = np.cumsum(np.array(taken) == number)
        expected = np.arange(1, 3001) * full.get(category, 0) / total
        # Evenly merged turns are within two of the ideal; a cycle's slots are rounded to 1 in 1024 (3 in 3000).
        assert np.abs(counts - expected).max() < 2 + 3 * 3


def test_mixing_leaves_each_category_its_own_order(folder):
    """Over several cycles of turns, what is read of a category is what would be read of it alone."""
    corpus = Corpus(folder)
    mixed = starts(corpus, range(3000))
    for number, category in enumerate("abc"):
        own = [start for start in mixed if start // 2000 == number]
        assert own == starts(corpus, range(len(own)), weights={category: 1})


@given(st.integers(1, 700), st.integers(0, 2**32))
@settings(max_examples=60, deadline=None)
def test_permute_is_a_bijection(size, seed):
    assert sorted(permute(i, size, (seed,)) for i in range(size)) == list(range(size))


def test_permute_mixes():
    """Neighbours land as far apart as in a random order: the mean distance is a third of the range."""
    order = np.array([permute(i, 10_000, ("mix",)) for i in range(10_000)])
    assert abs(np.abs(np.diff(order)).mean() / 10_000 - 1 / 3) < 0.02
    assert abs(np.corrcoef(order, np.arange(10_000))[0, 1]) < 0.05


def test_documents_and_counts(folder):
    corpus = Corpus(folder)
    assert corpus.categories == ["a", "b", "c", "tiny"] and corpus.fingerprint == "f"
    assert corpus.tokens("train") == 535 and corpus.tokens("heldout", "b") == 90
    spread = corpus.documents("train", "a", 4)
    assert [(int(tokens[0]), size) for tokens, size in spread] == [(0, 33), (100, 33), (200, 33), (300, 33)]
    assert len(corpus.documents("heldout", "tiny")) == 1


def test_what_cannot_be_read_gets_a_sentence(folder, tmp_path):
    corpus = Corpus(folder)
    for call, words in [
        (lambda: corpus.sample(0, 401), "no category of the train split .* a with 400"),
        (lambda: corpus.sample(0, LENGTH, weights={"tiny": 1}), "tiny has 5 tokens"),
        (lambda: corpus.sample(0, LENGTH, weights={"d": 1}), "no category 'd'"),
        (lambda: corpus.sample(0, LENGTH, weights={"a": -1}), "not negative"),
        (lambda: corpus.sample(0, LENGTH, weights={"a": 0}), "every weight is zero"),
        (lambda: corpus.sample(-1, LENGTH), "counted from 0"),
        (lambda: corpus.sample(0, 0), "at least 1"),
        (lambda: corpus.tokens("test"), "no split 'test'"),
        (lambda: Corpus(tmp_path), "no built data"),
    ]:
        with pytest.raises(IntarsiaError, match=words):
            call()
