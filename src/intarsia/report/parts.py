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
    """One part of the page. `missing` is the sentence that stands instead of a picture that cannot be drawn."""

    name: str
    title: str
    lede: str = ""
    body: Markup = Markup("")
    tables: tuple[Table, ...] = ()
    missing: str = ""
    legend: Markup = Markup("")
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
