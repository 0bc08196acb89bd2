"""Put the page together and write it, whole or not at all."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup, escape

from intarsia.base.files import write_text
from intarsia.report import mosaic, sections, wording
from intarsia.report.run import Run, read_run, sites
from intarsia.report.wording import count, finite, number, percent, seconds, size, times


def render(run_folder: str | Path) -> Path:
    """Write `report.html` into a run folder from the files in it and return its path.

    The page is one file without outside fonts, scripts or requests. What a run lacks (controls, tasks, the end of
    the run itself) is left out with a sentence that says what would make it. Raises `IntarsiaError` where the folder
    is no run folder, or its summary is damaged or of another format.
    """
    run = read_run(Path(run_folder))
    made = sections.all_sections(run)
    page = (
        _templates()
        .get_template("page.html")
        .render(
            title=_title(run),
            headline=_headline(run),
            lede=_lede(run),
            facts=_facts(run),
            tiles=_tiles(run),
            sections=[s for s in made if not s.missing],
            missing=[s.missing for s in made if s.missing],
            wood=mosaic.wood(),
            picture_css=mosaic.style(),
            version=run.summary.get("intarsia", ""),
            finished=str(run.summary.get("finished") or "").replace("T", " "),
        )
    )
    path = run.folder / "report.html"
    write_text(path, page)
    return path


def _templates() -> Environment:
    templates = Environment(
        loader=PackageLoader("intarsia.report", "."),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    templates.filters["code"] = _code
    return templates


def _code(sentence: str) -> Markup:
    """Escape a sentence and set what stands in backticks as code."""
    return Markup(re.sub(r"`([^`]+)`", r"<code>\1</code>", str(escape(sentence))))


def _parent(run: Run) -> dict[str, Any]:
    return run.summary.get("parent") or {}


def _title(run: Run) -> str:
    return f"Intarsia: {_parent(run).get('name') or run.folder.resolve().name}"


def _headline(run: Run) -> list[tuple[str, bool]]:
    """The result in one sentence, as (text, stressed) parts."""
    s = run.summary
    speed, kl, top1 = (finite(s.get(k)) for k in ("speedup_measured", "kl", "top1"))
    parts: list[tuple[str, bool]] = []
    if speed is not None:
        parts.append((f"{speed:.2f} × faster", True))
    if kl is not None:
        parts.append((f"{number(kl, 2)} nats from its parent", False))
    if top1 is not None:
        parts.append((f"{percent(top1, places=0)} the same next token", False))
    return parts or [("This run has not finished yet" if not s.get("finished") else "A model made smaller", True)]


def _lede(run: Run) -> str:
    s = run.summary
    if not s:
        return (
            f"The page shows what {run.folder.resolve().name} has so far. Give the same `intarsia compress` "
            "command again: it continues where it stopped, and the rest of this page fills in."
        )
    child, parent = s.get("child") or {}, _parent(run)
    name = parent.get("name") or "the parent"
    rows = child.get("sites") or []
    if not rows:
        return f"Made from {name}. The child is not assembled yet; the same command again continues the run."
    kept = [p.state == "kept" for p in sites(s, rows)]
    has = finite(child.get("parameters")), finite(parent.get("parameters"))
    said = (
        f"{count(has[0])} of {name}’s {count(has[1])} parameters are left" if None not in has else f"Made from {name}"
    )
    return f"{said}; {sum(kept)} of its {len(kept)} blocks stand as they were."


def _facts(run: Run) -> list[str]:
    s = run.summary
    scenario, target = s.get("scenario") or {}, s.get("target") or {}
    facts = []
    if scenario:
        facts.append(
            f"{scenario.get('prompt', '?')} tokens read, {scenario.get('generated', '?')} written, "
            f"batch {scenario.get('batch', '?')}"
        )
    if target:
        facts.append("target " + ", ".join(f"{k} {v}" for k, v in target.items()))
    if exported := s.get("export"):
        facts.append(f"made for {exported.get('profile')}, written as {exported.get('format')}")
    facts += [str(s[k]) for k in ("device", "dtype") if s.get(k)]
    if s.get("seconds"):
        facts.append(f"made in {seconds(sum(finite(v) or 0 for v in s['seconds'].values()))}")
    return facts


def _tiles(run: Run) -> list[dict[str, str]]:
    s, parent, child = run.summary, _parent(run), run.summary.get("child") or {}
    memory = s.get("memory_bytes") or {}
    bits = s.get("bits_per_byte") or {}
    both = [((bits.get(who) or {}).get("all") or {}).get("value") for who in ("parent", "child")]
    ends = s.get("speedup_measured_spread") or []
    tiles = [
        (
            "speed",
            times(s.get("speedup_measured")),
            f"from {times(ends[0])} to {times(ends[1])} over repeats"
            if len(ends) == 2
            else "measured, the whole model",
        ),
        (
            "KL to the parent",
            number(s.get("kl"), 2),
            f"nats a token, ± {number(s.get('kl_se'), 2)}, held out",
        ),
        ("parameters", count(child.get("parameters")), f"of {count(parent.get('parameters'))}"),
        ("memory", size(memory.get("child")), f"of {size(memory.get('parent'))}, weights and cache"),
        ("bits per byte", number(both[1]), f"the parent has {number(both[0])}"),
    ]
    return [dict(zip(("name", "value", "note"), t)) for t in tiles if t[1] != wording.DASH]
