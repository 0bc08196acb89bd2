"""Sections of docs/benchmarks.md, each between the marker of the script that writes it and an end; tables, figures."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from pathlib import Path

from intarsia.base.errors import IntarsiaError
from intarsia.base.files import write_text

DOCS = Path(__file__).parents[1] / "docs" / "benchmarks.md"
END = "<!-- end -->"


def write_section(page: Path, script: str, text: str) -> None:
    """Replace what stands between `<!-- script -->` and the end after it; a page without them gets them at its end."""
    begin = f"<!-- {script} -->"
    old = page.read_text(encoding="utf-8") if page.exists() else "# Benchmarks\n\n"
    if begin not in old:
        old = f"{old.rstrip()}\n\n{begin}\n{END}\n"
    before, _, rest = old.partition(begin)
    _, marker, after = rest.partition(END)
    if not marker:
        raise IntarsiaError(f"{page} has {begin} and no {END} after it: where does the section end?")
    write_text(page, f"{before}{begin}\n\n{text.strip()}\n\n{END}{after}")


def table(head: Sequence[str], rows: Sequence[Sequence[str]], words: int = 1) -> str:
    """Markdown; the first `words` columns stand left, figures right."""
    lines = [head, ["---" if i < words else "---:" for i in range(len(head))], *rows]
    return "\n".join("| " + " | ".join(cells) + " |" for cells in lines)


def quartiles(values: Sequence[float]) -> tuple[float, float, float]:
    """Lower quartile, median, upper quartile."""
    if len(values) == 1:
        return values[0], values[0], values[0]
    low, middle, high = statistics.quantiles(values, n=4, method="inclusive")
    return low, middle, high


def cell(values: Sequence[float], digits: int = 0) -> str:
    """Median (lower to upper quartile); empty where nothing was measured."""
    if not values:
        return ""
    low, middle, high = quartiles(values)
    return f"{middle:,.{digits}f} ({low:,.{digits}f} to {high:,.{digits}f})"


def ratios(above: Sequence[float], below: Sequence[float]) -> list[float]:
    """Turn by turn: what was measured side by side is compared side by side."""
    return [a / b for a, b in zip(above, below)]
