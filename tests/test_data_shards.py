"""Building in pieces: many processes, kills, full disks, filters."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from byte_tokenizer import Bytes
from intarsia.base.errors import IntarsiaError
from intarsia.data import Corpus, build, shards
from intarsia.data.filters import GOPHER, Filters, parse_filters
from intarsia.data.sources import sources


def write(path, texts):
    path.write_text("".join(json.dumps({"text": t}) + "\n" for t in texts))
    return path


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    """Two categories of several pieces, with repetitions, in files and folders."""
    folder = tmp_path_factory.mktemp("text")
    write(folder / "web.jsonl", [f"page {i % 900} " + "word " * (i % 90) for i in range(1200)])
    (folder / "notes").mkdir()
    for i in range(40):
        (folder / "notes" / f"{i:02}.txt").write_text(f"note {i} " * 100)
    return sorted(folder.iterdir())


@pytest.fixture
def small_pieces(monkeypatch):
    monkeypatch.setattr(shards, "PIECE_BYTES", 20_000)


def files(out):
    kept = (path for path in sorted(out.rglob("*")) if path.suffix in (".bin", ".idx", ".npy"))
    return {str(path.relative_to(out)): path.read_bytes() for path in kept}


def quiet(_):
    pass


def test_pieces_and_processes_change_nothing(text, tmp_path, monkeypatch):
    one = build(text, Bytes(), tmp_path / "one", log=quiet)
    monkeypatch.setattr(shards, "PIECE_BYTES", 20_000)
    assert len(shards.pieces(sources(text))) > 10
    tokenizer = Bytes()
    many = build(text, tokenizer, tmp_path / "many", workers=2, log=quiet)
    assert files(one) == files(many) and len(files(one)) == 12 and tokenizer.encoded == 0  # others encoded
    assert Corpus(one).fingerprint == Corpus(many).fingerprint
    entry = Corpus(many).manifest["categories"]["web"]
    assert entry["documents_read"] == 1200 and entry["duplicates"] > 0 and entry["licence"] == "not stated"
    assert entry["train"]["documents"] + entry["heldout"]["documents"] + entry["duplicates"] == 1200


KILLED = """
import sys
from byte_tokenizer import Bytes
from intarsia.data import build, shards
shards.PIECE_BYTES = 20_000
if __name__ == "__main__":
    build(sys.argv[2:], Bytes(pause=0.15), sys.argv[1], workers=2, log=print)
"""


def test_killed_anywhere_a_build_goes_on_and_redoes_no_finished_shard(text, tmp_path, small_pieces):
    out, script = tmp_path / "out", tmp_path / "killed.py"
    script.write_text(KILLED)
    path = os.pathsep.join((str(Path(__file__).parent), os.environ.get("PYTHONPATH", "")))
    for wanted in (1, 5):
        process = subprocess.Popen([sys.executable, script, out, *text], env=os.environ | {"PYTHONPATH": path})
        while len(finished := list(out.glob(".pieces/*/*.shard"))) < wanted and process.poll() is None:
            time.sleep(0.02)
        process.send_signal(signal.SIGKILL)
        process.wait()
    time.sleep(0.5)  # the workers end with their parent
    left = list(out.glob(".pieces/*/*.shard"))
    time.sleep(0.5)
    assert process.returncode == -signal.SIGKILL and list(out.glob(".pieces/*/*.shard")) == left
    done = sum(len(np.load(shard / f"{s}.bytes.npy")) for shard in left for s in ("train", "heldout"))
    done += sum(len(np.load(sizes)) for sizes in out.glob("[nw]*/*.bytes.npy"))  # of a whole category
    tokenizer = Bytes()
    build(text, tokenizer, out, log=quiet)
    assert len(finished) >= 5 and tokenizer.encoded == 940 - done
    assert files(out) == files(build(text, Bytes(), tmp_path / "fresh", log=quiet))
    assert not [p for p in out.rglob("*") if p.name.startswith(".")]


FULL = """
import resource, sys
from byte_tokenizer import Bytes
from intarsia.data import build
resource.setrlimit(resource.RLIMIT_FSIZE, (30_000, 30_000))
try:
    build(sys.argv[2:], Bytes(), sys.argv[1], log=print)
except Exception as error:
    print(type(error).__name__, error)
