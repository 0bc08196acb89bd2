"""`intarsia compress`: from a checkpoint to a smaller, measurably faster one, and a page that explains it.

Stopped at any moment, the same command continues where it was.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from intarsia.commands.common import find_model

TARGETS = {  # name: (placeholder, help); every one given is a constraint, and all are met together
    "speedup": ("X", "at least X times the parent's speed at the scenario"),
    "throughput": ("T", "at least T tokens a second at the scenario"),
    "latency": ("S", "at most S seconds for the whole scenario, or S%% of the parent's"),
    "ttft": ("S", "at most S seconds to the first token"),
    "memory": ("M", "weights and cache in at most M, such as 220MB, 1.5GiB or 80%%"),
    "params": ("N", "at most N parameters, such as 100M or 80%%"),
    "keep_attention": ("S", "attention in at most this share of all blocks, such as 0.08; else Mamba-2"),
}


def add(commands) -> None:
    parser = commands.add_parser(
        "compress", help="make a model smaller and faster", description=__doc__,
        epilog="example: intarsia compress smollm2-135m --preset demo --speedup 1.3 --out runs/demo",
    )  # fmt: skip
    parser.add_argument("parent", metavar="PARENT", help="a model folder, a .gguf file, or a name that can be fetched")
    recipe = parser.add_mutually_exclusive_group()
    recipe.add_argument("--preset", help="demo (minutes), quick, or full (hours); default: quick")
    recipe.add_argument("--recipe", metavar="FILE", help="a recipe of your own, a .toml file")
    parser.add_argument("--out", metavar="DIR", type=Path, help="the run folder (default: runs/PARENT-PRESET)")
    parser.add_argument("--data", metavar="PATH", help="text or a built corpus to learn from (default: fetched text)")
    parser.add_argument("--scenario", metavar="B,P,G", help="speed is measured with batch B, prompt P, G new tokens")
    parser.add_argument("--method", choices=("puzzle", "minipuzzle", "both"),
                        help="how the child is chosen; both: in one tournament (default: puzzle)")
    parser.add_argument("--profile", choices=("homogeneous", "vllm", "llama.cpp", "free"),
                        help="make the child of what this loads, and write it so (default: free)")
    parser.add_argument("--tournament", metavar="N", type=int, help="so many candidates get a short distillation each, "
                        "and the best after it is the child; 1: none")
    parser.add_argument("--rounds", metavar="N", type=int, help="so many rounds to the targets, the child of one being "
                        "the parent of the next; 1: at once")
    parser.add_argument("--controls", action="store_true", help="also build what simpler methods would have made")
    parser.add_argument("--set", metavar="A.B=C", action="append", default=[], help="change one value of the recipe")
    targets = parser.add_argument_group("targets", "any of these; they replace the recipe's own")
    for name, (placeholder, text) in TARGETS.items():
        targets.add_argument(f"--{name.replace('_', '-')}", metavar=placeholder, help=text, action=Once)
    parser.set_defaults(run=run)


class Once(argparse.Action):
    """An option that is an error when it is given twice: which of the two is meant?"""

    def __call__(self, parser, namespace, value, option=None):
        earlier = getattr(namespace, self.dest)
        if earlier is not None:
            parser.error(f"{option} is given twice, as {earlier} and as {value}: keep the one you mean")
        setattr(namespace, self.dest, value)


def overrides(args: argparse.Namespace) -> list[str]:
    """The command line as changes to the recipe; `--set` comes last and so has the last word."""
    targets = [f"{name} = {_toml(value)}" for name in TARGETS if (value := getattr(args, name)) is not None]
    changes = [f"target={{ {', '.join(targets)} }}"] if targets else []
    changes += ["options.mamba=true"] if args.keep_attention is not None else []
    changes += [f"method={_toml(args.method, text=True)}"] if args.method else []
    changes += [f"profile={_toml(args.profile, text=True)}"] if args.profile else []
    changes += [f"tournament.finalists={args.tournament}"] if args.tournament is not None else []
    changes += [f"rounds={args.rounds}"] if args.rounds is not None else []
    changes += [f"scenario={_toml(args.scenario, text=True)}"] if args.scenario else []
    changes += [f"data.path={_toml(args.data, text=True)}"] if args.data else []
    return changes + args.set


def _toml(value: str, text: bool = False) -> str:
    """A number stays a number; everything else is quoted."""
    import json
    import math

    try:
        if not text and math.isfinite(float(value)):
            return repr(float(value))
    except ValueError:
        pass
    return json.dumps(value)


def run(args: argparse.Namespace) -> None:
    from intarsia.base.recipe import load_recipe
    from intarsia.compress.recipe import Recipe

    source = args.recipe or args.preset or "quick"
    recipe = load_recipe(Recipe, _file(args.recipe) if args.recipe else source, overrides(args))
    parent = find_model(args.parent)
    if recipe.distill.teacher_model:
        teacher = str(find_model(recipe.distill.teacher_model).absolute())
        recipe = recipe.model_copy(update={"distill": recipe.distill.model_copy(update={"teacher_model": teacher})})
    if recipe.controls.models:
        guests = tuple(str(find_model(path).absolute()) for path in recipe.controls.models)
        recipe = recipe.model_copy(update={"controls": recipe.controls.model_copy(update={"models": guests})})
    out = args.out or Path("runs") / f"{Path(args.parent).stem}-{Path(source).stem}"

    from intarsia.compress.pipeline import compress

    if compress(parent=parent, recipe=recipe, out=out, controls=args.controls):  # a rank after the first has nothing
        show(out)


def _file(path: str) -> Path:
    """A path that cannot be taken for a preset's name."""
    return Path(path).expanduser().absolute()


def show(out: Path) -> None:
    """What a finished run amounts to: table, a sample, where the page is."""
    from intarsia.base.files import read_json
    from intarsia.commands.summary import print_summary

    summary = read_json(out / "summary.json")
    print_summary(summary)
    print(f"child:  {out / 'child'}")
    if exported := summary.get("export"):
        print(f"for {exported['profile']}: {exported['path']} ({exported['format']})")
    print(f"report: {out / 'report.html'}")
