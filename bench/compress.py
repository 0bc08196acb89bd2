"""The frontier: the searched child and every control at several budgets, after the same distillation.

    python bench/compress.py [--preset demo] [--speedups 1.2,1.33,1.5] [--out runs/bench]
    python bench/compress.py --cuts 20,40 --of memory     # % of the parent's memory that goes; also: latency
    python bench/compress.py --all      # both at 10, 20, 40 and 60 %, by every method
    python bench/compress.py --bytes-of int4,int8   # what the parent takes packed so: bits, blocks, or both jointly

Each budget and method is an ordinary run (`intarsia compress`, the first method's with `--controls`) in a folder of its
own under --out. What does not depend on the budget (text, costs, library, scores, the parent's own figures) is made by
one and linked into the others, and what both judge is taken from the methods beside them. Stopped at any moment, the
same command continues. The table goes to docs/benchmarks.md, that of every preset and parent to a section of its own.
Methods: puzzle, minipuzzle, both (in one tournament) and rounds (Puzzle in two rounds, where two fifths or more go).
"""

from __future__ import annotations

import argparse
import math
import os
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from command import called, finish, known_words
from page import DOCS, write_section
from page import table as markdown

from intarsia.arch import block_cache_bytes
from intarsia.base.files import atomic_path, read_json
from intarsia.base.recipe import load_recipe
from intarsia.commands.common import find_model
from intarsia.compress.pipeline import dtype_of
from intarsia.compress.recipe import Recipe
from intarsia.engine.scenario import Scenario
from intarsia.formats import open_checkpoint
from intarsia.model.packed import packed_block_bytes, packed_outer_bytes

SCRIPT = "bench/compress.py"
SHARED = ("data", "cost", "importance", "library", "score", "evaluate-parent", "teacher", "depth")
OF_BUDGET = ("search", "grid")  # what both in one tournament ask is what each method asks
OF_ORIGIN = ("data", "evaluate-parent", "teacher")  # of these what the last of several rounds has of the first parent
KINDS, METHODS, CUTS = ("latency", "memory"), ("puzzle", "minipuzzle", "both", "rounds"), (10, 20, 40, 60)
ROUNDS, DEEP = 2, 40  # rounds of the method of that name, and the cut in percent from which they are tried
PACKED = ("int4", "int8")  # precisions of a search over bits and blocks; its controls search one of them alone
BITS = ('options.precisions=["int8","int4"]', 'controls.kinds=["bits","blocks","greedy"]')
COLUMNS = ("target", "model", "parameters", "speed-up", "KL as assembled", "mended", "distilled", "same token",
           "bits per byte", "tasks")  # fmt: skip


@dataclass(frozen=True)
class Budget:
    """A row's title, its folder, and how it is asked of `intarsia compress`."""

    title: str
    folder: str
    words: tuple[str, ...]
    cut: float = 0.0  # percent that go, where that is what was asked


def numbers_between(low: float, high: float, what: str) -> Callable[[str], tuple[float, ...]]:
    """A parser of `20,10` -> (10, 20), numbers between two others; `what` they are."""

    def read(text: str) -> tuple[float, ...]:
        values = tuple(sorted({float(part) for part in text.split(",")}))
        if not all(low < value < high for value in values):
            raise argparse.ArgumentTypeError(f"'{text}' is not possible: {what}")
        return values

    return read


speedups = numbers_between(1, float("inf"), "speed-ups are above 1")
cuts = numbers_between(0, 100, "a cut is a percentage between 0 and 100")


