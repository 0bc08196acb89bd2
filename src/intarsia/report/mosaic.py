"""The model as inlaid wood: a piece per site, its height what is left of the parent's block."""

from __future__ import annotations

import math
from dataclasses import dataclass
from importlib.resources import files
from typing import Any

from markupsafe import Markup

from intarsia.arch import block_parameters
from intarsia.report.run import Site, parent_slots, sites
from intarsia.report.svg import el, picture, text, tip
from intarsia.report.wording import seconds, size, with_error

TOTAL = 190.0  # height of one layer in units of the drawing, both slots together


@dataclass(frozen=True)
class Layout:
    """Where the pieces of a mosaic stand. `left` is the room for the row names, 0 leaves names and numbers out."""

    layers: int
    per_band: int
    width: float
    left: float
    attention: float
    ffn: float

    @property
    def pitch(self) -> float:
        return (self.width - self.left) / self.per_band

    @property
    def cell(self) -> float:
        return self.pitch - min(4.0, max(0.6, self.pitch * 0.12))

    @property
    def gap(self) -> float:
        return 6.0 if self.left else 2.0

    @property
    def band(self) -> float:
        return self.attention + self.gap + self.ffn + (30.0 if self.left else 6.0)

    @property
    def bands(self) -> int:
        return math.ceil(self.layers / self.per_band)

    @property
    def height(self) -> float:
        return self.band * self.bands - 4.0

    def box(self, layer: int, slot: str) -> tuple[float, float, float]:
        """x, y and height of the whole cell of a site."""
        x = self.left + self.pitch * (layer % self.per_band)
        y = 1 + self.band * (layer // self.per_band)
        return (x, y, self.attention) if slot == "attention" else (x, y + self.attention + self.gap, self.ffn)


def layout(summary: dict[str, Any], layers: int, width: float, left: float, per_band: int | None = None) -> Layout:
    """Rows as high as the parent's attention and FFN are heavy, so that area is weight as far as it stays legible."""
    hidden_size = ((summary.get("parent") or {}).get("architecture") or {}).get("hidden_size", 1)
    weights = {"attention": 0, "ffn": 0}
    for layer in parent_slots(summary):
        for slot, block in layer.items():
            weights[slot] += 0 if block is None else block_parameters(block, hidden_size)
    part = weights["attention"] / (sum(weights.values()) or 1)
    total = TOTAL if left else TOTAL * 0.36
    attention = total * min(max(part, 0.2), 0.5)
    return Layout(layers, per_band or layers, width, left, attention, total - attention)


def mosaic(
    summary: dict[str, Any],
    rows: list[dict[str, Any]],
    *,
    width: float,
    left: float = 0.0,
    per_band: int | None = None,
    label: str,
    class_: str | None = None,
    prefix: Markup | None = None,
) -> Markup:
    """The mosaic of `rows` (the `sites` of a child or a control) against the parent's outline."""
    pieces = sites(summary, rows)
    layers = 1 + max((p.layer for p in pieces), default=0)
    shape = layout(summary, layers, width, left, per_band)
    notes = _notes(summary, rows) if left else {}
    cells, grain, hatch = [], [], []
    for piece in pieces:
        cells.append(_piece(piece, shape, notes, grain, hatch))
    overlays = [
        el("path", d="".join(d), fill=f"url(#{name})", pointer_events="none")
        for name, d in (("grain", grain), ("hatch", hatch))
        if d
    ]
    names = _names(shape) if left else []
    return picture(width, shape.height, prefix, *cells, *overlays, *names, label=label, class_=class_)


def _piece(piece: Site, shape: Layout, notes: dict, grain: list[str], hatch: list[str]) -> Markup:
    x, y, high = shape.box(piece.layer, piece.slot)
    wide = shape.cell
    round_ = min(2.5, wide / 6)
    ghost = el("rect", x=x, y=y, width=wide, height=high, rx=round_, class_="gone" if piece.share else "gone empty")
    fill = None
    if piece.share:
        tall = max(high * piece.share, 3.0)
        top = y + high - tall
        other = next((name for name in ("linear", "mamba") if piece.option.startswith(name)), None)
        kind = other or ("linear" if piece.state == "linear" else piece.slot)
        shade = 1.0 if other or piece.state in ("kept", "linear") else round(0.62 + 0.3 * piece.share, 2)
        fill = el(
            "rect",
            x=x,
            y=top,
            width=wide,
            height=tall,
            rx=round_,
            class_=f"w-{kind}",
            fill_opacity=None if shade == 1.0 else f"{shade}",
        )
        (hatch if kind == "linear" else grain).append(f"M{x:.1f} {top:.1f}h{wide:.1f}v{tall:.1f}h-{wide:.1f}z")
    words = notes.get((piece.layer, piece.slot))
    return el("g", tip(_tip(piece, words)), ghost, fill)


def _tip(piece: Site, words: str | None) -> str:
    what = {
        "kept": f"{piece.option}, the parent's own",
        "smaller": f"{piece.option} of {piece.original.removeprefix('ffn ').removeprefix('attention ')}"
        f" ({100 * piece.share:.0f} % of the weights)",
        "mamba": f"{piece.option} in place of {piece.original}",
        "linear": f"one linear layer ({100 * piece.share:.0f} % of the weights)",
        "absent": f"absent (was {piece.original})",
        "folded": f"{piece.option}: {piece.original}, its last matrix fitted to the layers behind it as well",
        "covered": f"covered by a layer before it (was {piece.original})",
    }[piece.state]
    slot = "FFN" if piece.slot == "ffn" else "attention"
    return f"layer {piece.layer} {slot}: {what}" + (f"\n{words}" if words else "")


def _notes(summary: dict[str, Any], rows: list[dict[str, Any]]) -> dict[tuple[int, str], str]:
    """What the library knows about each chosen option: its KL and its cost."""
    library = {(r["layer"], r["slot"], r["option"]): r for r in summary.get("options") or []}
    notes = {}
    for row in rows or []:
        for slot in ("attention", "ffn"):
            option = (row.get(slot) or {}).get("option")
            known = library.get((row["layer"], slot, option))
            lines = []
            if known:
                lines.append(f"KL alone {with_error(known.get('kl'), known.get('kl_se'))} nats")
                lines.append(
                    f"prefill {seconds(known.get('prefill_seconds'))}, decode "
                    f"{seconds(known.get('decode_seconds'))}, {size(known.get('weight_bytes'))}"
                )
            if row.get("kl") is not None and (row.get(slot) or {}).get("option") != "covered":
                of = f"{row['span']} layers as one" if row.get("span") else "the whole layer"
                lines.append(f"KL of {of} {with_error(row.get('kl'), row.get('kl_se'))} nats")
            notes[(row["layer"], slot)] = "\n".join(lines)
    return notes


def _names(shape: Layout) -> list[Markup]:
    """Row names at the left, layer numbers under the cells."""
    result = []
    step = next(s for s in (1, 2, 5, 10, 20, 50) if s * shape.pitch >= 26)
    for band in range(shape.bands):
        y = 1 + shape.band * band
        result.append(text(shape.left - 12, y + shape.attention / 2 + 4, "attention", "end", "muted"))
        result.append(text(shape.left - 12, y + shape.attention + shape.gap + shape.ffn / 2 + 4, "FFN", "end", "muted"))
        under = y + shape.attention + shape.gap + shape.ffn + 17
        result.append(text(shape.left - 12, under, "layer", "end", "muted small"))
        for layer in range(shape.per_band * band, min(shape.per_band * (band + 1), shape.layers)):
            if layer % step == 0:
                x = shape.box(layer, "ffn")[0] + shape.cell / 2
                result.append(text(x, under, str(layer), "middle", "muted small"))
    return result


def wood() -> Markup:
    """The grain and the hatching, once a page: pieces refer to them by name."""
    grain = el(
        "pattern",
        el(
            "path",
            d="M2 0C5 16 0 30 3 48S1 70 2 84M7 0C9 18 5 36 7 52S6 70 7 84M12 0C9 20 15 34 12 54S14 72 12 84"
            "M17 0C19 14 15 28 18 44S16 68 17 84M22 0C23 22 20 40 22 58S21 74 22 84",
            class_="grain",
        ),
        id="grain",
        width=24,
        height=84,
        patternUnits="userSpaceOnUse",
    )
    hatch = el(
        "pattern",
        el("path", d="M0 6L6 0", class_="hatch"),
        id="hatch",
        width=6,
        height=6,
        patternUnits="userSpaceOnUse",
    )
    return el("defs", grain, hatch)


def style() -> Markup:
    """The colours and type that every picture uses, light and dark."""
    return Markup(files("intarsia.report").joinpath("picture.css").read_text(encoding="utf-8"))


def wide(layers: int) -> dict[str, Any]:
    """The layout for a desk: one band up to 48 layers, then bands of equal length."""
    return {"width": 1040, "left": 84, "per_band": math.ceil(layers / math.ceil(layers / 48)) if layers else 1}


def narrow(layers: int) -> dict[str, Any]:
    """The layout for a phone: at most 16 layers a band."""
    return {"width": 400, "left": 74, "per_band": math.ceil(layers / math.ceil(layers / 16)) if layers else 1}


def mosaic_svg(summary: dict[str, Any]) -> str:
    """The child's mosaic as a picture of its own (for a README): colours inside, light and dark, no script.

    `summary` is the content of a run's `summary.json`; it needs `parent.architecture` and `child.sites`.
    """
    rows = (summary.get("child") or {}).get("sites") or []
    prefix = Markup("").join([el("style", style()), wood()])
    return str(
        mosaic(
            summary,
            rows,
            **wide(len(rows)),
            label=describe(summary, rows),
            prefix=prefix,
        )
    )


def describe(summary: dict[str, Any], rows: list[dict[str, Any]]) -> str:
    """The mosaic in a sentence."""
    pieces = sites(summary, rows)
    found = []
    for slot, name in (("attention", "attentions"), ("ffn", "FFNs")):
        states = [p.state for p in pieces if p.slot == slot]
        counts = [(states.count(s), s) for s in ("kept", "folded", "smaller", "mamba", "linear", "covered", "absent")]
        words = {"linear": "replaced by one linear layer", "absent": "removed", "smaller": "made smaller",
                 "mamba": "replaced by Mamba", "folded": "fitted to stand for several",
                 "covered": "covered by a layer before"}  # fmt: skip
        said = ", ".join(f"{n} {words.get(s, s)}" for n, s in counts if n)
        found.append(f"Of {len(states)} {name}, {said}.")
    return " ".join(found)
