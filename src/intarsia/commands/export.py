"""`intarsia export`: write a model in another format."""

from __future__ import annotations

import argparse
from pathlib import Path

from intarsia.commands.common import MODEL_HELP, find_model


def add(commands) -> None:
    parser = commands.add_parser("export", help="write a model in another format", description=__doc__)
    parser.add_argument("model", metavar="MODEL", help=MODEL_HELP)
    parser.add_argument("out", metavar="OUT", type=Path, help="the folder to write")
    parser.add_argument(
        "--to", choices=("hf", "nemotron-nas", "intarsia"), default="hf",
        help="hf: the parent's own family, for models of uniform widths (default); nemotron-nas: widths that differ "
        "from layer to layer; intarsia: anything",
    )  # fmt: skip
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> None:
    from intarsia.base.errors import IntarsiaError
    from intarsia.formats import export

    if args.out.exists() and (not args.out.is_dir() or any(args.out.iterdir())):
        raise IntarsiaError(f"{args.out} exists already and will not be overwritten: name a new folder.")
    export(find_model(args.model), args.out, to=args.to)
    print(f"written: {args.out}")
