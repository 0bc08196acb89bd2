"""`intarsia data`: make text into tokens, and look at what was made."""

from __future__ import annotations

import argparse
from pathlib import Path

from intarsia.base.errors import IntarsiaError
from intarsia.commands.common import MODEL_HELP, find_model, print_table


def add(commands) -> None:
    parser = commands.add_parser("data", help="make text into tokens", description=__doc__)
    actions = parser.add_subparsers(title="actions", metavar="ACTION", required=True)

    build = actions.add_parser("build", help="read documents, write tokens", description="Make text into tokens.")
    build.add_argument(
        "inputs", metavar="IN", nargs="+", help="files or folders of .txt, .md, .rst, .py, .jsonl(.gz); or just: text"
    )
    build.add_argument("--tokenizer", metavar="MODEL", required=True, help=MODEL_HELP)
    build.add_argument("--out", metavar="DIR", type=Path, required=True, help="the folder to write")
    build.set_defaults(run=run_build)

    show = actions.add_parser("show", help="what a corpus holds", description="Say what a corpus holds.")
    show.add_argument("corpus", metavar="DIR", type=Path)
    show.set_defaults(run=run_show)


def run_build(args: argparse.Namespace) -> None:
    from intarsia.data import build, fetch
    from intarsia.formats import Tokenizer, open_checkpoint

    tokenizer = Tokenizer.from_checkpoint(open_checkpoint(find_model(args.tokenizer)))
    if tokenizer is None:
        raise IntarsiaError(f"{args.tokenizer} has no tokenizer: name a model that has one.")
    inputs = [fetch(name) if name == "text" and not Path(name).exists() else Path(name) for name in args.inputs]
    build(inputs, tokenizer, args.out)
    show_corpus(args.out)


def run_show(args: argparse.Namespace) -> None:
    show_corpus(args.corpus)


def show_corpus(path: Path) -> None:
    """Tokens of every category and split."""
    from intarsia.data import Corpus

    corpus = Corpus(path)
    rows = [(c, *(f"{corpus.tokens(split, c):,}" for split in ("train", "heldout"))) for c in corpus.categories]
    rows.append(("all", *(f"{corpus.tokens(split):,}" for split in ("train", "heldout"))))
    print_table("", ["category", "train tokens", "held-out tokens"], rows)
    print(f"{path}: vocabulary of {corpus.vocab_size:,}, fingerprint {corpus.fingerprint}")
