"""The frontier: the searched child and every control at several speed-ups, after the same distillation.

    python bench/compress.py [--preset demo] [--speedups 1.2,1.33,1.5] [--out runs/bench]

Each target is an ordinary run (`intarsia compress --controls`) in a folder of its own under --out. What does not depend
on the target (text, costs, library, scores, the parent's own figures) is made by the first and linked into the others.
Stopped at any moment, the same command continues. The table goes to docs/benchmarks.md, each preset's to a section of
its own.
"""

from __future__ import annotations

import argparse
import os
import shlex
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from command import finish
from page import DOCS, write_section
from page import table as markdown

from intarsia.base.files import atomic_path, read_json

SCRIPT = "bench/compress.py"
SHARED = ("data", "cost", "importance", "library", "score", "evaluate-parent", "teacher")
COLUMNS = ("target", "model", "parameters", "speed-up", "KL before", "KL after", "same token", "bits per byte")


def speedups(text: str) -> tuple[float, ...]:
    """`1.2,1.5` -> (1.2, 1.5)."""
    values = tuple(sorted({float(part) for part in text.split(",")}))
    if not all(value > 1 for value in values):
        raise argparse.ArgumentTypeError(f"'{text}' is not possible: speed-ups are above 1")
    return values


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parent", default="smollm2-135m")
    recipe = parser.add_mutually_exclusive_group()
    recipe.add_argument("--preset", default="demo", help="default: demo")
    recipe.add_argument("--recipe", metavar="FILE")
    parser.add_argument("--speedups", type=speedups, default=(1.2, 1.33, 1.5), metavar="A,B", help="1.2,1.33,1.5")
    parser.add_argument("--set", action="append", default=[], metavar="A.B=C", help="change one value of the recipe")
    parser.add_argument("--out", type=Path, default=Path("runs/bench"), help="default: runs/bench")
    parser.add_argument("--docs", type=Path, default=DOCS, help="the page that holds the table")
    return parser.parse_args()


def share(first: Path, folder: Path) -> None:
    """Link into a new run folder what the finished run `first` has made and no target changes."""
    for name in SHARED:
        source, target = first / "stages" / name, folder / "stages" / name
        if source.is_dir() and not target.exists():
            with atomic_path(target) as temporary:
                shutil.copytree(source, temporary, copy_function=os.link)
    if not (folder / "run.json").exists():  # last: a folder without it is not yet a run
        with atomic_path(folder / "run.json") as temporary:
            shutil.copyfile(first / "run.json", temporary)


def run(args: argparse.Namespace, speedup: float, folder: Path) -> bool:
    """One target; whether it was reached. Why not has been said."""
    print(f"--- {speedup:g} x: {folder}", flush=True)
    recipe = ["--recipe", args.recipe] if args.recipe else ["--preset", args.preset]
    changes = [word for change in args.set for word in ("--set", change)]
    command = [sys.executable, "-m", "intarsia", "compress", args.parent, *recipe, *changes]
    return subprocess.run([*command, "--speedup", str(speedup), "--controls", "--out", folder]).returncode == 0


def with_error(value: float | None, error: float | None = None, digits: int = 3) -> str:
    if value is None:
        return ""
    return f"{value:.{digits}f}" + ("" if error is None else f" ± {error:.{digits}f}")


def row(target: str, name: str, figures: dict[str, Any], bits: dict[str, Any]) -> list[str]:
    speed, spread = figures.get("speedup_measured", 1.0), figures.get("speedup_measured_spread")
    top1, error = (None if figures.get(k) is None else 100 * figures[k] for k in ("top1", "top1_se"))
    return [
        target, name, f"{figures['parameters'] / 1e6:.4g} M",
        f"{speed:.2f}" + (f" ({spread[0]:.2f} to {spread[1]:.2f})" if spread else ""),
        with_error(figures.get("kl_before_distillation")), with_error(figures.get("kl"), figures.get("kl_se")),
        with_error(top1, error, 1) + (" %" if top1 is not None else ""),
        with_error(bits["all"]["value"], bits["all"]["se"]),
    ]  # fmt: skip


def table(summaries: dict[float, dict[str, Any]]) -> str:
    """Markdown: the parent, then the child and every control of each target."""
    first = next(iter(summaries.values()))
    rows = [row("", "parent", first["parent"], first["bits_per_byte"]["parent"])]
    for speedup, summary in summaries.items():
        rows.append(row(f"{speedup:g} x", "**child**", summary, summary["bits_per_byte"]["child"]))
        rows += [row("", name, c, c["bits_per_byte"]) for name, c in summary["controls"].items()]
    return markdown(COLUMNS, rows, words=2)


def section(summaries: dict[float, dict[str, Any]]) -> str:
    """What stands between the markers."""
    first = next(iter(summaries.values()))
    scenario = "{batch},{prompt},{generated}".format(**first["scenario"])
    command = shlex.join(["python", SCRIPT, *sys.argv[1:]])
    return (
        f"{time.strftime('%Y-%m-%d')}, {first['device']}, {first['dtype']}; {first['parent']['name']} at the scenario "
        f"{scenario}. Speed-up: whole models timed in turns, median and quartiles. KL to the parent in nats a token, "
        "before and after distillation (before: on fewer tokens); ± is a standard error.\n\n"
        f"    {command}\n\n{table(summaries)}\n"
    )


def main() -> int:
    args = arguments()
    summaries: dict[float, dict[str, Any]] = {}
    first: Path | None = None
    for speedup in args.speedups:
        folder = args.out / f"{speedup:g}x"
        if first:
            share(first, folder)
        if run(args, speedup, folder):
            first = first or folder
            summaries[speedup] = read_json(folder / "summary.json")
    if summaries:
        print(table(summaries))
        name = SCRIPT if args.recipe or args.preset == "demo" else f"{SCRIPT} --preset {args.preset}"
        write_section(args.docs, name, section(summaries))
    return 0 if len(summaries) == len(args.speedups) else 1


if __name__ == "__main__":
    finish(main)
