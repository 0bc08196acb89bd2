"""`intarsia fetch`: bring the parent model, text and tasks onto this machine."""

from __future__ import annotations

import argparse


def add(commands) -> None:
    parser = commands.add_parser("fetch", help="bring a model, text or tasks onto this machine", description=__doc__)
    parser.add_argument("name", nargs="?", default="all",
                        help="smollm2-135m, text, tasks, or these three: all (default); conversations, preferences")
    parser.add_argument("--home", metavar="DIR", help="where to keep it (default: $INTARSIA_HOME or ~/.cache/intarsia)")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> None:
    from intarsia.data.fetch import fetch

    fetch(args.name, home=args.home)
