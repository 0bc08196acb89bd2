"""Tokens that others made become a corpus, and what we make is theirs."""

import itertools

import numpy as np
import pytest

from byte_tokenizer import Bytes
from intarsia.base.errors import IntarsiaError
from intarsia.data import Corpus
from intarsia.data.adopt import adopt
from test_data_indexed import read_as_megatron, write_as_megatron


def quiet(_):
    pass


def test_megatrons_pairs_become_a_corpus_and_go_back(tmp_path):
    tokenizer = Bytes()
    texts = [[f"document {d}, sentence {s}, è. " for s in range(1 + d % 3)] for d in range(60)]
    made = [[tokenizer.encode_batch([s])[0] for s in document] for document in texts]
    for document in made:
        document[-1] = [*document[-1], tokenizer.eos_id]
    write_as_megatron(tmp_path / "theirs", [*made, *made[:5]], "H")  # five come again
    out = adopt({"web": tmp_path / "theirs"}, tokenizer, tmp_path / "out", heldout=0.1, log=quiet)
    corpus = Corpus(out)
    found = {tokenizer.text(tokens[:-1]): size for split in ("train", "heldout")
             for tokens, size in corpus.documents(split, "web")}
    assert found == {"".join(t): len("".join(t).encode()) for t in texts}
    entry = corpus.manifest["categories"]["web"]
    assert entry["duplicates"] == 5 and 1 <= entry["heldout"]["documents"] <= 15
    train = [list(itertools.chain(*d)) for d in read_as_megatron(out / "web" / "train")]
    assert len(train) == entry["train"]["documents"] and all(
        any(ids == list(itertools.chain(*document)) for document in made) for ids in train
    )
    corpus.verify()
    said = []
    adopt({"web": tmp_path / "theirs"}, tokenizer, out, heldout=0.1, log=said.append)
    assert said == ["web is already built."] and Corpus(out).manifest == corpus.manifest


def test_what_does_not_fit_gets_a_sentence(tmp_path):
    write_as_megatron(tmp_path / "t", [[[1, 2, 300]]], "H")
    with pytest.raises(IntarsiaError, match="the id 300, but its vocabulary has 257"):
        adopt({"web": tmp_path / "t"}, Bytes(), tmp_path / "out", log=quiet)
    write_as_megatron(tmp_path / "t", [[[]]], "H")
    with pytest.raises(IntarsiaError, match="web has no documents"):
        adopt({"web": tmp_path / "t"}, Bytes(), tmp_path / "out", log=quiet)
    (tmp_path / "t.idx").write_bytes(np.arange(9).tobytes())
    with pytest.raises(IntarsiaError, match=r"t\.idx is no index of tokens"):
        adopt({"web": tmp_path / "t"}, Bytes(), tmp_path / "out", log=quiet)
    assert not list(tmp_path.glob("out/*"))
