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
    assert "Latency -30 %:" in page and "Memory -30 %:" in page
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in page.splitlines() if line.startswith("|")]
    made = {row[0]: row for row in rows}
    for name, part in (("blocks", {"cmoe", "span", "mamba"}), ("bits", {"int8", "int4+", "sparse"})):
        summary = read_json(tmp_path / "runs" / f"{name}-30" / "summary.json")
        assert all(any(m in kind.split(",") for kind in summary["controls"]) for m in part)
        for kind, control in summary["controls"].items():
            asked = {"parent", *kind.split(",")}
            assert {word.split()[1] for word in control["description"].split(", ")} <= asked, kind
        base = next(iter(summary["controls"].values()))
        row = made[f"narrower FFNs, {'fewer heads, ' * (name == 'blocks')}blocks left out"]
        assert row[1] == base["description"] and row[6] == f"{base['kl']:.3f} ± {base['kl_se']:.3f}"
