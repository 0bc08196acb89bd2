"""What several commands share: finding a model, lists on the command line, tables."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from intarsia.base.errors import IntarsiaError, did_you_mean

MODEL_HELP = "a model folder, a .gguf file, a run folder, or a name that can be fetched"


def find_model(given: str) -> Path:
    """The checkpoint that a person means: a path, a run folder's child, or a fetchable name (fetched if need be)."""
    from intarsia.data import ITEMS, fetch, home

    path = Path(given).expanduser()
    if (path / "run.json").exists():
        found = [path / name for name in ("child", "model") if (path / name).is_dir()]
        if not found:
            raise IntarsiaError(f"the run {path} has no model yet: run its command again to finish it.")
        return found[0]
    if path.exists():
        return path
    models = [name for name, item in ITEMS.items() if item.folder.startswith("models/")]
    if given in models:
        fetched = (home() / ITEMS[given].folder / "manifest.json").exists()  # then there is nothing to tell
        return fetch(given, log=_silent if fetched else _to_stderr)
    raise IntarsiaError(f"there is no model at '{given}'. What can be fetched by name: {', '.join(models)}."
                        f"{did_you_mean(given, models)}")


def _to_stderr(text: str) -> None:
    print(text, file=sys.stderr)


def _silent(text: str) -> None:
    pass


def add_weights(parser, fastest: bool = False) -> None:
    """`--weights` of the commands that run a model; `fastest`: packed by default where that loses nothing."""
    come = "as bf16 where that is faster" if fastest else "as they come"
    parser.add_argument(
        "--weights", choices=("bf16", "int8", "int4", "int4+", "fp8"), default="auto" if fastest else "recorded",
        help="run on weights packed so, on a CPU; int4+: int4 by what matters, where a compression has found that out, "
        "and a few weights apart; fp8: on a GPU, elsewhere emulated and slow (default: as the compression that made "
        f"them chose, else {come})",
    )


def comma_list(text: str) -> tuple[str, ...]:
    """`a,b,c` -> ("a", "b", "c")."""
    return tuple(part.strip() for part in text.split(",") if part.strip())


def at_least(least: float, kind: type = int, most: float | None = None):
    """An argparse type: a number within bounds, or a sentence."""

    def parse(text: str) -> Any:
        limits = f"at least {least}" if most is None else f"between {least} and {most}"
        noun = "a whole number" if kind is int else "a number"
        try:
            value = kind(text)
        except ValueError:
            value = None
        if value is None or not value >= least or (most is not None and not value <= most):
            raise argparse.ArgumentTypeError(f"'{text}' is not possible: {noun} {limits} is needed")
        return value

    return parse


def print_table(title: str, columns: Sequence[str], rows: Sequence[Sequence[Any]], stream=None) -> None:
    """A plain table: the first column to the left, all others to the right."""
    from rich import box
    from rich.console import Console
    from rich.table import Table

    console = Console(file=stream, highlight=False)
    table = Table(title=title or None, title_justify="left", title_style="bold", box=box.SIMPLE_HEAD, pad_edge=False)
    for index, column in enumerate(columns):
        table.add_column(column, justify="left" if index == 0 else "right", no_wrap=True)
    for row in rows:
        table.add_row(*("" if cell is None else str(cell) for cell in row))
    if not console.is_terminal:  # in a log or a pipe nothing is to be folded or cut
        console.width = max(console.width, 200)
    console.print(table)


def figure(entry: Any, digits: int = 3) -> str | None:
    """`0.512 ± 0.010` from {"value", "se"}, or the number alone."""
    if entry is None:
        return None
    if not isinstance(entry, dict):
        return f"{entry:.{digits}f}"
    error = entry.get("se")
    return f"{entry['value']:.{digits}f}" + (f" ± {error:.{digits}f}" if error is not None else "")
