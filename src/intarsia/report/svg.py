"""The few SVG elements that the pictures are made of. Every text and attribute is escaped."""

from __future__ import annotations

from typing import Any

from markupsafe import Markup, escape


def _attribute(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.1f}".removesuffix(".0")
    return str(value)


def el(name: str, *children: Any, **attributes: Any) -> Markup:
    """An element. `class_` becomes `class`, other underscores become hyphens, None leaves the attribute out."""
    parts = [name]
    for key, value in attributes.items():
        if value is not None:
            parts.append(f'{key.rstrip("_").replace("_", "-")}="{escape(_attribute(value))}"')
    inside = "".join(c if isinstance(c, Markup) else escape(c) for c in children if c is not None)
    return Markup(f"<{' '.join(parts)}>{inside}</{name}>") if inside else Markup(f"<{' '.join(parts)}/>")


def tip(text: str | None) -> Markup | None:
    """What a pointer that rests on the parent element reads."""
    return el("title", text) if text else None


def text(x: float, y: float, content: str, anchor: str = "start", class_: str | None = None) -> Markup:
    return el("text", content, x=x, y=y, text_anchor=None if anchor == "start" else anchor, class_=class_)


def line(x1: float, y1: float, x2: float, y2: float, class_: str = "rule") -> Markup:
    return el("line", x1=x1, y1=y1, x2=x2, y2=y2, class_=class_)


def path(points: list[tuple[float, float]], class_: str) -> Markup:
    """An open polyline."""
    return el("path", d="M" + "L".join(f"{x:.1f} {y:.1f}" for x, y in points), class_=class_)


def marker(shape: str, x: float, y: float, r: float, class_: str, title: str | None = None) -> Markup:
    """A mark of radius about `r`: circle, ring, square, triangle, diamond or cross, so that colour is never alone."""
    if shape in ("circle", "ring"):
        return el("circle", tip(title), cx=x, cy=y, r=r, class_=class_)
    outlines = {
        "square": [(-0.88, -0.88), (0.88, -0.88), (0.88, 0.88), (-0.88, 0.88)],
        "triangle": [(0, -1.15), (1.08, 0.8), (-1.08, 0.8)],
        "diamond": [(0, -1.25), (1.1, 0), (0, 1.25), (-1.1, 0)],
        "cross": [
            (-1, -0.5),
            (-0.5, -1),
            (0, -0.5),
            (0.5, -1),
            (1, -0.5),
            (0.5, 0),
            (1, 0.5),
            (0.5, 1),
            (0, 0.5),
            (-0.5, 1),
            (-1, 0.5),
            (-0.5, 0),
        ],
    }
    d = "M" + "L".join(f"{x + r * a:.1f} {y + r * b:.1f}" for a, b in outlines[shape]) + "Z"
    return el("path", tip(title), d=d, class_=class_)


def picture(width: float, height: float, *children: Any, label: str, class_: str | None = None) -> Markup:
    """The `<svg>` itself; it scales with the page and says in words (`label`) what it shows."""
    classes = f"chart {class_}" if class_ else "chart"
    return el(
        "svg",
        *children,
        xmlns="http://www.w3.org/2000/svg",
        viewBox=f"0 0 {_attribute(width)} {_attribute(height)}",
        role="img",
        aria_label=label,
        class_=classes,
        style=f"max-width:{_attribute(width)}px",
    )