"""


def test_a_disk_that_refuses_gets_a_sentence_and_costs_nothing(text, tmp_path):
    path = os.pathsep.join((str(Path(__file__).parent), os.environ.get("PYTHONPATH", "")))
    said = subprocess.run([sys.executable, "-c", FULL, tmp_path / "out", *text], env=os.environ | {"PYTHONPATH": path},
                          capture_output=True, text=True).stdout
    assert "IntarsiaError could not write" in said and "free some space and run the same command again" in said
    assert not (tmp_path / "out" / "manifest.json").exists()
    assert not [p for p in (tmp_path / "out").rglob("*") if p.suffix == ".tmp"]
    build(text, Bytes(), tmp_path / "out", log=quiet)
    assert files(tmp_path / "out") == files(build(text, Bytes(), tmp_path / "fresh", log=quiet))


@pytest.mark.parametrize("documents", [2, 4])
def test_a_file_that_changes_between_the_readings_is_named(tmp_path, documents):
    found = sources(write(tmp_path / "web.jsonl", ["one", "two", "three"]))
    task = shards.Encode(tuple(found), "text", None, np.zeros(documents, np.int8), 11, tmp_path / "0.shard")
    with pytest.raises(IntarsiaError, match=r"web\.jsonl changed while it was read"):
        task.run(Bytes(), quiet)
    assert [p.name for p in tmp_path.iterdir()] == ["web.jsonl"]


def test_licences_are_kept_in_the_manifest(text, tmp_path):
    out = build(text, Bytes(), tmp_path / "out", licences={"web": "CC BY 4.0"}, log=quiet)
    tokenizer = Bytes()
    build(text, tokenizer, out, licences={"notes": "ours"}, log=quiet)
    stated = {c: entry["licence"] for c, entry in Corpus(out).manifest["categories"].items()}
    assert stated == {"web": "CC BY 4.0", "notes": "ours"} and tokenizer.encoded == 0
    with pytest.raises(IntarsiaError, match="licences names wiki, which is no category"):
        build(text, Bytes(), out, licences={"wiki": "x"}, log=quiet)


PROSE = "The question of whether the ship would reach the harbour before the storm was on every mind that night. " * 6


@pytest.mark.parametrize(
    ("rule", "text"),
    [
        ("min_words", "Too short to learn from."),
        ("max_words", "the and " + PROSE * 900),
        ("min_word_length", "a b c of d the " * 30),
        ("max_word_length", "incomprehensibilities counterrevolutionaries of the " * 30),
        ("max_symbols", PROSE + " # " * 40),
        ("max_bullets", "\n".join(f"- {PROSE[:90]} {i}" for i in range(9))),
        ("max_ellipses", "\n".join(f"{PROSE[:90]} {i}..." for i in range(9))),
        ("min_letters", PROSE + " 12,345" * 60),
        ("min_stop_words", "Schiffe fahren abends langsam heim, wenn Stürme drohen, sagt man hier. " * 9),
        ("max_repeated_lines", "\n".join([PROSE[:90]] * 9)),
    ],
)
def test_each_filter_finds_what_it_is_for(rule, text):
    assert GOPHER.broken(text) == rule and GOPHER.broken(PROSE) is None and Filters().broken(text) is None
    alone = Filters(**{rule: getattr(GOPHER, rule)})
    assert alone.broken(text) == rule and alone.broken(PROSE) is None


def test_filters_drop_documents_and_are_counted(tmp_path):
    write(tmp_path / "web.jsonl", [PROSE, PROSE, "short", "shorter still", PROSE + "And more of the same."])
    out = build(tmp_path / "web.jsonl", Bytes(), tmp_path / "out", filters=parse_filters(["min_words=4"]), log=quiet)
    entry = Corpus(out).manifest["categories"]["web"]
    assert entry["filtered"] == {"min_words": 2} and (entry["documents_read"], entry["duplicates"]) == (5, 1)
    assert entry["train"]["documents"] + entry["heldout"]["documents"] == 2
    with pytest.raises(IntarsiaError, match="the filters leave nothing of web: all of its 5 documents break min_words"):
        build(tmp_path / "web.jsonl", Bytes(), out, filters=Filters(min_words=10_000), log=quiet)
    with pytest.raises(IntarsiaError, match="Did you mean 'min_words'"):
        parse_filters(["gopher", "min_word=3"])
    with pytest.raises(IntarsiaError, match="needs a number, not 'many'"):
        parse_filters(["min_words=many"])
    assert parse_filters(["gopher", "min_words=5"]).min_words == 5
