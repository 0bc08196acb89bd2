import hashlib
import json

import numpy as np
import pytest

from byte_tokenizer import Bytes
from intarsia.base.errors import IntarsiaError
from intarsia.data import Corpus, build


def write(path, texts):
    path.write_text("".join(json.dumps({"text": t}) + "\n" for t in texts))
    return path


def texts(category, count):
    return [f"{category} {i} " + "è" * (i % 7) for i in range(count)]


def quiet(_):
    pass


def contents(corpus, split, category, tokenizer):
    return {tokenizer.text(tokens[:-1]): size for tokens, size in corpus.documents(split, category)}


def test_every_document_once_in_one_split_with_its_bytes(tmp_path):
    tokenizer, all_texts = Bytes(), texts("a", 300)
    write(tmp_path / "a.jsonl", all_texts + all_texts[:50])
    corpus = Corpus(build(tmp_path / "a.jsonl", tokenizer, tmp_path / "out", log=quiet))
    train, heldout = (contents(corpus, s, "a", tokenizer) for s in ("train", "heldout"))
    assert not train.keys() & heldout.keys()
    assert train | heldout == {t: len(t.encode()) for t in all_texts}
    assert 1 <= len(heldout) <= 20
    assert all(tokens[-1] == tokenizer.eos_id for tokens, _ in corpus.documents("train", "a"))
    entry = corpus.manifest["categories"]["a"]
    assert entry["train"]["documents"] == len(train) and entry["train"]["bytes"] == sum(train.values())
    assert corpus.tokens("heldout") == sum(heldout.values()) + len(heldout)
    few = corpus.documents("train", "a", 5)
    assert len(few) == 5 and few[0][0].dtype == np.int64


def test_the_split_depends_on_the_text_alone(tmp_path):
    tokenizer = Bytes()
    write(tmp_path / "a.jsonl", texts("a", 400))
    write(tmp_path / "b.jsonl", ["something before", *reversed(texts("a", 400)), *texts("b", 400)])
    a = Corpus(build(tmp_path / "a.jsonl", tokenizer, tmp_path / "out_a", log=quiet))
    b = Corpus(build(tmp_path / "b.jsonl", tokenizer, tmp_path / "out_b", log=quiet))
    held = contents(a, "heldout", "a", tokenizer).keys()
    assert held <= contents(b, "heldout", "b", tokenizer).keys()
    assert contents(a, "train", "a", tokenizer).keys() <= contents(b, "train", "b", tokenizer).keys()


@pytest.mark.parametrize("share", [1e-9, 0.999999])
def test_two_documents_give_one_to_each_split(tmp_path, share):
    write(tmp_path / "a.jsonl", ["one", "two"])
    corpus = Corpus(build(tmp_path / "a.jsonl", Bytes(), tmp_path / "out", heldout=share, log=quiet))
    assert [len(corpus.documents(s, "a")) for s in ("train", "heldout")] == [1, 1]


def test_max_bytes_bounds_each_split_and_encodes_no_more(tmp_path):
    tokenizer = Bytes()
    for c in "ab":
        write(tmp_path / f"{c}.jsonl", texts(c, 500))
    options = {"max_bytes": {"a": 400}, "log": quiet}
    corpus = Corpus(build([tmp_path / "a.jsonl", tmp_path / "b.jsonl"], tokenizer, tmp_path / "out", **options))
    a, b = (corpus.manifest["categories"][c] for c in "ab")
    assert 350 <= a["train"]["bytes"] <= 400 and a["heldout"]["bytes"] <= 400
    assert b["train"]["documents"] + b["heldout"]["documents"] == 500
    assert tokenizer.encoded == 500 + a["train"]["documents"] + a["heldout"]["documents"]
    numbers = [int(text.split()[1]) for text in contents(corpus, "train", "a", tokenizer)]
    assert len(numbers) < 50 and max(numbers) > 250  # from the whole file, not from its beginning
    with pytest.raises(IntarsiaError, match="max_bytes names c"):
        build(tmp_path / "a.jsonl", tokenizer, tmp_path / "out", max_bytes={"c": 1}, log=quiet)


