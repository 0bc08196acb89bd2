"""A tiny Nemotron-H by both methods over the same run folder: Mamba-2 options, MiniPuzzle, its table, its child."""

import json
import shutil
from types import SimpleNamespace

import pytest
import torch

import intarsia
from intarsia.arch import FeedForward, Mamba2, nemotron_h
from intarsia.compress.minipuzzle import shortlist, strength
from tiny_compression import VOCABULARY, compress, make_parent, make_recipe, make_text

ARCH = nemotron_h(
    9, 64, attentions=1, mamba_head_dim=4, head_dim=16, state_size=16, num_groups=2, vocab_size=VOCABULARY,
    intermediate_size=192, max_positions=256,
)  # fmt: skip
SETTINGS = (
    "options.linear=false", "options.ffn_widths=[0.5]", "options.mamba_heads=[0.5]", "cost.repeats=1",
    "cost.calibration=0", "library.tokens=512", "distill.tokens=256", "distill.evaluations=1",
    "evaluate.tokens=256", "tournament.tokens=128", "minipuzzle.shortlist=4", "minipuzzle.removals=2",
    "minipuzzle.candidates=12",
)  # fmt: skip


MINI = ("--method", "minipuzzle", "--tournament", "3")


def run(folder, name, *words):
    settings = [word for setting in SETTINGS for word in ("--set", setting)]
    memory = ("--memory", "1.1MB")
    status, out, err = compress(folder / "parent", "--recipe", folder / "tiny.toml", "--out", folder / name, *settings,
                                *memory, *words)  # fmt: skip
    assert status == 0, err
    text = (folder / name / "summary.json").read_text()
    return SimpleNamespace(out=out, run=folder / name, summary=json.loads(text, parse_constant=pytest.fail))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("minipuzzle")
    make_parent(folder / "parent", ARCH)
    make_recipe(folder / "tiny.toml", make_text(folder / "text"))
    return folder


@pytest.fixture(scope="module")
def puzzle(folder):
    return run(folder, "puzzle", "--tournament", "1")


@pytest.fixture(scope="module")
def mini(folder, puzzle):
    shutil.copytree(puzzle.run, folder / "mini")
    return run(folder, "mini", *MINI)


def test_one_finalist_is_no_tournament(puzzle):
    assert "tournament" not in puzzle.summary and not (puzzle.run / "stages" / "tournament").exists()


def test_puzzle_narrows_mamba_blocks(puzzle):
    rows = [row["option"] for row in puzzle.summary["options"]]
    assert {"mamba2 32x4 n16", "mamba2 16x4 n16", "mamba2 32x4 n8", "mamba2 16x4 n8", "none"} <= set(rows)
    for row in puzzle.summary["options"]:
        if row["option"].startswith("mamba2 16x4"):
            assert 0 < row["loss_after"] < row["loss_before"] and row["kl"] > 0 and row["prefill_seconds"] > 0


def test_rankings_were_held_against_other_orders(puzzle):
    gates = json.loads((puzzle.run / "stages" / "library" / "gates.json").read_text())
    assert [gate["axis"] for gate in gates] == ["ffn channels", "mamba heads", "mamba channels", "mamba states"]
    assert all(gate["sorted"] < 1e-4 for gate in gates)


@pytest.mark.parametrize("which", ["puzzle", "mini"])
def test_the_child_is_a_nemotron_h(which, request):
    finished = request.getfixturevalue(which)
    config = json.loads((finished.run / "child" / "config.json").read_text())
    assert config["model_type"] in ("nemotron_h", "nemotron_h_puzzle")
    model, tokenizer = intarsia.load(finished.run / "child")
    assert finished.summary["memory_bytes"]["child"] <= 1.1e6 < finished.summary["memory_bytes"]["parent"]
    ids = torch.arange(24)[None] % VOCABULARY
    cache = intarsia.model.Cache(model.arch, 1, 24, model.dtype, model.device)
    with torch.no_grad():
        steps = torch.cat([model(ids[:, n : n + 1], cache) for n in range(24)], 1)
        assert (steps - model(ids)).abs().max() < 1e-4
    assert len(list(intarsia.generate(model, tokenizer.encode("def parse(text):"), 8, stop_ids=()))) == 8


def test_minipuzzle_takes_the_library_that_is_there(mini):
    for stage in ("cost", "library", "score"):
        assert f"{stage}: already done" in mini.out


def test_a_uniform_child(mini):
    arch = intarsia.load(mini.run / "child")[0].arch
    for kind in (Mamba2, FeedForward):
        assert len({block for block in arch.blocks if isinstance(block, kind)}) == 1