def parser_of(description: str, out: str) -> argparse.ArgumentParser:
    """A parser of what every script takes that runs `intarsia compress`."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parent", default="smollm2-135m")
    recipe = parser.add_mutually_exclusive_group()
    recipe.add_argument("--preset", default="demo", help="default: demo")
    recipe.add_argument("--recipe", metavar="FILE")
    parser.add_argument("--set", action="append", default=[], metavar="A.B=C", help="change one value of the recipe")
    parser.add_argument("--out", type=Path, default=Path(out), help=f"default: {out}")
    parser.add_argument("--docs", type=Path, default=DOCS, help="the page that holds the table")
    return parser


def arguments() -> argparse.Namespace:
    parser = parser_of(__doc__, "runs/bench")
    parser.add_argument("--speedups", type=speedups, metavar="A,B", help="default without cuts: 1.2,1.33,1.5")
    parser.add_argument("--cuts", type=cuts, default=(), metavar="A,B", help="percent that go, of each of --of")
    parser.add_argument("--of", type=known_words(KINDS), default=KINDS, metavar="A,B", help="default: latency,memory")
    parser.add_argument("--bytes-of", type=known_words(PACKED), default=(), metavar="A,B",
                        help=f"as much memory as the parent packed so: {', '.join(PACKED)}")  # fmt: skip
    parser.add_argument("--methods", type=known_words(METHODS), default=METHODS[:1], metavar="A,B",
                        help=f"of {', '.join(METHODS)} (default: {METHODS[0]})")  # fmt: skip
    parser.add_argument("--all", action="store_true", help="all cuts, by all methods")
    args = parser.parse_args()
    if args.all:
        args.cuts, args.of, args.methods = CUTS, KINDS, METHODS
    if args.bytes_of:
        args.set = [*BITS, *args.set]
    if not args.speedups:
        args.speedups = () if args.cuts or args.bytes_of else (1.2, 1.33, 1.5)
    return args


def budgets(args: argparse.Namespace) -> list[Budget]:
    """Speed-ups, then cuts of latency, then cuts of memory, then bytes of a precision."""
    found = [Budget(f"{x:g} x", f"{x:g}x", ("--speedup", str(x))) for x in args.speedups]
    for of in args.of if args.cuts else ():
        for cut in args.cuts:
            found.append(Budget(f"{of} -{cut:g} %", f"{of}-{cut:g}", (f"--{of}", f"{100 - cut:g}%"), cut))
    for kind in args.bytes_of:
        found.append(Budget(f"bytes of {kind}", f"bytes-of-{kind}", ("--memory", str(bytes_of(args, kind)))))
    return found


def bytes_of(args: argparse.Namespace, kind: str) -> int:
    """Weights and cache of the parent at the recipe's scenario with every block packed as `kind`."""
    recipe = load_recipe(Recipe, args.recipe or args.preset, args.set)
    arch, scenario = open_checkpoint(find_model(args.parent)).architecture, Scenario.parse(recipe.scenario)
    dtype = getattr(torch, dtype_of(recipe))
    weights = sum(packed_block_bytes(block, arch, kind, dtype) for block in arch.blocks)
    cache = sum(block_cache_bytes(b, scenario.length, scenario.batch, dtype.itemsize) for b in arch.blocks)
    return packed_outer_bytes(arch, dtype) + weights + cache


def share(made: Sequence[Path], folder: Path, names: Sequence[str] = SHARED) -> None:
    """Link into a new run folder what finished runs have made and no target changes: of every stage the newest."""
    for name in names:
        source = next((run / "stages" / name for run in reversed(made) if _has(run, name)), None)
        target = folder / "stages" / name
        if source and not target.exists():
            with atomic_path(target) as temporary:
                shutil.copytree(source, temporary, copy_function=os.link)
    if made and not (folder / "run.json").exists():  # last: a folder without it is not yet a run
        with atomic_path(folder / "run.json") as temporary:
            shutil.copyfile(made[-1] / "run.json", temporary)


def _has(run: Path, stage: str) -> bool:
    return (run / "stages" / stage).is_dir()


def run(args: argparse.Namespace, budget: Budget, method: str, folder: Path) -> bool:
    """One budget by one method; whether it was reached. Why not has been said."""
    print(f"--- {budget.title}, {method}: {folder}", flush=True)
    how = ["--rounds", str(ROUNDS)] if method == "rounds" else ["--method", method]
    controls = ["--controls"] if method == args.methods[0] else []
    return compressed(args, args.set, [*budget.words, *how, *controls], folder)


