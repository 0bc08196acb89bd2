"""The end of the page: sample texts, where the time went, how to make the run again."""

from __future__ import annotations

from markupsafe import Markup, escape

from intarsia.report.parts import Section, Table
from intarsia.report.run import Run, flat, flat_recipe
from intarsia.report.wording import finite, percent, seconds, size

COLOURS = 9  # t0 .. t8 of the style sheet


def samples(run: Run) -> Section | None:
    sample = run.summary.get("sample") or {}
    if not sample.get("prompt"):
        return None
    column = Markup("<figure><figcaption>{}</figcaption><blockquote><span>{}</span>{}</blockquote></figure>")
    both = [column.format(who, sample["prompt"], str(sample[who])) for who in ("parent", "child") if sample.get(who)]
    return Section(
        "samples",
        "The same prompt, continued",
        "",
        Markup('<div class="pair samples">{}</div>').format(Markup("").join(both)),
    )


def time_spent(run: Run) -> Section | None:
    spent = {k: v for k, raw in (run.summary.get("seconds") or {}).items() if (v := finite(raw))}
    if not spent:
        spent = {k: v for k, d in run.stages.items() if (v := finite(d.get("seconds")))}
    if not spent:
        return None
    total = sum(spent.values())
    lede = f"{seconds(total)} in all" + (
        f", at most {size(run.summary['peak_rss_bytes'])} of memory."
        if finite(run.summary.get("peak_rss_bytes"))
        else "."
    )
    if not run.summary:
        lede = f"Stages finished so far, {seconds(total)} in all."
    bar = Markup("").join(
        Markup('<i class="t{}" style="flex-grow:{}" title="{}: {}"></i>').format(
            i % COLOURS, round(v / total * 1000, 2), k, seconds(v)
        )
        for i, (k, v) in enumerate(spent.items())
    )
    keys = Markup("").join(
        Markup('<li><i class="swatch t{}"></i>{} <b>{}</b> <span>{}</span></li>').format(
            i % COLOURS, k, seconds(v), percent(v / total, places=0)
        )
        for i, (k, v) in enumerate(spent.items())
    )
    return Section(
        "time",
        "Where the time went",
        lede,
        Markup('<div class="timebar">{}</div><ol class="times">{}</ol>').format(bar, keys),
    )


def reproduce(run: Run) -> Section | None:
    body, tables = Markup(""), []
    if command := run.summary.get("command"):
        body += Markup("<pre><code>{}</code></pre>").format(str(command))
    if note := (run.summary.get("parent") or {}).get("note"):
        body += Markup("<p>Parent: {}, {}.</p>").format(run.summary["parent"].get("name", ""), escape(note))
    for title, rows in (("The recipe", flat_recipe(run.recipe)), ("The environment", flat(run.environment))):
        if rows:
            tables.append(Table(["setting", "value"], [list(r) for r in rows], title))
    return Section("again", "Make it again", "", body, tuple(tables)) if body or tables else None
