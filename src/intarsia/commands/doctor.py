"""`intarsia doctor`: what this machine is, which kernels run on it and why, and what is already here."""

from __future__ import annotations

import argparse


def add(commands) -> None:
    parser = commands.add_parser("doctor", help="what this machine can do, and what is here", description=__doc__)
    parser.add_argument("--json", action="store_true", help="print the facts as JSON")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> None:
    import json

    from intarsia import doctor

    facts = doctor.examine()
    print(json.dumps(facts, indent=1) if args.json else doctor.describe(facts))
