"""A compression shared by the ranks that torchrun starts: what one process finds, and what lost ranks leave."""

import os
import signal
import time

import pytest

from intarsia.base.files import read_json, read_jsonl
from intarsia.compress.library import stored_losses
from tiny_compression import compress, make_parent, make_recipe, make_text
from tiny_training import start_ranks, torchrun


def found(run):
    """What library, scores and tournament came to; and which ranks measured."""
    stages = run / "stages"
    rows = {file.name: read_jsonl(file) for file in sorted((stages / "score").glob("scores.*.jsonl"))}
    scores = sorted((r["layer"], r["attention"], r["ffn"], r["kl"]) for each in rows.values() for r in each)
    return stored_losses(stages / "library"), scores, list(rows)


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("ranks")
    parent, data = make_parent(folder / "parent"), make_text(folder / "text")
    # A target that no timing decides, so that all runs choose alike.
    recipe = make_recipe(folder / "tiny.toml", data, "params = 150_000")
    words = (parent, "--recipe", recipe, "--set", "tournament.finalists=2")
    status, _, err = compress(*words, "--out", folder / "alone")
    assert status == 0, err
    both = torchrun(2, ["compress", *words, "--out", folder / "both"])
    said = both.stdout + both.stderr
    assert both.returncode == 0, said
    lost = start_ranks(2, ["compress", *words, "--out", folder / "lost"])
    parts = folder / "lost" / "stages" / "score"
    end = time.monotonic() + 200
    while len(list(parts.glob("scores.*.jsonl"))) < 2 and lost.poll() is None and time.monotonic() < end:
        time.sleep(0.01)
    os.killpg(lost.pid, signal.SIGKILL)
    lost.communicate()
    killed = {file.name: len(read_jsonl(file)) for file in parts.glob("scores.*.jsonl")}
    status, _, err = compress(*words, "--out", folder / "lost")
    assert status == 0, err
    return folder, said, killed


def test_ranks_find_what_one_process_finds(runs):
    folder, said, _ = runs
    alone, both = found(folder / "alone"), found(folder / "both")
    assert alone[:2] == both[:2]
    assert (alone[2], both[2]) == (["scores.0.jsonl"], ["scores.0.jsonl", "scores.1.jsonl"])
    one, other = (read_json(folder / name / "summary.json") for name in ("alone", "both"))
    assert one["kl"] == other["kl"] and one["tournament"] == other["tournament"]
    names = [path.name for path in sorted((folder / "both" / "stages" / "tournament").glob("finalists.*"))]
    assert names == ["finalists.0.jsonl", "finalists.1.jsonl"]
    assert said.count("replace-one-site scores: done") <= 1  # only the first rank speaks


def test_what_lost_ranks_left_is_taken_up(runs):
    folder, _, killed = runs
    assert len(killed) == 2
    rows = {name: read_jsonl(folder / "lost" / "stages" / "score" / name) for name in killed}
    assert all(len(rows[name]) >= count for name, count in killed.items())
    assert found(folder / "lost")[:2] == found(folder / "alone")[:2]
    keys = [(r["layer"], r["attention"], r["ffn"]) for each in rows.values() for r in each]
    assert len(keys) == len(set(keys))  # nothing was measured twice
    assert read_json(folder / "lost" / "summary.json")["kl"] == read_json(folder / "alone" / "summary.json")["kl"]
