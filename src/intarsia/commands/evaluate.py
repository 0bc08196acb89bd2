"""`intarsia eval`: bits per byte of held-out text, distance from a parent, and tasks, each with a standard error."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from intarsia.commands.common import MODEL_HELP, add_weights, at_least, comma_list, figure, find_model, print_table


def add(commands) -> None:
    parser = commands.add_parser("eval", help="measure how good a model is", description=__doc__)
    parser.add_argument("model", metavar="MODEL", help=MODEL_HELP)
    parser.add_argument("--parent", metavar="P", help="a model to compare with: KL, same next token, its own figures")
    parser.add_argument(
        "--tasks", type=comma_list, metavar="A,B", default=("piqa", "hellaswag", "arc_easy", "lambada"),
        help="piqa, hellaswag, arc_easy, lambada (default: all four; none: '')",
    )  # fmt: skip
    parser.add_argument("--data", metavar="DIR", type=Path, help="a corpus of intarsia data build, for bits per byte")
    parser.add_argument("--limit", type=at_least(1), metavar="N", help="only the first N items of each task")
    add_weights(parser)
    parser.add_argument("--json", metavar="FILE", nargs="?", const="-", help="the result as JSON (default: printed)")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> None:
    import json

    model = find_model(args.model)
    parent = find_model(args.parent) if args.parent else None

    from intarsia.base.files import write_json
    from intarsia.evaluate import evaluate

    result = evaluate(model, corpus=args.data, tasks=args.tasks, limit=args.limit, parent=parent,
                      weights=args.weights)  # fmt: skip
    if args.json == "-":
        print(json.dumps(result, indent=1))
        return
    if args.json:
        write_json(args.json, result)
    names = [Path(given).name for given in (args.model, args.parent) if given]
    print_table("", ["", *names, "n"], table(result))


def table(result: dict[str, Any]) -> list[list[Any]]:
    """A line for every figure: the model's, the parent's own where there is one, and how many items they rest on."""
    own = dict(figures({key: value for key, value in result.items() if key != "parent"}))
    parents = dict(figures(result.get("parent", {})))
    return [
        [name, figure(entry), *([figure(parents.get(name))] if parents else []), entry.get("n")]
        for name, entry in own.items()
    ]


def figures(result: dict[str, Any], above: str = ""):
    """(name, {value, se, n}) of everything in a nested result."""
    for name, entry in result.items():
        path = f"{above} {name}".strip().removeprefix("tasks ").replace("bits_per_byte", "bits per byte,")
        if isinstance(entry, dict):
            yield from [(path, entry)] if "value" in entry else figures(entry, path)