def compressed(args: argparse.Namespace, settings: Sequence[str], words: Sequence[str], folder: Path) -> bool:
    """One run of `intarsia compress` with settings of the recipe and other words; whether its target was reached."""
    recipe = ["--recipe", args.recipe] if args.recipe else ["--preset", args.preset]
    changes = [word for setting in settings for word in ("--set", setting)]
    command = [sys.executable, "-m", "intarsia", "compress", args.parent, *recipe, *changes, *words, "--out", folder]
    return subprocess.run(command).returncode == 0


def with_error(value: float | None, error: float | None = None, digits: int = 3) -> str:
    if value is None:
        return ""
    return f"{value:.{digits}f}" + ("" if error is None else f" ± {error:.{digits}f}")


def accuracy(tasks: dict[str, dict[str, float]]) -> str:
    """The mean over tasks, and the standard error of it."""
    if not tasks:
        return ""
    error = math.hypot(*(figure["se"] or 0.0 for figure in tasks.values())) / len(tasks)
    return with_error(100 * statistics.fmean(figure["value"] for figure in tasks.values()), 100 * error, 1) + " %"


def row(target: str, name: str, figures: dict[str, Any], bits: dict[str, Any], tasks: dict[str, Any]) -> list[str]:
    speed, spread = figures.get("speedup_measured", 1.0), figures.get("speedup_measured_spread")
    return [
        target, name, f"{figures['parameters'] / 1e6:.4g} M",
        f"{speed:.2f}" + (f" ({spread[0]:.2f} to {spread[1]:.2f})" if spread else ""),
        *distances(figures),
        with_error(bits["all"]["value"], bits["all"]["se"]), accuracy(tasks),
    ]  # fmt: skip


def distances(figures: dict[str, Any]) -> list[str]:
    """KL to the parent as assembled, mended and distilled, and the agreement with it, as `COLUMNS` calls them."""
    top1, error = (None if figures.get(k) is None else 100 * figures[k] for k in ("top1", "top1_se"))
    return [
        with_error(figures.get("kl_assembled")), with_error(figures.get("kl_before_distillation")),
        with_error(figures.get("kl"), figures.get("kl_se")),
        with_error(top1, error, 1) + (" %" if top1 is not None else ""),
    ]  # fmt: skip


def table(summaries: dict[Budget, dict[str, dict[str, Any]]]) -> str:
    """Markdown: the parent, then the children and every control of each budget."""

    def of(summary: dict[str, Any], who: str) -> dict[str, Any]:
        return {name: figures[who] for name, figures in summary["tasks"].items()}

    first = next(iter(next(iter(summaries.values())).values()))
    methods = {method for made in summaries.values() for method in made}
    rows = [row("", "parent", first["parent"], first["bits_per_byte"]["parent"], of(first, "parent"))]
    for budget, made in summaries.items():
        title = budget.title
        for method, summary in made.items():
            name = "**child**" if methods == {"puzzle"} else f"**{method}**"
            rows.append(row(title, name, summary, summary["bits_per_byte"]["child"], of(summary, "child")))
            title = ""
        for summary in made.values():
            rows += [row("", name, c, c["bits_per_byte"], c["tasks"]) for name, c in summary["controls"].items()]
    return markdown(COLUMNS, rows, words=2)


def finalists(budget: Budget, summary: dict[str, Any]) -> str:
    """MiniPuzzle's tournament as Nemotron-H tells of its own (arXiv 2504.03624, table 6): before and after the short
    distillation, and the one that was chosen after the long one."""
    held, tasks = summary["tournament"], list(summary["tasks"])
    figures = [*tasks, "agreement"]
    rows = [["parent", *(f"{summary['tasks'][t]['parent']['value']:.2f}" for t in tasks), "", ""]]
    for row in held["finalists"]:
        before, after = row["before"], row["after"]
        cells = [f"{before[f]:.2f} to {after[f]:.2f}" for f in (*figures, "average")]
        rows.append([row["name"] + (" (chosen)" if row["name"] == held["chosen"] else ""), *cells])
    child = [summary["tasks"][t]["child"]["value"] for t in tasks]
    mean = f"{statistics.fmean(child):.2f}" if child else ""
    rows.append(["the chosen one, distilled", *(f"{value:.2f}" for value in child), f"{summary['top1']:.2f}", mean])
    return (
        f"MiniPuzzle at {budget.title}: the finalists of {summary['minipuzzle']['candidates']} candidates, before and "
        f"after {held['tokens']:,} tokens of distillation each.\n\n"
        + markdown(["", *tasks, "same next token", "average"], rows)
    )


