"""`intarsia data` from end to end: a trained tokenizer, real text, a plan, the documents of a step."""

import json
import re
import sysconfig
from pathlib import Path

import pytest
from tokenizers import Tokenizer as Backend
from tokenizers import decoders, models, pre_tokenizers, trainers

from intarsia.cli import main
from intarsia.data import Corpus
from intarsia.formats import Tokenizer

FILES = ("json/decoder.py", "textwrap.py", "string.py", "fractions.py", "heapq.py", "bisect.py", "LICENSE.txt")
BLEND = """
max_epochs = 3
[[phases]]
until = 0.5
weights = { code = 3, math = 1, web = 4 }
[[phases]]
weights = { code = 1, math = 1, web = 0 }
[sources]
web = []
math = ["numbers"]
"""


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    place = tmp_path_factory.mktemp("cli")
    library = Path(sysconfig.get_path("stdlib"))
    texts = {name: (library / name).read_text() for name in FILES if (library / name).exists()}
    backend = Backend(models.BPE())
    backend.pre_tokenizer, backend.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    backend.train_from_iterator(texts.values(), trainers.BpeTrainer(
        vocab_size=1000, initial_alphabet=alphabet, special_tokens=["<|end|>"], show_progress=False))
    Tokenizer(backend, {"eos_token": "<|end|>"}).save(place / "tokenizer")
    with open(place / "part-0.jsonl", "w") as out:
        for text in texts.values():
            out.writelines(json.dumps({"text": part}) + "\n" for part in text.split("\n\n\n"))
    with open(place / "numbers.jsonl", "w") as out:
        out.writelines(json.dumps({"text": f"{a} times {b} is {a * b}."}) + "\n" for a in range(40) for b in range(20))
    (place / "blend.toml").write_text(BLEND)
    run = ["data", "build", f"code={place / 'part-0.jsonl'}", f"numbers={place / 'numbers.jsonl'}", "--tokenizer",
           str(place / "tokenizer"), "--out", str(place / "out"), "--licence", "code=PSF-2.0"]
    assert main(run) == 0
    return place


def said(capsys, *command):
    status = main([str(c) for c in command])
    got = capsys.readouterr()
    return status, got.out, got.err


def test_a_corpus_a_plan_and_its_refusal(corpus, capsys):
    status, out, _ = said(capsys, "data", "show", corpus / "out")
    assert status == 0 and "code" in out and "numbers" in out
    assert Corpus(corpus / "out").manifest["categories"]["code"]["licence"] == "PSF-2.0"
    mixing = ("--blend", corpus / "blend.toml", "--length", 128)
    status, out, _ = said(capsys, "data", "plan", corpus / "out", *mixing, "--tokens", "10K")
    assert status == 0 and "78 samples of 128 tokens" in out and "left out, " in out and "web" in out
    assert re.search(r"code\s.*\s0\.\d\d\s*\n", out)
    status, out, err = said(capsys, "data", "plan", corpus / "out", *mixing, "--tokens", "10M")
    assert status == 2 and "max_epochs is 3" in err and "epochs" in out
    most = re.search(r"at most about ([\d,]+) tokens", err)[1].replace(",", "")
    assert said(capsys, "data", "plan", corpus / "out", *mixing, "--tokens", most)[0] == 0
    assert said(capsys, "data", "plan", corpus / "out", *mixing, "--tokens", int(1.1 * int(most)))[0] == 2
    status, _, err = said(capsys, "data", "plan", corpus / "out", *mixing, "--tokens", "10M", "--set", "max_epochs=1e6")
    assert status == 0
    status, _, err = said(capsys, "data", "plan", corpus / "out", "--blend", "nemotron", "--tokens", "1M")
    assert status == 2 and "Did you mean 'nemotron-h'?" in err


@pytest.mark.parametrize("packing", ["split", "whole"])
def test_the_very_documents_of_a_step(corpus, capsys, packing):
    documents = {json.loads(line)["text"] for name in ("part-0", "numbers")
                 for line in (corpus / f"{name}.jsonl").read_text().splitlines()}
    command = ("data", "show", corpus / "out", "--blend", corpus / "blend.toml", "--tokens", "10K", "--length", 128,
               "--packing", packing, "--step", 9, "--batch", 4)
    status, out, _ = said(capsys, *command)
    assert status == 0 and re.findall(r"=== sample (\d+)", out) == ["36", "37", "38", "39"]
    shown = re.split(r"\n?(?:===|---) .*\n", out)
    parts = [part.removesuffix("\n").removesuffix("<|end|>") for part in shown if part.strip()]
    assert len(parts) > 8 and all(any(part in text for text in documents) for part in parts)
    if packing == "whole":
        assert sum(part in documents for part in parts) > len(parts) / 2
    status, _, err = said(capsys, "data", "show", corpus / "out", "--step", 3)
    assert status == 2 and "add --blend and --tokens" in err


def test_check_names_the_damaged_file(corpus, capsys):
    assert said(capsys, "data", "check", corpus / "out")[0] == 0
    data = corpus / "out" / "numbers" / "heldout.bin"
    whole = data.read_bytes()
    data.write_bytes(bytes([whole[0] ^ 1]) + whole[1:])
    status, _, err = said(capsys, "data", "check", corpus / "out")
    data.write_bytes(whole)
    assert status == 2 and "heldout.bin is damaged" in err


def test_import_takes_what_build_made(corpus, capsys):
    command = ("data", "import", f"again={corpus / 'out' / 'code' / 'train.bin'}", "--tokenizer", corpus / "tokenizer",
               "--out", corpus / "imported", "--heldout", 0)
    assert said(capsys, *command)[0] == 0
    old, new = Corpus(corpus / "out"), Corpus(corpus / "imported")
    assert (old.data("train", "code").tokens == new.data("train", "again").tokens).all()
    sizes = [[size for _, size in c.documents("train", name)] for c, name in ((old, "code"), (new, "again"))]
    assert sizes[0] == sizes[1]


def test_mistakes_get_a_sentence(corpus, capsys):
    build = ("data", "build", "--tokenizer", corpus / "tokenizer", "--out", corpus / "other")
    for extra, words in [
        ((f"code={corpus / 'part-0.jsonl'}", corpus / "numbers.jsonl"), "name the category of every input or of none"),
        ((corpus / "part-0.jsonl", "--filter", "min_word=3"), "Did you mean 'min_words'"),
        ((corpus / "part-0.jsonl", "--licence", "PSF"), "write CATEGORY=TEXT"),
        ((corpus / "part-0.jsonl", "--workers", "0"), "at least 1"),
    ]:
        try:
            status, _, err = said(capsys, *build, *extra)
        except SystemExit as stop:
            status, err = stop.code, capsys.readouterr().err
        assert status == 2 and words in err
