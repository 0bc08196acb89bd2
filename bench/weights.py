"""What packed weights cost in quality: bfloat16, int8, int4, int4+, sparse (2:4), FP8 of a model beside it in float32.

    python bench/weights.py [MODEL ...] [--rows 16] [--limit 200]

A model is a checkpoint, a run folder or what can be fetched. Told of every kind: bytes of the weights, KL from float32
and how often both name the same next token, on held-out text; bits per byte; tasks. The table goes to
docs/benchmarks.md, everything measured to --out.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from pathlib import Path
from typing import Any

from command import called, finish
from page import DOCS, table, write_section

from intarsia.base.files import write_json
from intarsia.base.machine import cpu_model
from intarsia.commands.common import figure, find_model
from intarsia.compress.text import open_corpus
from intarsia.data import Corpus
from intarsia.evaluate import TASKS, compare, evaluate, heldout_tokens, hidden_states
from intarsia.formats import load
from intarsia.model import Decoder, weight_bytes

KINDS = ("bf16", "int8", "int4", "int4+", "sparse", "fp8")
HEAD = ["weights", "MB", "KL, nats", "same next token", "bits per byte", *TASKS]


def measured(name: str, args: argparse.Namespace, folder: Path) -> dict[str, dict[str, Any]]:
    """Every kind's figures; of float32 those that need nothing to compare with."""
    path = find_model(name)
    exact, tokenizer = load(path, dtype="float32")
    corpus = open_corpus(args.data, tokenizer, folder, args.bytes, args.length)
    tokens = heldout_tokens(corpus, exact, args.rows, args.length)
    hidden = hidden_states(exact, tokens)
    found = {"float32": figures(exact, tokenizer, corpus, args)}
    for kind in KINDS:
        packed, _ = load(path, weights=kind)
        found[kind] = compare(exact, packed, tokens, parent_hidden=hidden, title=kind)
        found[kind] |= figures(packed, tokenizer, corpus, args)
    return found


def figures(model: Decoder, tokenizer: Any, corpus: Corpus, args: argparse.Namespace) -> dict[str, Any]:
    tasks = TASKS if args.limit else ()
    found = evaluate(model, tokenizer, corpus, tasks, args.limit, length=args.length, documents=args.documents)
    return {"bytes": weight_bytes(model), **found}


def section(args: argparse.Namespace, found: dict[str, dict[str, dict[str, Any]]]) -> str:
    head = (
        f"{time.strftime('%Y-%m-%d')}, {cpu_model()}. KL on {args.rows} held-out sequences of {args.length:,} "
        f"tokens, tasks on their first {args.limit:,} items; every figure with its standard error.\n\n    {called()}"
    )
    return "\n\n".join([head, *(f"### {name}\n\n{table(HEAD, rows(each))}" for name, each in found.items())])


def rows(found: dict[str, dict[str, Any]]) -> list[list[str]]:
    return [
        [
            kind, f"{each['bytes'] / 1e6:,.0f}", figure(each.get("kl"), 4) or "", figure(each.get("top1")) or "",
            figure(each["bits_per_byte"]["all"], 4), *(figure(each.get("tasks", {}).get(t)) or "" for t in TASKS),
        ]
        for kind, each in found.items()
    ]  # fmt: skip


def main() -> int:
    args = arguments()
    found = {}
    for name in args.models:
        with tempfile.TemporaryDirectory() as folder:
            found[name] = measured(name, args, Path(folder))
    write_json(args.out, {"command": called(), "cpu": cpu_model(), "models": found})
    text = section(args, found)
    print(text)
    if not args.quick:
        write_section(args.docs, "bench/weights.py", text)
    return 0


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", metavar="MODEL", nargs="*", default=["smollm2-135m"], help="default: smollm2-135m")
    parser.add_argument("--data", metavar="DIR", help="text or a corpus (default: what fetch brings)")
    parser.add_argument("--rows", type=int, default=16, help="held-out sequences for the KL (default 16)")
    parser.add_argument("--length", type=int, default=1024, help="tokens of each (default 1,024)")
    parser.add_argument("--documents", type=int, default=20, help="a category, for bits per byte (default 20)")
    parser.add_argument("--limit", type=int, default=200, help="items of each task, 0 for none (default 200)")
    parser.add_argument("--bytes", type=int, default=2_000_000, help="text a category (default 2,000,000)")
    parser.add_argument("--quick", action="store_true", help="does it run? Two short sequences, no tasks, no page")
    parser.add_argument("--out", type=Path, default=Path("runs/bench/weights.json"))
    parser.add_argument("--docs", type=Path, default=DOCS, help="the page that holds the table")
    args = parser.parse_args()
    if args.quick:
        args.rows, args.length, args.documents, args.limit, args.bytes = 2, 48, 4, 0, 200_000
    return args


if __name__ == "__main__":
    finish(main)