def measured_on(summary: dict[str, Any]) -> str:
    """The day, the machine and the model of a table."""
    scenario = "{batch},{prompt},{generated}".format(**summary["scenario"])
    day, parent = time.strftime("%Y-%m-%d"), summary["parent"]["name"]
    return f"{day}, {summary['device']}, {summary['dtype']}; {parent} at the scenario {scenario}."


def section(summaries: dict[Budget, dict[str, dict[str, Any]]]) -> str:
    """What stands between the markers."""
    first = next(iter(next(iter(summaries.values())).values()))
    return (
        f"{measured_on(first)} Speed-up: whole models timed in turns, median and quartiles. KL to the parent in nats a "
        "token: as assembled from the library and with its blocks fitted to each other, both on fewer tokens, and "
        "after distillation; ± is a standard error.\n\n"
        f"    {called()}\n\n{table(summaries)}\n\n"
        + "\n\n".join(finalists(budget, made["minipuzzle"]) for budget, made in summaries.items() if _played(made))
    )


def _played(made: dict[str, dict[str, Any]]) -> bool:
    return "tournament" in made.get("minipuzzle", {})


def plan(args: argparse.Namespace) -> list[tuple[Budget, str, Path]]:
    """Every budget by every method, and the run folder of each."""
    return [
        (budget, method, args.out / (budget.folder if method == "puzzle" else f"{budget.folder}-{method}"))
        for budget in budgets(args)
        for method in args.methods
        if method != "rounds" or budget.cut >= DEEP
    ]


def finished(out: Path) -> list[Path]:
    """The runs that earlier commands finished here, the latest last. What they made is shared as well, and what of it
    does not fit is made anew. A last round has another parent, and what it made is its own."""
    done = sorted(out.glob("*/summary.json"), key=lambda path: path.stat().st_mtime)
    return [path.parent for path in done if not path.parent.name.endswith("-rounds")]


def main() -> int:
    args, missed = arguments(), 0
    summaries: dict[Budget, dict[str, dict[str, Any]]] = {}
    runs = plan(args)
    made = finished(args.out)
    for budget, method, folder in runs:
        others = [run for run in made if run != folder]
        if method == "rounds":
            share(others, folder / "rounds" / "1")
        share(others, folder, OF_ORIGIN if method == "rounds" else SHARED)
        if method == "both":
            share([path for same, _, path in runs if same == budget and path in others], folder, OF_BUDGET)
        if run(args, budget, method, folder):
            made += [folder] if method != "rounds" else []
            summaries.setdefault(budget, {})[method] = read_json(folder / "summary.json")
        else:
            missed += 1
    if summaries:
        print(table(summaries))
        write_section(args.docs, title(args), section(summaries))
    return 1 if missed else 0


def title(args: argparse.Namespace) -> str:
    """The section that a preset, a parent other than the demo's, and cuts (of one kind) have to themselves."""
    words = [SCRIPT]
    words += [] if args.recipe or args.preset == "demo" else [f"--preset {args.preset}"]
    words += [] if args.recipe or args.parent == "smollm2-135m" else [f"--parent {args.parent}"]
    words += ["--cuts"] if args.cuts else ["--bytes-of"] if args.bytes_of else []
    words += [f"--of {args.of[0]}"] if args.cuts and len(args.of) == 1 else []
    return " ".join(words)


if __name__ == "__main__":
    finish(main)
