"""What the scripts here share as commands: how they were called, how they end, lists of numbers."""

from __future__ import annotations

import argparse
import shlex
import sys
from collections.abc import Callable
from pathlib import Path
from typing import NoReturn

from peers.protocol import PeerError

from intarsia.base.errors import IntarsiaError


def script() -> str:
    """`bench/NAME.py` of what runs."""
    return f"bench/{Path(sys.argv[0]).name}"


def called() -> str:
    """The command, for the page, as a shell reads it."""
    return shlex.join(["python", script(), *sys.argv[1:]])


def finish(main: Callable[[], int]) -> NoReturn:
    """Run it and leave with its status; what is for a person to read is a sentence and status 2."""
    try:
        sys.exit(main())
    except (IntarsiaError, PeerError) as error:
        print(f"{script()}: {error}", file=sys.stderr)
        sys.exit(2)


def whole_numbers(text: str, most: int | None = None) -> tuple[int, ...]:
    """`512,2048` -> (512, 2048), each at least 1 and at most `most`."""
    values = tuple(int(part) for part in text.split(","))
    if min(values) < 1 or (most is not None and max(values) > most):
        limits = "at least 1" if most is None else f"from 1 to {most:,}"
        raise argparse.ArgumentTypeError(f"'{text}' is not possible: lengths are {limits}")
    return values


def known_words(known: tuple[str, ...]) -> Callable[[str], tuple[str, ...]]:
    """A parser of `a,b` -> ("a", "b"), words that are known."""

    def read(text: str) -> tuple[str, ...]:
        if unknown := set(text.split(",")) - set(known):
            raise argparse.ArgumentTypeError(f"'{unknown.pop()}' is not known; known: {', '.join(known)}")
        return tuple(text.split(","))

    return read
