"""`intarsia train`: pre-train a model from text, fine-tune it on conversations or tune it to preferences, by a recipe.

Stopped at any moment, even killed, the same command continues where it was, to the same bits. Under torchrun the
processes share the work: torchrun --nproc-per-node 8 -m intarsia train nemotron-h-8b --data corpus --out runs/8b
"""

from __future__ import annotations

import argparse
import os
from pathlib import Path
from typing import Any

RECIPE_HELP = "a recipe that comes with Intarsia (nemotron-h-nano, -8b, sft-nano, rpo-nano, ...), or a .toml file"


def add(commands) -> None:
    parser = commands.add_parser(
        "train", help="pre-train a model from text, or teach it to answer", description=__doc__,
        epilog="example: intarsia train nemotron-h-nano --out runs/nano",
    )  # fmt: skip
    parser.add_argument("recipe", metavar="RECIPE", help=RECIPE_HELP)
    parser.add_argument("--out", metavar="DIR", type=Path, help="the run folder (default: runs/RECIPE)")
    add_changes(parser)
    parser.set_defaults(run=run)


def add_changes(parser: argparse.ArgumentParser) -> None:
    """The options that change a recipe."""
    parser.add_argument("--from", metavar="MODEL", dest="start", help="the model to begin from, in its shape")
    parser.add_argument("--data", metavar="PATH", help="a corpus of intarsia data build, or text")
    parser.add_argument("--tokens", metavar="N", help="the budget: 20M, 380B, 15T")
    parser.add_argument("--set", metavar="A.B=C", action="append", default=[], help="change one value of the recipe")


def read_recipe(args: argparse.Namespace) -> Any:
    """The recipe that the command line means; `--set` has the last word."""
    import json

    from intarsia.base.recipe import load_recipe
    from intarsia.train.recipe import Recipe

    changes = [f"data.path={json.dumps(args.data)}"] if args.data else []
    if args.start:
        changes += [f"{key}={json.dumps(args.start)}" for key in ("model", "init")]
    changes += [f"data.tokens={json.dumps(args.tokens)}"] if args.tokens else []
    return load_recipe(Recipe, args.recipe, changes + args.set)


def run(args: argparse.Namespace) -> None:
    recipe = read_recipe(args)
    out = args.out or Path("runs") / Path(args.recipe).stem

    from intarsia.commands.common import figure, print_table
    from intarsia.report import draw
    from intarsia.train.loop import train

    summary = train(recipe, out)
    if os.environ.get("RANK", "0") != "0":  # of several processes, one speaks
        return
    name = "accuracy" if recipe.prefers else "bits_per_byte"
    rows = [(category, figure(found)) for category, found in summary[name].items()]
    print_table("", ["held-out", name.replace("_", " ")], rows)
    print(f"{summary['tokens']:,} tokens in {summary['steps']:,} steps, {summary['skipped']} of them left out")
    print(f"model:   {out / 'model'}\nfigures: {out / 'metrics.jsonl'}, {out / 'summary.json'}\ncurve:   {draw([out])}")
