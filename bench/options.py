"""What is every kind of option worth? The same search with it and without, at the same budget: an ablation, a row each.

    python bench/options.py [--parent smollm2-135m] [--cut 30] [--parts blocks,bits] [--out runs/options]

Every part is one run of `intarsia compress`, whose library holds all options of the part. Its controls are the exact
search among narrower FFNs (the first row), and among these and one kind more (all other rows): the same library,
scores, costs, mending and tokens of distillation, so that rows differ by what could be chosen alone. Blocks are asked
for less time, bits, to which blocks left out are added, for less memory. Stopped at any moment, the same command
continues, and a later one shares what an earlier one made.
The table goes to docs/benchmarks.md.
"""

from __future__ import annotations

import argparse
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from command import called, finish, known_words
from compress import compressed, cuts, distances, finished, measured_on, parser_of, share, with_error
from page import table, write_section

from intarsia.base.files import read_json

SCRIPT = "bench/options.py"
COLUMNS = ("options", "what was chosen", "parameters", "speed-up", "KL as assembled", "mended", "distilled",
           "same token")  # fmt: skip


@dataclass(frozen=True)
class Part:
    """A run: what its target is called, the options it has, those of the first row and its title, what others add."""

    of: str
    cut: float  # percent, where the command names none
    settings: tuple[str, ...]
    base: str
    title: str
    added: dict[str, str]

    def rows(self) -> dict[str, str]:
        """{what `controls.among` says: the title}."""
        others = {f"{self.base},{method}": f"and {title}" for method, title in self.added.items()}
        return {self.base: self.title} | others


PARTS = {
    "blocks": Part(
        "latency",
        20,
        ('options.kv_methods=["drop","mean","aligned","keep"]', "options.windows=[128]", "options.mamba=true",
         "options.linear=true", 'options.moe=["S4A4E16"]', 'options.moe_methods=["cmoe","moefication"]',
         "options.spans=[2]", 'options.span_methods=["fold"]'),
        "prefix",
        "narrower FFNs",
        {"none": "blocks left out", "drop": "fewer heads", "mean": "KV heads averaged",
         "aligned": "KV heads aligned and averaged", "keep": "queries that share the best KV heads",
         "window": "a window of 128 tokens",
         "mamba": "Mamba-2 for attention", "narrow": "narrower Mamba-2 blocks", "experts": "fewer experts",
         "cmoe": "FFNs as experts by activations (CMoE)", "moefication": "FFNs as experts by weights (MoEfication)",
         "linear": "one matrix for a block", "span": "one layer for two"},
    ),
    "bits": Part(
        "memory",
        50,
        ("options.kv_methods=[]", 'options.precisions=["int8","int4","int4+","sparse"]'),
        "prefix,none",
        "narrower FFNs, blocks left out",
        {"int8": "int8", "int4": "int4", "int4+": "int4, dense and sparse", "sparse": "2:4 sparsity"},
    ),
}  # fmt: skip


def arguments() -> argparse.Namespace:
    parser = parser_of(__doc__, "runs/options")
    parser.add_argument("--cut", type=cuts, help="percent that go (default: of the time 20, of the memory 50)")
    parser.add_argument("--parts", type=known_words(tuple(PARTS)), default=tuple(PARTS), metavar="A,B",
                        help=f"of {', '.join(PARTS)} (default: all)")  # fmt: skip
    return parser.parse_args()


def run(args: argparse.Namespace, name: str, part: Part, cut: float, folder: Path) -> bool:
    """One part; whether its target was reached."""
    rows = json.dumps(list(part.rows()))
    settings = ["controls.kinds=[]", f"controls.among={rows}", "evaluate.tasks=[]", *part.settings, *args.set]
    print(f"--- {name}, {part.of} -{cut:g} %: {folder}", flush=True)
    return compressed(args, settings, [f"--{part.of}", f"{100 - cut:g}%", "--controls"], folder)


def row(title: str, figures: dict[str, Any]) -> list[str]:
    return [
        title, figures["description"], f"{figures['parameters'] / 1e6:.4g} M",
        with_error(figures["speedup_measured"], digits=2), *distances(figures),
    ]  # fmt: skip


def rows_of(part: Part, summary: dict[str, Any]) -> list[list[str]]:
    """The controls, and what the whole search made of all options."""
    made = summary["controls"]
    found = [row(title, made[name]) for name, title in part.rows().items() if name in made]
    return [*found, row("all of them, the whole search", summary | {"description": ""})]


def section(made: dict[tuple[str, float], dict[str, Any]]) -> str:
    """What stands between the markers; `made`: summaries by part and cut."""
    first = next(iter(made.values()))
    parts = [
        f"{PARTS[name].of.capitalize()} -{cut:g} %:\n\n{table(COLUMNS, rows_of(PARTS[name], summary), words=2)}"
        for (name, cut), summary in made.items()
    ]
    return (
        f"{measured_on(first)} The optimum of the scores among the options of the row; the last row is the child of "
        "the whole search, with its readings and its tournament. KL to the parent in nats a token, speed-up of whole "
        "models.\n\n"
        f"    {called()}\n\n" + "\n\n".join(parts)
    )


def main() -> int:
    args, made = arguments(), {}
    for name in args.parts:
        cut = args.cut[0] if args.cut else PARTS[name].cut
        folder = args.out / f"{name}-{cut:g}"
        share([made for made in finished(args.out) if made.name.startswith(name) and made != folder], folder)
        if run(args, name, PARTS[name], cut, folder):
            made[name, cut] = read_json(folder / "summary.json")
    if made:
        text = section(made)
        print(text)
        parent = "" if args.parent == "smollm2-135m" else f" --parent {args.parent}"
        write_section(args.docs, SCRIPT + parent, text)
    return 0 if len(made) == len(args.parts) else 1


if __name__ == "__main__":
    finish(main)
