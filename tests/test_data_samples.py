"""The samples of a training over a built corpus: pure functions of their index, in any process and order."""

import json
import shutil
import subprocess
import sys
import time

import numpy as np
import pytest

from byte_tokenizer import Bytes
from intarsia.base.errors import IntarsiaError
from intarsia.data import Change, Corpus, build, mix
from intarsia.data.blend import Blend, Phase

BLEND = Blend(
    phases=(Phase(weights={"web": 6, "code": 3, "math": 1}, until=0.6, name="first"),
            Phase(weights={"web": 1, "code": 1, "sft": 2}, name="last")),
    sources={"sft": {"chat": 1}}, max_epochs=3,
)
OTHER = Blend(phases=(Phase(weights={"code": 1, "chat": 1, "math": 1}),), max_epochs=9)
LENGTH = 64


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    text = tmp_path_factory.mktemp("text")
    for category, count in {"web": 300, "code": 200, "math": 100, "chat": 150}.items():
        rows = [json.dumps({"text": f"{category} {i} " + "lorem ipsum " * (i % 9)}) for i in range(count)]
        (text / f"{category}.jsonl").write_text("\n".join(rows))
    return build(text, Bytes(), tmp_path_factory.mktemp("corpus"), log=lambda _: None)


def columns(batch):
    return [a.tolist() for a in batch]


