"""bench/compress.py on a tiny model: several targets share what none of them changes, and a table is written."""

import subprocess
import sys
from pathlib import Path

import pytest

from intarsia.base.files import read_json
from tiny_compression import make_parent, make_recipe, make_text

BENCH = Path(__file__).parents[1] / "bench" / "compress.py"
PAGE = "# Benchmarks\n\nBefore.\n\n<!-- bench/compress.py -->\nold\n<!-- end -->\n\nAfter.\n"


@pytest.fixture(scope="module")
def bench(tmp_path_factory):
    folder = tmp_path_factory.mktemp("bench")
    parent, recipe = make_parent(folder / "parent"), make_recipe(folder / "tiny.toml", make_text(folder / "text"))
    (folder / "page.md").write_text(PAGE)

    def run(*more: str) -> subprocess.CompletedProcess:
        options = ("--out", folder / "runs", "--docs", folder / "page.md", "--set", 'controls.kinds=["depth"]')
        words = ("--parent", parent, "--recipe", recipe, *options, *more)
        return subprocess.run([sys.executable, BENCH, *map(str, words)], capture_output=True, text=True, timeout=300)

    return folder, run


def test_a_table_of_several_targets(bench):
    folder, run = bench
    done = run("--speedups", "1.15,1.4,5000")
    assert done.returncode == 1 and "a speed-up of 5000.000 is out of reach" in done.stderr, done.stderr
    page = (folder / "page.md").read_text()
    assert page.startswith("# Benchmarks\n\nBefore.\n") and page.endswith("<!-- end -->\n\nAfter.\n")
    assert "old" not in page and "bench/compress.py --parent" in page
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in page.splitlines() if line.startswith("|")]
    assert len({len(row) for row in rows}) == 1
    assert [row[:2] for row in rows[2:]] == [
        ["", "parent"], ["1.15 x", "**child**"], ["", "depth"], ["1.4 x", "**child**"], ["", "depth"],
    ]  # fmt: skip
    summary = read_json(folder / "runs" / "1.4x" / "summary.json")
    assert rows[5][6] == f"{summary['kl']:.3f} ± {summary['kl_se']:.3f}"

    # What no target changes was made once.
    for stage in ("cost", "library", "score", "evaluate-parent"):
        one, other = (folder / "runs" / name / "stages" / stage / "done.json" for name in ("1.15x", "1.4x"))
        assert one.stat().st_ino == other.stat().st_ino, stage
    assert read_json(folder / "runs" / "1.15x" / "summary.json")["target"] == {"speedup": 1.15}
    assert summary["target"] == {"speedup": 1.4}


def test_again_it_is_quick_and_says_the_same(bench):
    folder, run = bench
    before = {p: p.stat().st_mtime_ns for p in folder.glob("runs/*/stages/distill-*/done.json")}
    done = run("--speedups", "1.15,1.4")
    assert done.returncode == 0, done.stderr
    assert before == {p: p.stat().st_mtime_ns for p in folder.glob("runs/*/stages/distill-*/done.json")}
    assert (folder / "page.md").read_text().count("<!-- bench/compress.py -->") == 1


def test_cuts_of_memory_by_all_methods(bench):
    folder, run = bench
    done = run("--cuts", "10", "--of", "memory", "--methods", "puzzle,minipuzzle,both", "--out", folder / "cuts")
    assert done.returncode == 0, done.stderr
    page = (folder / "page.md").read_text()
    part = page[page.index("<!-- bench/compress.py --cuts --of memory -->") :]
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in part.splitlines() if line.startswith("|")]
    assert [row[:2] for row in rows[2:7]] == [
        ["", "parent"], ["memory -10 %", "**puzzle**"], ["", "**minipuzzle**"], ["", "**both**"], ["", "depth"]
    ]  # fmt: skip
    for name in ("memory-10", "memory-10-minipuzzle", "memory-10-both"):
        summary = read_json(folder / "cuts" / name / "summary.json")
        assert summary["memory_bytes"]["child"] <= 0.9 * summary["memory_bytes"]["parent"]
    for method, stage in (("", "search"), ("-minipuzzle", "grid")):  # judged once
        one, other = (folder / "cuts" / f"memory-10{m}" / "stages" / stage / "done.json" for m in (method, "-both"))
        assert one.stat().st_ino == other.stat().st_ino, stage
    held = read_json(folder / "cuts" / "memory-10-minipuzzle" / "summary.json").get("tournament")
    assert ("MiniPuzzle at memory -10 %" in part) == bool(held)
    if held:
        assert [row[0].removesuffix(" (chosen)") for row in rows[10:-1]] == [row["name"] for row in held["finalists"]]


def test_a_later_command_shares_what_an_earlier_one_made(bench):
    folder, run = bench
    done = run("--cuts", "25", "--of", "memory", "--methods", "puzzle", "--out", folder / "cuts")
    assert done.returncode == 0, done.stderr
    for stage in ("cost", "library", "score", "evaluate-parent"):
        one, other = (folder / "cuts" / name / "stages" / stage / "done.json" for name in ("memory-10", "memory-25"))
        assert one.stat().st_ino == other.stat().st_ino, stage


def test_two_rounds_where_much_goes(bench):
    folder, run = bench
    words = ("--cuts", "20,50", "--of", "memory", "--methods", "puzzle,rounds", "--out", folder / "deep")
    done = run(*words, "--set", "tournament.finalists=1", "--set", "distill.tokens=2048")
    assert done.returncode == 0, done.stderr
    part = (folder / "page.md").read_text().partition("<!-- bench/compress.py --cuts --of memory -->")[2]
    names = [line.split("|")[2].strip() for line in part.splitlines() if line.startswith("| ")][2:]
    assert names == ["parent", "**puzzle**", "depth", "**puzzle**", "**rounds**", "depth"]
    runs = folder / "deep"
    assert {p.name for p in runs.iterdir()} == {"memory-20", "memory-50", "memory-50-rounds"}
    # The first round begins where every other run does, and its child is the parent of the second.
    for stage in ("library", "score", "evaluate-parent"):
        home = runs / "memory-50-rounds" / ("" if stage == "evaluate-parent" else "rounds/1")
        one, other = (place / "stages" / stage / "done.json" for place in (runs / "memory-20", home))
        assert one.stat().st_ino == other.stat().st_ino, stage
    whole = read_json(runs / "memory-20" / "summary.json")["memory_bytes"]["parent"]
    assert read_json(runs / "memory-50-rounds" / "summary.json")["memory_bytes"]["child"] <= 0.5 * whole


def test_bits_and_blocks_beside_each_alone_at_the_bytes_of_int4(bench):
    folder, run = bench
    done = run("--bytes-of", "int4", "--set", 'controls.kinds=["bits"]', "--set", "tournament.finalists=1")
    assert done.returncode == 0, done.stderr
    summary = read_json(folder / "runs" / "bytes-of-int4" / "summary.json")
    held = summary["memory_bytes"]
    assert held["child"] == held["predicted"] <= summary["target"]["memory"] < held["parent"]
    # All bits alone can do with these bytes is to use all of them, for int4 everywhere.
    assert summary["controls"]["bits"]["description"] == "the parent's blocks, 8 in int4"
    rows = [line for line in (folder / "page.md").read_text().splitlines() if line.startswith("| bytes of int4 |")]
    assert len(rows) == 1 and "**child**" in rows[0]
