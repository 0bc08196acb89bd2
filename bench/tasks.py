"""Who answers better? The children and controls of bench/compress.py on more questions, compared question by question.

    python bench/tasks.py runs/bench [--budgets memory-20,memory-40] [--limit 100]

The folder is the --out of a finished bench/compress.py. Of every budget the parent, the child of every method and every
control answer the same first questions of each task. Told are accuracy and the probability of the right ending, and how
far the first method's child is ahead in both: the mean of the differences question by question, which has a smaller
error than the difference of two means, because a question that is hard is hard for all. Stopped at any moment, the same
command continues. The table goes to docs/benchmarks.md.
"""

from __future__ import annotations

import argparse
import dataclasses
import time
from collections.abc import Sequence
from pathlib import Path

import torch
from command import called, finish
from compress import METHODS, accuracy
from page import DOCS, table, write_section

from intarsia.base.errors import IntarsiaError
from intarsia.base.files import read_json, write_json
from intarsia.base.machine import cpu_model
from intarsia.commands.common import comma_list, find_model
from intarsia.data import fetch
from intarsia.evaluate import TASKS, Answers, answers, load_task, mean
from intarsia.formats import load

SCRIPT = "bench/tasks.py"
HEAD = ("target", "model", "accuracy", "ahead in accuracy", "probability of the right ending", "ahead in it")
Made = dict[str, Answers]  # by task


def budgets(folder: Path, asked: Sequence[str] = ()) -> dict[str, dict[str, Path]]:
    """{budget: {model: checkpoint}} of the finished runs in a folder, the methods' children first."""
    children: dict[str, dict[str, Path]] = {}
    controls: dict[str, dict[str, Path]] = {}
    for run in sorted(path.parent for path in folder.glob("*/summary.json")):
        method = next((m for m in METHODS if run.name.endswith(f"-{m}")), METHODS[0])
        budget, made = run.name.removesuffix(f"-{method}"), read_json(run / "summary.json")["controls"]
        children.setdefault(budget, {})[method] = run / "child"
        controls.setdefault(budget, {}).update({name: run / "controls" / name for name in made})
    if unknown := set(asked) - set(children):
        known = ", ".join(children) or "none"
        raise IntarsiaError(f"{folder} has no finished run of {sorted(unknown)[0]}; it has: {known}.")
    if not children:
        raise IntarsiaError(f"{folder} has no finished run: make some with bench/compress.py --out {folder}.")
    return {
        budget: {f"**{m}**": made[m] for m in METHODS if m in made} | controls[budget]
        for budget, made in children.items()
        if not asked or budget in asked
    }


def answered(path: Path, kept: Path, folder: Path, limit: int) -> Made:
    """A model's answers to the first `limit` questions of every task, from `kept` where they are known."""
    asked = {"limit": limit, "model": str(path), "made": path.stat().st_mtime}
    if kept.exists() and (known := read_json(kept))["asked"] == asked:
        return {name: Answers(**said) for name, said in known["answers"].items()}
    model, tokenizer = load(path)
    made = {name: answers(model.eval(), tokenizer, name, load_task(name, folder, limit)) for name in TASKS}
    said = {name: dataclasses.asdict(each) for name, each in made.items()}
    write_json(kept, {"asked": asked, "answers": said})
    return made


def values(made: Made, what: str) -> dict[str, torch.Tensor]:
    """Of every task one figure a question."""
    picked = {t: each.probability if what == "probability" else each.hits[each.metric] for t, each in made.items()}
    return {task: torch.tensor(each, dtype=torch.float64) for task, each in picked.items()}


def rows(budget: str, made: dict[str, Made]) -> list[list[str]]:
    """Of every model how it answers, and how far the first of them is ahead."""
    found: list[list[str]] = []
    first = next(iter(made))
    for name, each in made.items():
        row = [budget if name == first else "", name]
        for what in ("accuracy", "probability"):
            mine, best = values(each, what), values(made[first], what)
            own = {task: mean(mine[task]) for task in mine}
            ahead = {task: mean(best[task] - mine[task]) for task in mine}
            row += [accuracy(own), "" if name == first else accuracy(ahead)]
        found.append(row)
    return found


def section(args: argparse.Namespace, parent: str, lines: list[list[str]]) -> str:
    return (
        f"{time.strftime('%Y-%m-%d')}, {cpu_model()}. Children of {parent}, the first {args.limit:,} questions of each "
        f"of {', '.join(TASKS)}; means over tasks. Ahead: the first child's answers less this model's, question by "
        f"question; ± is a standard error.\n\n    {called()}\n\n{table(HEAD, lines, words=2)}"
    )


def main() -> int:
    args = arguments()
    found, folder = budgets(args.runs, args.budgets), args.tasks or fetch("tasks")
    said = read_json(next(args.runs.glob("*/summary.json")))["parent"]
    kept = args.runs / "answers"
    parent = answered(find_model(said["path"]), kept / "parent.json", folder, args.limit)
    lines = rows("", {"parent": parent})
    for budget, models in found.items():
        made: dict[str, Made] = {}
        for name, path in models.items():
            print(f"--- {budget}, {name.strip('*')}", flush=True)
            made[name] = answered(path, kept / f"{budget}-{name.strip('*')}.json", folder, args.limit)
        lines += rows(budget, made)
    text = section(args, said["name"], lines)
    print(text)
    write_section(args.docs, f"{SCRIPT} {args.runs}", text)
    return 0


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", type=Path, metavar="DIR", help="the --out of bench/compress.py")
    parser.add_argument("--budgets", type=comma_list, default=(), metavar="A,B", help="folders in it (default: all)")
    parser.add_argument("--limit", type=int, default=100, metavar="N", help="questions a task (default: 100)")
    parser.add_argument("--tasks", type=Path, metavar="DIR", help="their questions (default: what fetch brings)")
    parser.add_argument("--docs", type=Path, default=DOCS, help="the page that holds the table")
    return parser.parse_args()


if __name__ == "__main__":
    finish(main)