@pytest.mark.parametrize("packing", ["split", "whole"])
def test_a_sample_is_a_function_of_its_index_alone(folder, packing):
    samples = mix(Corpus(folder), BLEND, 40_000, LENGTH, packing=packing, seed=3)
    whole = samples.batch(0, 600)
    assert whole.tokens.shape == (600, LENGTH) and whole.segments.dtype == np.int32
    fresh = mix(Corpus(folder), BLEND, 40_000, LENGTH, packing=packing, seed=3)
    backwards = [fresh[i].tokens.tolist() for i in reversed(range(600))]
    assert backwards[::-1] == whole.tokens.tolist()
    for ranks in (1, 2, 3):  # ranks together see what one would
        parts = [fresh.batch(120 + rank, 60 // ranks, ranks) for rank in range(ranks)]
        for one, many in zip(samples.batch(120, 60)[:4], zip(*parts)):
            assert np.stack(many, 1).reshape(60, LENGTH).tolist() == one.tolist()
    assert mix(Corpus(folder), BLEND, 40_000, LENGTH, packing=packing, seed=4)[0].tokens.tolist() != backwards[-1]
    program = (  # another process has other hash seeds
        "import sys; sys.path.insert(0, sys.argv[2]); from test_data_samples import *\n"
        f"s = mix(Corpus(sys.argv[1]), BLEND, 40_000, LENGTH, packing={packing!r}, seed=3)\n"
        "print([s[i].tokens.tolist() for i in range(20)])"
    )
    command = [sys.executable, "-c", program, str(folder), __file__.rpartition("/")[0]]
    said = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    assert said.strip() == str(whole.tokens[:20].tolist())


def test_an_epoch_takes_every_row_of_a_source_once_before_any_comes_again(folder):
    samples = mix(Corpus(folder), BLEND, 60_000, LENGTH)
    places = [samples.place(i) for i in range(samples.total)]
    for source, rows in samples.rows.items():
        own = [p for p in places if p.source == source]
        for epoch in range(own[-1].epoch + 1):
            taken = [p.row for p in own if p.epoch == epoch]
            assert len(set(taken)) == len(taken) and (epoch == own[-1].epoch or len(taken) == len(rows))
            assert len(taken) < 5 or taken != sorted(taken)


def test_a_change_of_blend_keeps_what_was_seen(folder):
    """What the new blend reads of a source is what the old one would have read next."""
    corpus = Corpus(folder)
    old = mix(corpus, BLEND, 40_000, LENGTH)
    new = mix(corpus, OTHER, 50_000, LENGTH, start=200, before=[Change(0, BLEND, 40_000)])
    assert [new.place(i) for i in range(200)] == [old.place(i) for i in range(200)]
    for source in ("code", "math", "chat"):
        after = [new.place(i)[1:] for i in range(200, new.total) if new.place(i).source == source]
        alone = mix(corpus, Blend(phases=(Phase(weights={source: 1}),), max_epochs=99), 100_000, LENGTH)
        seen = old.order.consumed(200)[source]
        assert after == [alone.place(i)[1:] for i in range(seen, seen + len(after))] and len(after) > 150
    assert new.order.consumed(new.total)["web"] == old.order.consumed(200)["web"]
    third = mix(corpus, BLEND, 60_000, LENGTH, start=300, before=[Change(0, BLEND, 40_000), Change(200, OTHER, 50_000)])
    assert [third.place(i) for i in range(300)] == [new.place(i) for i in range(300)]
    with pytest.raises(IntarsiaError, match=r"must follow each other.* begin at 5, 3"):
        mix(corpus, BLEND, 40_000, LENGTH, start=3, before=[Change(5, OTHER, 40_000)])


def test_the_documents_of_a_sample_are_the_ones_that_were_built(folder):
    corpus, tokenizer = Corpus(folder), Bytes()
    samples = mix(corpus, BLEND, 40_000, 256, packing="whole")
    for index in range(0, samples.total, 7):
        place, pieces = samples.pieces(index)
        row = samples[index]
        for number, piece in enumerate(pieces):
            text = tokenizer.text(row.tokens[row.segments == number])
            whole = corpus.data("train", place.source).document(piece.document)
            assert text == tokenizer.text(whole[piece.start : piece.stop])
            assert tokenizer.text(whole).startswith(place.source)


def test_the_plan_is_told_and_refused(folder):
    corpus = Corpus(folder)
    samples = mix(corpus, BLEND, 40_000, LENGTH)
    draws = samples.budget()
    assert sum(d.samples for d in draws) == samples.total == 625
    counted = {(d.phase, d.source): 0 for d in draws}
    for i in range(625):
        counted[samples.order.phase(i), samples.place(i).source] += 1
    assert counted == {(d.phase, d.source): d.samples for d in draws}
    with pytest.raises(IntarsiaError, match=r"of this blend read .* times .* max_epochs is 3\. Train on at most about"):
        mix(corpus, BLEND, 400_000, LENGTH)
    for words, options in [
        ("web has .* fewer than one sequence of 20,000", {"length": 20_000}),
        ("not one sample of 50,000", {"length": 50_000}),
        ("no split 'test'", {"split": "test"}),
    ]:
        with pytest.raises(IntarsiaError, match=words):
            mix(corpus, BLEND, 40_000, **({"length": LENGTH} | options))


def test_random_access_is_quick(folder):
    samples = mix(Corpus(folder), replace_epochs(BLEND), 10**12, LENGTH)
    wanted = np.random.default_rng(0).integers(0, samples.total, 300).tolist()
    samples[0]
    took = []
    for index in wanted:
        began = time.process_time()
        samples[index]
        took.append(time.process_time() - began)
    assert sorted(took)[150] < 1e-3


def replace_epochs(blend):
    return blend.model_copy(update={"max_epochs": 1e12})


def test_damage_is_named(folder, tmp_path):
    out = tmp_path / "corpus"
    shutil.copytree(folder, out)
    Corpus(out).verify()
    data = out / "code" / "train.bin"
    whole = data.read_bytes()
    data.write_bytes(whole[:-10])
    with pytest.raises(IntarsiaError, match=r"code/train\.bin does not hold the .* cut short or of another build"):
        mix(Corpus(out), BLEND, 40_000, LENGTH)
    data.write_bytes(whole[:100] + bytes([whole[100] ^ 1]) + whole[101:])
    mix(Corpus(out), BLEND, 40_000, LENGTH)
    with pytest.raises(IntarsiaError, match=r"code/train\.bin is damaged.*SHA-256 differs"):
        Corpus(out).verify()
    for end in (".bin", ".idx"):
        shutil.copy(out / "web" / f"train{end}", out / "code" / f"train{end}")
    with pytest.raises(IntarsiaError, match=r"code/train\.idx counts .* of different builds"):
        mix(Corpus(out), BLEND, 40_000, LENGTH)


def test_the_fingerprint_changes_with_what_the_samples_are(folder):
    corpus = Corpus(folder)
    first = mix(corpus, BLEND, 40_000, LENGTH).fingerprint
    assert mix(corpus, BLEND, 40_000, LENGTH).fingerprint == first
    assert len({first, mix(corpus, BLEND, 40_000, LENGTH, seed=1).fingerprint,
                mix(corpus, BLEND, 40_000, LENGTH, packing="whole").fingerprint,
                mix(corpus, BLEND, 40_000, 32).fingerprint}) == 4
