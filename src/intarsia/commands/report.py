"""`intarsia report`: draw the page of a compression, or the loss of trainings, from the files of run folders."""

from __future__ import annotations

import argparse
from pathlib import Path

from intarsia.base.errors import IntarsiaError


def add(commands) -> None:
    parser = commands.add_parser(
        "report", help="draw what a run has to tell", description=__doc__,
        epilog="example: intarsia report runs/demo; the curves of two trainings in one picture: "
        "intarsia report runs/hybrid runs/transformer --out curves.svg",
    )  # fmt: skip
    parser.add_argument("runs", metavar="RUN", type=Path, nargs="+", help="a compression's run folder, or trainings'")
    parser.add_argument("--out", metavar="FILE", type=Path, help="of trainings (default: RUN/curve.svg)")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> None:
    from intarsia.report import draw, render
    from intarsia.report.training import is_training

    if all(map(is_training, args.runs)):
        print(f"curve: {draw(args.runs, args.out)}")
        return
    if len(args.runs) > 1 or args.out:
        raise IntarsiaError("several runs, or a file to draw to, are for trainings: of a compression, give its folder.")
    print(f"report: {render(args.runs[0])}")
