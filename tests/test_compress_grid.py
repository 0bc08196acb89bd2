"""Uniform children by arithmetic, and the published search of Nemotron-H 47B reproduced from the catalog."""

import subprocess
import sys
from pathlib import Path

import pytest

from intarsia.arch import catalog, memory_bytes, nemotron_h, parameters, pattern_of
from intarsia.base.errors import IntarsiaError
from intarsia.compress.grid import Member, Precision, check_ranking, child_of, counts_of, dropped, in_order, members

BENCH = Path(__file__).parents[1] / "bench" / "minipuzzle.py"
SMALL = nemotron_h(9, 64, attentions=1, mamba_head_dim=16, head_dim=16, state_size=16, num_groups=2, vocab_size=100)


def test_the_published_search_comes_out(tmp_path):
    page = tmp_path / "page.md"
    done = subprocess.run([sys.executable, BENCH, "--docs", page], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    cells = {row.split(" | ")[0].strip("| "): row.split(" | ")[2].strip("| ") for row in done.stdout.splitlines()
             if row.startswith("| ")}  # fmt: skip
    assert cells["weights of the 56B"] == "29.507 GiB"
    assert 380 <= int(cells["candidates within 31.7 GiB at 1M tokens"]) <= 420
    assert [cells[name] for name in cells if name.startswith("pattern")] == ["the same", "the same"]
    off = [float(cells[f"memory of candidate {n}"].split("(")[1].split()[0]) for n in (1, 2, 3)]
    assert all(abs(percent) < 0.1 for percent in off)
    assert done.stdout.strip() in page.read_text()


def test_precision_counts_as_the_cost_model_does():
    arch = catalog.get("nemotron-h-8b")
    assert Precision().total_bytes(arch, 4096, 2) == memory_bytes(arch, 4096, 2)
    small = Precision(4, 4, 1000.0)
    assert small.weight_bytes(arch) == parameters(arch) / 2
    assert small.total_bytes(arch, 0) == small.weight_bytes(arch) + small.cache_bytes(arch, 0) + 1000


def test_the_least_important_leave():
    assert pattern_of(SMALL) == "M-M*-M-M-" and counts_of(SMALL) == {"mamba2": 4, "ffn": 4, "attention": 1}
    ranking = {"mamba2": [5, 0], "ffn": [8, 1, 4]}
    assert dropped(SMALL, ranking, {"mamba2": 3, "ffn": 2}) == {5, 8, 1}
    child = child_of(SMALL, ranking, Member({"mamba2": 2, "ffn": 4, "attention": 1}, 96))
    assert pattern_of(child) == "-M*--M-" and {f.intermediate_size for f in child.feed_forwards} == {96}
    assert child_of(SMALL, ranking, Member(counts_of(SMALL), 256)) == SMALL


def test_members_are_all_combinations():
    found = list(members({"mamba2": [3, 4], "attention": [0, 1]}, [64, 128, 256]))
    assert len({(m.depth, m.width, *m.kept.values()) for m in found}) == 12


def test_what_a_ranking_cannot_say():
    with pytest.raises(IntarsiaError, match="1 of 4 mamba2 blocks cannot stay: between 2 and 4"):
        dropped(SMALL, {"mamba2": [5, 0]}, {"mamba2": 1})
    with pytest.raises(IntarsiaError, match=r"ranking of ffn names \[2\]"):
        check_ranking(SMALL, {"ffn": [2, 1]})
    check_ranking(SMALL, in_order(SMALL))
