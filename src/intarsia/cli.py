"""The command line: thin, and quick to answer.

Each command is a module of `intarsia.commands` with `add(subparsers)`, which declares it, and `run(args)`, which
imports what it needs only when it runs, so that `--help` costs no more than Python itself.
"""

from __future__ import annotations

import argparse
import difflib
import os
import re
import sys
from collections.abc import Sequence
from typing import NoReturn

from intarsia import __version__
from intarsia.base.errors import IntarsiaError
from intarsia.commands import (
    arch,
    compress,
    data,
    doctor,
    evaluate,
    export,
    fetch,
    generate,
    plan,
    report,
    serve,
    train,
)

COMMANDS = (fetch, arch, compress, train, plan, report, generate, serve, evaluate, export, data, doctor)


class Parser(argparse.ArgumentParser):
    """argparse, with one sentence for a mistake, the nearest known word in it, and no guessing at shortened options."""

    def __init__(self, *args, **kwargs):
        kwargs.setdefault("allow_abbrev", False)
        kwargs.setdefault("formatter_class", argparse.RawDescriptionHelpFormatter)
        super().__init__(*args, **kwargs)

    def error(self, message: str) -> NoReturn:
        choice = re.search(r"invalid choice: '([^']*)' \(choose from (.*)\)", message)
        if choice:
            near = difflib.get_close_matches(choice[1], re.findall(r"[\w.-]+", choice[2]), n=1)
            message = f"'{choice[1]}' is not possible there; choose from {choice[2]}."
            message += f" Did you mean {near[0]}?" if near else ""
        unknown = re.match(r"unrecognized arguments: (--[\w-]+)", message)
        if unknown:
            near = difflib.get_close_matches(unknown[1], self._option_string_actions, n=1)
            message += f". Did you mean {near[0]}?" if near else ""
        print(f"{self.prog}: {message} (see {self.prog} --help)", file=sys.stderr)
        sys.exit(2)

    def parse_known_args(self, args=None, namespace=None):
        """Refuse what is left over here, where the command and its options are known, not at the top."""
        namespace, rest = super().parse_known_args(args, namespace)
        if rest:
            self.error(f"unrecognized arguments: {' '.join(rest)}")
        return namespace, rest


def parser() -> Parser:
    """The whole command line."""
    top = Parser(
        prog="intarsia",
        description="Make language models cheaper to run without making them worse.",
        epilog="Start with: intarsia compress smollm2-135m --preset demo --out runs/demo",
    )
    top.add_argument("--version", action="version", version=f"intarsia {__version__}")
    commands = top.add_subparsers(title="commands", metavar="COMMAND", required=True)
    for command in COMMANDS:
        command.add(commands)
    return top


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; the exit status: 0 done, 2 a sentence about what was asked, 130 stopped by Ctrl-C."""
    args = parser().parse_args(argv)
    try:
        args.run(args)
        sys.stdout.flush()
    except IntarsiaError as error:
        print(f"intarsia: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("\nstopped; run the same command to continue", file=sys.stderr)
        return 130
    except BrokenPipeError:  # `intarsia ... | head`: the reader has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return 0


if __name__ == "__main__":
    sys.exit(main())
