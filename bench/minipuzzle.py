"""The search behind Nemotron-H 47B (MiniPuzzle, arXiv 2504.03624, section 3), from the catalog and arithmetic alone.

    python bench/minipuzzle.py [--docs PAGE]

Reproduced: the size of the parent, the candidates within the memory of a 32 GiB card at a million tokens, both
published patterns from the published ranking of blocks, and the memory of the three finalists. `minipuzzle.toml` holds
what was published.
"""

from __future__ import annotations

import argparse
import sys
import tomllib
from pathlib import Path
from typing import Any

from page import DOCS, table, write_section

from intarsia.arch import Architecture, FeedForward, catalog, pattern_of
from intarsia.compress.grid import Member, Precision, check_ranking, child_of, counts_of, in_order, members

SCRIPT = "bench/minipuzzle.py"
PUBLISHED = Path(__file__).with_suffix(".toml")
GIB, MIB = 2**30, 2**20
NOTE = """

The ranges of the grid are not published. Here: as deep as the three finalists, and at least as many attentions as the
fewest among them; this reading was taken of several because it comes near 400 (at least 3 attentions give 531, at least
2 give 648). The reserve beside weights, keys and states is one constant, fitted to the same three points.
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--docs", type=Path, default=DOCS, help="the page that holds the tables")
    args = parser.parse_args()
    said = tomllib.loads(PUBLISHED.read_text(encoding="utf-8"))
    parent = catalog.get(said["parent"])
    check_ranking(parent, said["ranking"])
    given = said["memory"]
    precision = Precision(given["weight_bits"], given["cache_bits"], given["reserve_gib"] * GIB)
    found = within(parent, said, precision)
    rows = [size_row(parent, precision), grid_row(found), *pattern_rows(parent, said),
            *finalist_rows(parent, said, precision)]  # fmt: skip
    text = table(("what", "published", "here"), rows, 2) + NOTE
    print(text)
    write_section(args.docs, SCRIPT, f"## The search behind Nemotron-H 47B\n\n`python {SCRIPT}`\n\n{text}")


def within(parent: Architecture, said: dict[str, Any], precision: Precision) -> list[Member]:
    """The members of the published grid within the published memory."""
    grid, given = said["grid"], said["memory"]
    counts = counts_of(parent)
    choices = {"attention": grid["attention"]} | {name: range(counts[name] + 1) for name in ("mamba2", "ffn")}
    fit = (m for m in members(choices, grid["widths"]) if m.depth == grid["depth"])
    limit, ranking = given["limit_gib"] * GIB, in_order(parent)
    return [m for m in fit if precision.total_bytes(child_of(parent, ranking, m), given["context"]) < limit]


def size_row(parent: Architecture, precision: Precision) -> list[str]:
    return ["weights of the 56B", "29.5 GiB", f"{precision.weight_bytes(parent) / GIB:.3f} GiB"]


def grid_row(found: list[Member]) -> list[str]:
    return ["candidates within 31.7 GiB at 1M tokens", "about 400", str(len(found))]


def pattern_rows(parent: Architecture, said: dict[str, Any]) -> list[list[str]]:
    """Dropping the lowest blocks of every kind gives the published patterns, letter for letter."""
    rows = []
    for child in said["children"]:
        published = pattern_of(catalog.get(child["catalog"]))
        made = pattern_of(child_of(parent, said["ranking"], Member(child["kept"], child["width"])))
        same = "the same" if made == published else f"`{made}`"
        rows.append([f"pattern of {catalog.title(child['catalog'])}", f"`{published}`", same])
    return rows


def finalist_rows(parent: Architecture, said: dict[str, Any], precision: Precision) -> list[list[str]]:
    rows = []
    for finalist in said["finalists"]:
        kept = [b for index, b in enumerate(parent.blocks) if index not in finalist["dropped"]]
        narrow = FeedForward(finalist["width"], activation="relu2", gated=False)
        arch = parent.replace(blocks=tuple(narrow if isinstance(b, FeedForward) else b for b in kept))
        mib = precision.total_bytes(arch, said["memory"]["context"]) / MIB
        plotted = finalist["plotted_mib"]
        here = f"{mib:,.0f} MiB ({100 * (mib / plotted - 1):+.2f} %)"
        rows.append([f"memory of {finalist['name']}", f"{plotted:,} MiB", here])
    return rows


if __name__ == "__main__":
    sys.exit(main())
