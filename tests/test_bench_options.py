"""bench/options.py on a tiny model: a row for what every kind of option adds, a search among some options alone."""

import subprocess
import sys
from pathlib import Path

from intarsia.base.files import read_json
from tiny_compression import make_parent, make_recipe, make_text

BENCH = Path(__file__).parents[1] / "bench" / "options.py"
TINY = ("options.windows=[16]", "tournament.finalists=1", "cost.calibration=0", "cost.repeats=1", "search.rounds=1",
        "library.tokens=0", "distill.tokens=256")  # fmt: skip


def test_a_row_for_every_kind_of_option(tmp_path):
    parent, recipe = make_parent(tmp_path / "parent"), make_recipe(tmp_path / "tiny.toml", make_text(tmp_path / "text"))
    (tmp_path / "page.md").write_text("# Benchmarks\n")
    words = ["--parent", parent, "--recipe", recipe, "--out", tmp_path / "runs", "--docs", tmp_path / "page.md"]
    words += [word for setting in TINY for word in ("--set", setting)]
    done = subprocess.run([sys.executable, BENCH, *map(str, words)], capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    assert "it names narrow, of which this run has no options" in done.stdout
    page = (tmp_path / "page.md").read_text()
    assert "Latency -20 %:" in page and "Memory -50 %:" in page
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in page.splitlines() if line.startswith("|")]
    made = {row[0]: row for row in rows}
    asked = {"blocks": ["prefix", "prefix,none", "prefix,cmoe"], "bits": ["prefix,none", "prefix,none,int4+"]}
    for name, kinds in asked.items():
        folder = "blocks-20" if name == "blocks" else "bits-50"
        summary = read_json(tmp_path / "runs" / folder / "summary.json")
        # What widths alone can reach in so small a model is a matter of its overheads.
        assert all(kind in summary["controls"] or f"control {kind} is left out" in done.stdout for kind in kinds)
        assert name == "blocks" or set(kinds) <= summary["controls"].keys()
        for kind, control in summary["controls"].items():
            methods = {word.split()[1] for word in control["description"].split(", ")}
            assert methods <= {*kind.split(",")}, kind
    base, row = summary["controls"]["prefix,none"], made["narrower FFNs, blocks left out"]
    assert row[1] == base["description"] and row[6] == f"{base['kl']:.3f} ± {base['kl_se']:.3f}"