def test_what_max_bytes_keeps_is_decided_text_by_text(tmp_path):
    """A document that stays among many also stays among fewer, in whatever order they come."""
    kept = []
    for name, some in (("few", texts("a", 200)[::-1]), ("many", texts("a", 500))):
        write(tmp_path / f"{name}.jsonl", some)
        out = build(tmp_path / f"{name}.jsonl", Bytes(), tmp_path / name, max_bytes=900, log=quiet)
        kept.append(contents(Corpus(out), "train", name, Bytes()).keys())
    few, many = kept
    assert many & set(texts("a", 200)) <= few and len(few) > len(many & few) > 10
    # The order is that of the hash's second half, the same in every process: those that stay come first in it.
    order = [hashlib.sha256(t.encode()).digest()[8:16] for t in texts("a", 500)]
    stay = [digest for text, digest in zip(texts("a", 500), order) if text in many]
    assert max(stay) < sorted(order)[len(many) + 30]


def test_built_again_only_where_something_changed(tmp_path):
    for c in "ab":
        write(tmp_path / f"{c}.jsonl", texts(c, 60))
    inputs = [tmp_path / "a.jsonl", tmp_path / "b.jsonl"]

    def encoded(**options):
        tokenizer, said = Bytes(options.pop("fingerprint", "bytes")), []
        build(inputs, tokenizer, tmp_path / "out", log=said.append, **options)
        return tokenizer.encoded, Corpus(tmp_path / "out").fingerprint, said

    count, first, _ = encoded()
    assert count == 120
    count, same, said = encoded()
    assert (count, same) == (0, first) and "already built" in said[0]
    write(tmp_path / "b.jsonl", texts("b", 61))
    count, changed, said = encoded()
    assert count == 61 and changed != first and said[0] == "a is already built."
    assert encoded(fingerprint="another")[0] == 121
    assert encoded(heldout=0.5)[0] == 121
    data = tmp_path / "out" / "a" / "train.bin"
    data.write_bytes(data.read_bytes()[:-2])
    assert encoded(heldout=0.5)[0] == 60


def test_an_interrupted_build_is_no_corpus_and_goes_on(tmp_path):
    class Stops(Bytes):
        def encode_batch(self, batch):
            if batch[0].startswith("b"):
                raise KeyboardInterrupt
            return super().encode_batch(batch)

    for c in "ab":
        write(tmp_path / f"{c}.jsonl", texts(c, 60))
    inputs = [tmp_path / "a.jsonl", tmp_path / "b.jsonl"]
    build(tmp_path / "b.jsonl", Bytes(), tmp_path / "out", heldout=0.5, log=quiet)
    with pytest.raises(KeyboardInterrupt):
        build(inputs, Stops(), tmp_path / "out", log=quiet)
    with pytest.raises(IntarsiaError, match="no built data"):
        Corpus(tmp_path / "out")
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == [".pieces", "a", "b"]  # b is still the old one
    tokenizer = Bytes()
    build(inputs, tokenizer, tmp_path / "out", log=quiet)
    assert tokenizer.encoded == 60 and Corpus(tmp_path / "out").categories == ["a", "b"]
    assert not (tmp_path / "out" / ".pieces").exists()


def test_short_text_and_unfit_tokenizer_get_a_sentence(tmp_path):
    write(tmp_path / "a.jsonl", ["short"])
    with pytest.raises(IntarsiaError, match="6 tokens long, shorter than one sequence of 7"):
        build(tmp_path / "a.jsonl", Bytes(), tmp_path / "out", sequence_length=7, log=quiet)
    assert build(tmp_path / "a.jsonl", Bytes(), tmp_path / "out", sequence_length=6, log=quiet)
    with pytest.raises(IntarsiaError, match="its vocabulary has 100 entries"):
        build(tmp_path / "a.jsonl", Bytes(vocab_size=100), tmp_path / "out", log=quiet)
