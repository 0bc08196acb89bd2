"""The loss of trainings over the tokens that they have read, as one picture: it lies beside the model."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from markupsafe import Markup

from intarsia.base.errors import IntarsiaError
from intarsia.base.files import write_text
from intarsia.base.runfolder import losses
from intarsia.report.mosaic import style
from intarsia.report.scale import Scale, fit, spread
from intarsia.report.svg import el, line, path, picture, text
from intarsia.report.wording import count, number, tick

WIDTH, HEIGHT = 720.0, 320.0
LEFT, RIGHT, TOP, BOTTOM = 44.0, WIDTH - 150, 30.0, HEIGHT - 46
POINTS = 400  # of a curve: more than a picture of this width shows
SMOOTH = 0.08  # of the steps up to a point, the last ones: their mean is the thick line there
COLOURS = ("cherry", "blue", "teal", "gold", "plum", "stone")
CSS = """
.rule{stroke:var(--muted);stroke-width:1;fill:none}
.grid{stroke:var(--line);stroke-width:1}
.curve{fill:none;stroke-width:2;stroke-linejoin:round}
.curve.raw{stroke-width:.8;stroke-opacity:.28}
"""


def is_training(folder: Path) -> bool:
    """Whether a run folder is that of a training and not of a compression, whose work lies in stages."""
    return (folder / "metrics.jsonl").exists() and not (folder / "stages").exists()


def draw(folders: Sequence[Path], out: Path | None = None) -> Path:
    """Write the curves of trainings, each called as its folder, to `out` (default: `curve.svg` in the first folder).

    Raises `IntarsiaError` where a folder holds no losses.
    """
    runs = {}
    for folder in folders:
        rows = losses(folder) if is_training(folder) else []
        if not any(map(_usable, rows)):
            raise IntarsiaError(f"{folder} holds no losses: give the run folder of an `intarsia train` that has begun.")
        runs[folder.name if folder.name not in runs else str(folder)] = rows
    out = out or folders[0] / "curve.svg"
    write_text(out, curves(runs))
    return out


def curves(runs: Mapping[str, Sequence[Mapping[str, Any]]]) -> str:
    """`runs`: name -> rows with `tokens` and `loss`, one a step. Thin: the loss of every step; thick: the mean of
    the last ones up to it. Tokens are on a logarithmic axis, since a loss falls with their logarithm."""
    kept = {name: [row for row in rows if _usable(row)] for name, rows in runs.items()}
    tokens = [row["tokens"] for rows in kept.values() for row in rows]
    at = {name: _thinned(len(rows)) for name, rows in kept.items()}
    smooth = {name: _smoothed([row["loss"] for row in rows], at[name]) for name, rows in kept.items()}
    x = Scale(min(tokens), max(max(tokens), 1.01 * min(tokens)), LEFT, RIGHT, log=True)
    y = fit([loss for values in smooth.values() for loss in values], BOTTOM, TOP, log=False)
    parts = _axes(x, y)
    ends = []
    for number_, (name, rows) in enumerate(kept.items()):
        values, colour = smooth[name], COLOURS[number_ % len(COLOURS)]
        raw = [(x(rows[i]["tokens"]), y(rows[i]["loss"])) for i in at[name]]
        mean = [(start, y(value)) for (start, _), value in zip(raw, values)]
        parts += [_coloured(raw, "curve raw", colour), _coloured(mean, "curve", colour)]
        ends.append((mean[-1], f"{name} {number(values[-1])}"))
    places = spread([point[1] for point, _ in ends], 16, TOP, BOTTOM)
    parts += [text(point[0] + 8, place + 4, words, class_="small") for (point, words), place in zip(ends, places)]
    said = "; ".join(f"{name}: {number(values[0])} to {number(values[-1])} nats" for name, values in smooth.items())
    return str(picture(WIDTH, HEIGHT, el("style", style() + Markup(CSS)), *parts, label=f"Training loss. {said}."))


def _usable(row: Mapping[str, Any]) -> bool:
    """A step that was left out for a loss that is no number has nothing to draw."""
    return row["tokens"] > 0 and row["loss"] is not None and math.isfinite(row["loss"])


def _smoothed(values: Sequence[float], at: Sequence[int]) -> list[float]:
    """The means behind the steps `at`: a long training has millions of steps, and a picture few points."""
    widths = [max(1, round(SMOOTH * (n + 1))) for n in at]
    return [math.fsum(values[n + 1 - width : n + 1]) / width for n, width in zip(at, widths)]


def _thinned(steps: int) -> list[int]:
    """At most `POINTS` of so many steps, evenly in the logarithm of their number, the first and the last among them."""
    if steps <= POINTS:
        return list(range(steps))
    return sorted({round(steps ** (n / (POINTS - 1))) - 1 for n in range(POINTS)})


def _coloured(points: list[tuple[float, float]], class_: str, colour: str) -> Markup:
    return el("g", path(points, class_), style=f"stroke:var(--{colour})")


def _axes(x: Scale, y: Scale) -> list[Markup]:
    parts = [text(LEFT, 14, "training loss, nats a token", class_="muted"), line(LEFT, BOTTOM, RIGHT, BOTTOM),
             text(RIGHT, BOTTOM + 38, "tokens read", "end", "muted")]  # fmt: skip
    for value in y.ticks(6):
        at = y(value)
        parts += [line(LEFT, at, RIGHT, at, "grid"), text(LEFT - 8, at + 4, tick(value), "end", "muted")]
    shown = {value: count(value).replace(".0 ", " ") for value in x.ticks(6)}
    return parts + [text(x(value), BOTTOM + 19, words, "middle", "muted") for value, words in shown.items()]
