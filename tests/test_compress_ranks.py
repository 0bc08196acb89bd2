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


def test_rounds_and_coupled_pairs_are_shared_too(tmp_path):
    parent, data = make_parent(tmp_path / "parent"), make_text(tmp_path / "text")
    recipe = make_recipe(tmp_path / "tiny.toml", data, "params = 110_000")
    settings = ("rounds=2", "library.tokens=256", "library.refit_tokens=1024", "library.coupled=512", "cost.repeats=1",
                "cost.calibration=0", "tournament.finalists=2", "tournament.tokens=256", "distill.tokens=512",
                "distill.evaluations=1", "evaluate.documents=2")  # fmt: skip
    words = (parent, "--recipe", recipe, *(word for setting in settings for word in ("--set", setting)))
    status, _, err = compress(*words, "--out", tmp_path / "alone")
    assert status == 0, err
    both = torchrun(2, ["compress", *words, "--out", tmp_path / "both"])
    assert both.returncode == 0, both.stdout + both.stderr
    for part in ("rounds/1", "."):
        one, other = (tmp_path / name / part for name in ("alone", "both"))
        figures, shared = (read_json(run / "summary.json") for run in (one, other))
        assert figures["kl"] == shared["kl"] and figures["tournament"] == shared["tournament"]
        assert (one / "child/model.safetensors").read_bytes() == (other / "child/model.safetensors").read_bytes()
        rows = [sorted(pair_losses(run / "stages" / "coupled" / f"losses.{n}.jsonl") for n in ranks)
                for run, ranks in ((one, [0]), (other, [0, 1]))]  # fmt: skip
        assert sorted(rows[0][0]) == sorted(rows[1][0] + rows[1][1]) and min(map(len, rows[1])) > 0


def pair_losses(file):
    """(layer, pair, before, after) of every coupled pair that a rank has trained."""
    return [(row["layer"], name, *pair) for row in read_jsonl(file) for name, pair in row["losses"].items()]
