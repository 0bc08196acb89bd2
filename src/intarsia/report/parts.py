"""The pieces that every section of the page is made of: a title, a picture, a legend, tables."""

from __future__ import annotations

from dataclasses import dataclass

from markupsafe import Markup

from intarsia.report.run import Run, contenders
from intarsia.report.svg import marker, picture

MOST_ROWS = 900  # of one table; the rest stays in summary.json


@dataclass(frozen=True)
class Table:
    """Numbers behind a picture; the first column is text, the others are numbers or short words."""

    columns: list[str]
    rows: list[list[str]]
    title: str = "The numbers"

    @property
    def shown(self) -> list[list[str]]:
        return self.rows[:MOST_ROWS]

    @property
    def left_out(self) -> int:
        return max(0, len(self.rows) - MOST_ROWS)


@dataclass(frozen=True)
class Section:
    """One part of the page. `missing` says what would make it where the run lacks it."""

    name: str
    title: str
    lede: str = ""
    body: Markup | str = ""
    tables: tuple[Table, ...] = ()
    missing: str = ""
    legend: Markup | str = ""
    half: bool = False


def legend(marks: list[tuple[str, str, str]]) -> Markup:
    """(shape, class, words) as small marks in a line."""
    items = [
        Markup('<span class="key">{}{}</span>').format(
            picture(14, 14, marker(shape, 7, 7, 4.6, class_), label=words), words
        )
        for shape, class_, words in marks
    ]
    return Markup('<p class="legend">{}</p>').format(Markup("").join(items))


def model_legend(run: Run, parent: bool = True) -> Markup:
    marks = [("ring", "k-parent", "parent")] if parent else []
    return legend(marks + [(c.shape, c.class_, c.name) for c in contenders(run.summary)])


def swatches(items: list[tuple[str, str]]) -> Markup:
    """(letter of the style sheet, words) as small areas of colour in a line."""
    keys = [Markup('<span class="key"><i class="swatch s-{}"></i>{}</span>').format(k, words) for k, words in items]
    return Markup('<p class="legend">{}</p>').format(Markup("").join(keys))
