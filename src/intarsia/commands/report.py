"""`intarsia report`: draw the page of a run again from the files in its folder."""

from __future__ import annotations

import argparse
from pathlib import Path


def add(commands) -> None:
    parser = commands.add_parser("report", help="write the report of a run", description=__doc__)
    parser.add_argument("run_folder", metavar="RUN", type=Path, help="a run folder, such as runs/demo")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> None:
    from intarsia.report import render

    print(f"report: {render(args.run_folder)}")