def test_the_table_of_every_step(mini):
    facts = mini.summary["minipuzzle"]
    assert sorted(index for index, _ in facts["damage"]) == list(range(9)) and facts["candidates"] > 1
    table = {row["name"]: row for row in facts["shortlist"]}
    assert len(table) == min(4, facts["candidates"])
    held = mini.summary["tournament"]
    played = {row["name"]: row for row in held["finalists"]}
    assert set(played) <= set(table) and len(played) == min(3, len(table)) and held["by"] == "average"
    best = max(played, key=lambda name: strength(played[name]["after"]))
    assert strength(played[held["chosen"]]["after"]) == strength(played[best]["after"])
    assert all(played[name]["before"] == table[name]["before"] for name in played)
    for row in table.values():
        assert 0 <= row["accuracy"] <= 1 and row["before"]["average"] == row["before"]["agreement"]


def test_again_does_nothing_again(folder, mini):
    again = run(folder, "mini", *MINI)
    for stage in ("depth", "grid", "shortlist", "tournament", "distill-child"):
        assert f"{stage}: already done" in again.out
    assert again.summary["minipuzzle"] == mini.summary["minipuzzle"]


def test_candidates_are_judged_as_mended(folder, mini):
    shutil.copytree(mini.run, folder / "assembled")
    assembled = run(folder, "assembled", *MINI, "--set", "mend.search_tokens=0")
    assert "depth: already done" in assembled.out and "grid: already done" not in assembled.out
    with_it, without = (
        json.loads((finished.run / "stages" / "grid" / "done.json").read_text())["candidates"]
        for finished in (mini, assembled)
    )
    assert with_it.keys() == without.keys()
    assert sum(row["agreement"] for row in with_it.values()) > sum(row["agreement"] for row in without.values())


def test_a_judgement_that_was_interrupted_goes_on(folder, mini):
    shutil.copytree(mini.run, folder / "killed")
    for stage, name in (("grid", "candidates.jsonl"), ("shortlist", "benchmark.jsonl")):
        (folder / "killed" / "stages" / stage / "done.json").unlink()
        file = folder / "killed" / "stages" / stage / name
        lines = file.read_text().splitlines(keepends=True)
        assert len(lines) > 2
        file.write_text("".join(lines[:2]) + lines[2][:9])  # killed while a row was written
    again = run(folder, "killed", *MINI)
    assert "grid: already done" not in again.out and again.summary["minipuzzle"] == mini.summary["minipuzzle"]


def test_a_uniform_child_is_timed_where_time_is_asked(folder, mini):
    shutil.copytree(mini.run, folder / "fast")
    fast = run(folder, "fast", *MINI, "--speedup", "1.05")
    rounds = json.loads((fast.run / "stages" / "choose-child" / "done.json").read_text())["rounds"]
    assert rounds[0]["pace"] == 1.0 and all(r["speed"] > 0 for r in rounds)
    assert not (mini.run / "stages" / "choose-child").exists()  # no time was asked
    test_a_uniform_child(fast)


def test_puzzle_and_a_uniform_child_in_one_tournament(folder, mini):
    shutil.copytree(mini.run, folder / "both")
    both = run(folder, "both", "--method", "both", "--tournament", "3", "--set", "search.min_difference=1")
    held, rows = both.summary["tournament"], mini.summary["minipuzzle"]["shortlist"]
    names = [row["name"] for row in held["finalists"]]
    assert names[3:] == [rows[0]["name"]] and held["by"] == "kl"  # beside three of Puzzle's, in no one's place
    assert not {row["name"] for row in rows} & set(names[:3])
    after = {row["name"]: row["after"]["kl"] for row in held["finalists"]}
    assert held["chosen"] == min(after, key=after.get)
    assert all(row["before"]["kl"] > 0 for row in held["finalists"])
    for stage in ("library", "score", "depth", "grid"):  # made by the runs before
        one, other = (r / "stages" / stage / "done.json" for r in (mini.run, both.run))
        assert json.loads(one.read_text())["fingerprint"] == json.loads(other.read_text())["fingerprint"]


def test_both_rankings_count():
    judged = {"a": {"accuracy": 0.9, "agreement": 0.1}, "b": {"accuracy": 0.8, "agreement": 0.9},
              "c": {"accuracy": 0.1, "agreement": 0.2}}  # fmt: skip
    assert shortlist(judged, 2) == ["b", "a"] and len(shortlist(judged, 9)) == 3


def test_agreement_tells_equals_apart():
    equal, more, better = ({"average": a, "agreement": b} for a, b in ((0.4, 0.7), (0.4, 0.8), (0.41, 0.1)))
    assert sorted([equal, better, more], key=strength) == [equal, more, better]
