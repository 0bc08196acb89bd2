"""What stands on the page, section by section: a picture, a sentence, the numbers behind it."""

from __future__ import annotations

from typing import Any

from markupsafe import Markup, escape

from intarsia.report import charts, figures, library, mosaic
from intarsia.report.frontier import curve, frontier
from intarsia.report.parts import Section, Table, legend, model_legend
from intarsia.report.run import Run, contenders, flat, flat_recipe, sites
from intarsia.report.svg import marker, picture
from intarsia.report.wording import count, finite, number, percent, seconds, size, times, with_error


def all_sections(run: Run) -> list[Section | None]:
    made = [
        what_stands,
        frontier_section,
        control_section,
        scores,
        *losses_and_costs(run),
        predictions,
        distillation,
        text_quality,
        tasks,
        samples,
        time_spent,
        reproduce,
    ]
    return [entry if isinstance(entry, Section | None) else entry(run) for entry in made]


def what_stands(run: Run) -> Section:
    rows = (run.summary.get("child") or {}).get("sites") or []
    title = "What stands where"
    if not rows:
        return Section(
            "mosaic",
            title,
            missing="No child yet: it is assembled after the search; run the same command again to continue.",
        )
    words = mosaic.describe(run.summary, rows)
    wide = mosaic.mosaic(
        run.summary,
        rows,
        width=1040,
        left=84,
        per_band=max(30, -(-len(rows) // 2)),
        label=words,
        class_="wide",
    )
    narrow = mosaic.mosaic(
        run.summary, rows, width=400, left=74, per_band=min(15, len(rows)), label=words, class_="narrow"
    )
    swatches = [
        ("a", "attention"),
        ("f", "FFN"),
        ("l", "one linear layer"),
        ("g", "cut away"),
        ("e", "removed whole"),
    ]
    swatch_legend = Markup('<p class="legend">{}</p>').format(
        Markup("").join(
            Markup('<span class="key"><i class="swatch s-{}"></i>{}</span>').format(k, name) for k, name in swatches
        )
    )
    known = {(p.layer, p.slot): p for p in sites(run.summary, rows)}
    table = [
        [
            str(r["layer"]),
            *(_said(known.get((r["layer"], slot))) for slot in ("attention", "ffn")),
            with_error(r.get("kl"), r.get("kl_se")),
            number(r.get("kl_attention")),
            number(r.get("kl_ffn")),
        ]
        for r in rows
    ]
    lede = (
        words
        + " Each piece is as high as the share of the parent’s weights that is left there; the pale outline is the parent."
    )
    return Section(
        "mosaic",
        title,
        lede,
        wide + narrow,
        legend=swatch_legend,
        tables=(Table(["layer", "attention", "FFN", "KL of the layer", "attention alone", "FFN alone"], table),),
    )


def _said(piece: Any) -> str:
    if piece is None:
        return "none in the parent"
    return {"kept": f"{piece.option} (kept)", "absent": "absent"}.get(
        piece.state, f"{piece.option} ({100 * piece.share:.0f} %)"
    )


def frontier_section(run: Run) -> Section:
    title = "How much quality the speed costs"
    wide, narrow = frontier(run.summary, 1040, 430, "wide"), frontier(run.summary, 420, 400, "narrow")
    if wide is None:
        return Section(
            "frontier",
            title,
            missing="No measured speed yet: the assembled child is timed and distilled at the end of the run.",
        )
    lede = "Solid marks are measured, with 95 % error bars. A thin line falls to each from where it stood before distillation"
    lede += (
        "; the dashed curve is what the search foresaw for every speed it could have been asked for, before any distillation."
        if len(curve(run.summary)) > 1
        else "."
    )
    rows = [
        [
            c.name,
            times(c.data.get("speedup_measured")),
            times(c.data.get("speedup_predicted")),
            with_error(c.data.get("kl"), c.data.get("kl_se")),
            number(c.data.get("kl_before_distillation")),
            with_error(_all_bits(c.data, c.name).get("value"), _all_bits(c.data, c.name).get("se")),
        ]
        for c in contenders(run.summary)
    ]
    tables = [
        Table(
            ["model", "speed measured", "predicted", "KL, nats", "KL before distillation", "bits per byte"],
            rows,
        )
    ]
    if curve(run.summary):
        tables.append(
            Table(
                ["speed-up foreseen", "KL foreseen, nats"],
                [[times(s), number(k)] for s, k in curve(run.summary)],
                "The curve of the search",
            )
        )
    return Section("frontier", title, lede, wide + narrow, tuple(tables), legend=model_legend(run))


def _all_bits(data: dict[str, Any], name: str) -> dict[str, Any]:
    bits = data.get("bits_per_byte") or {}
    return ((bits.get("child") if name == "child" else bits) or {}).get("all") or {}


def control_section(run: Run) -> Section:
    title = "The same speed by simpler means"
    controls = run.summary.get("controls") or {}
    if not controls:
        return Section(
            "controls",
            title,
            missing="This run has no controls: `intarsia compress … --controls` also builds a uniform, a depth-only, "
            "a greedy and a random child of the same speed and distils them with the same tokens.",
        )
    cards = []
    for c in [c for c in contenders(run.summary) if c.name == "child" or c.data.get("sites")]:
        rows = ((c.data.get("child") or {}) if c.name == "child" else c.data).get("sites") or []
        drawn = (
            mosaic.mosaic(run.summary, rows, width=320, label=f"{c.name}: {mosaic.describe(run.summary, rows)}")
            if rows
            else ""
        )
        mark = picture(14, 14, marker(c.shape, 7, 7, 4.6, c.class_), label=c.name)
        words = c.data.get("description") or ("what the search chose" if c.name == "child" else "")
        cards.append(
            Markup(
                '<figure class="card"><figcaption><b>{}{}</b><span>{}</span></figcaption>{}<p class="figures">'
                "<span><b>{}</b> nats</span><span><b>{}</b></span></p></figure>"
            ).format(mark, c.name, words, drawn, number(c.data.get("kl"), 2), times(c.data.get("speedup_measured")))
        )
    child, best = finite(run.summary.get("kl")), _best_control(run)
    lede = "Every control is timed on the same machine and distilled with as many tokens as the child."
    if child is not None and best is not None:
        name, kl = best
        lede += (
            f" The best of them, {name}, ends {kl / child:.2f} × as far from the parent as the child."
            if kl >= child
            else f" Here {name} does better than the child: {number(kl, 2)} against {number(child, 2)} nats."
        )
    return Section("controls", title, lede, Markup('<div class="cards">{}</div>').format(Markup("").join(cards)))


def _best_control(run: Run) -> tuple[str, float] | None:
    known = [(k, c.name) for c in contenders(run.summary) if c.name != "child" and (k := c.value("kl")) is not None]
    return min(known)[::-1] if known else None


def scores(run: Run) -> Section | None:
    drawn = [d for slot in ("attention", "ffn") if (d := library.strip(run, slot)) is not None]
    title = "Every option tried"
    if not drawn:
        return Section(
            "scores",
            title,
            missing="No scores yet: every option of the library is scored by the KL of the parent with that one block replaced.",
        )
    marks = legend(
        [
            ("circle", "k-child", "chosen"),
            ("circle", "ring-own", "chosen: the parent’s own, KL 0"),
            ("circle", "o-attention", "fewer heads"),
            ("circle", "o-ffn", "narrower FFN"),
            ("diamond", "o-linear", "one linear layer"),
            ("ring", "o-absent", "absent"),
        ]
    )
    rows = [
        [
            f"{r['layer']} {r['slot']}",
            r["option"],
            with_error(r.get("kl"), r.get("kl_se")),
            number(r.get("loss_before")),
            number(r.get("loss_after")),
            seconds(r.get("prefill_seconds")),
            seconds(r.get("decode_seconds")),
            size(r.get("weight_bytes")),
        ]
        for r in run.summary["options"]
    ]
    return Section(
        "scores",
        title,
        "The parent with one block replaced, layer by layer: how far its predictions move. Chosen options carry a bar. "
        "What lies far outside is clipped at the arrow, with its number and how many lie there.",
        Markup('<div class="pair">{}</div>').format(Markup("").join(drawn)),
        legend=marks,
        tables=(
            Table(
                ["site", "option", "KL, nats", "loss before", "after", "prefill", "decode", "weights"],
                rows,
                "The whole library",
            ),
        ),
    )


def losses_and_costs(run: Run) -> list[Section | None]:
    loss, cost = library.losses(run), figures.costs(run)
    first = (
        Section(
            "losses",
            "What local training brought",
            "Each option learns to imitate the parent’s block on the parent’s own activations. "
            "Hollow: as initialised. Solid: after. Bars: the middle half of the layers.",
            loss,
            half=True,
        )
        if loss
        else None
    )
    second = (
        Section(
            "costs",
            "What a block costs here",
            "Measured on this machine for the whole scenario.",
            cost,
            half=True,
            tables=(figures.cost_table(run),),
            legend=Markup(
                '<p class="legend"><span class="key"><i class="swatch s-p"></i>prefill</span><span class="key"><i class="swatch s-d"></i>decode</span></p>'
            ),
        )
        if cost
        else None
    )
    return [first, second]


def predictions(run: Run) -> Section | None:
    rows = figures.predicted(run.summary)
    if not rows:
        return None
    calibration = (run.summary.get("cost") or {}).get("calibration") or {}
    lede = "The search decides by predictions; here they meet the whole model. The band is ± 5 %."
    if (error := finite(calibration.get("error"))) is not None:
        lede += f" The calibrated predictor of time errs by {percent(error)} on models it was checked with."
    table = [[name, p, m, f"{100 * (a / b - 1):+.1f} %"] for name, a, b, p, m, _ in rows]
    return Section(
        "predictions",
        "Predicted against measured",
        lede,
        charts.deviations(rows, label="Predicted against measured"),
        half=True,
        tables=(Table(["", "predicted", "measured", "off by"], table),),
    )


def distillation(run: Run) -> Section | None:
    points = [
        (t, k)
        for r in run.summary.get("distillation") or []
        if (t := finite(r.get("tokens"))) is not None and (k := finite(r.get("kl"))) is not None
    ]
    title = "Distillation"
    if len(points) < 2:
        return Section(
            "distillation",
            title,
            half=True,
            missing="No distillation curve: this run has not distilled its child yet.",
        )
    lede = f"The assembled child learns from the parent on {count(points[-1][0])} tokens; the KL is on held-out text."
    return Section(
        "distillation",
        title,
        lede,
        charts.curve(points, label="KL over distilled tokens", unit="KL to the parent, nats"),
        half=True,
        tables=(Table(["tokens", "KL, nats"], [[count(t) if t else "0", number(k)] for t, k in points]),),
    )


def text_quality(run: Run) -> Section:
    return figures.measured(
        run,
        "bits",
        "Held-out text",
        "Bits a byte of text it has never seen, by kind of text; lower is better.",
        "No held-out text was measured yet; `intarsia eval` measures a finished child.",
    )


def tasks(run: Run) -> Section:
    return figures.measured(
        run,
        "tasks",
        "Tasks",
        "Share of questions answered as they should be; higher is better. Bars are 95 %, dotted lines are guessing.",
        "No task scores in this run: `intarsia fetch tasks`, then `intarsia eval CHILD --parent PARENT`, gives PIQA, HellaSwag, ARC-Easy and LAMBADA.",
    )


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
            i % 6, round(v / total * 1000, 2), k, seconds(v)
        )
        for i, (k, v) in enumerate(spent.items())
    )
    keys = Markup("").join(
        Markup('<li><i class="swatch t{}"></i>{} <b>{}</b> <span>{}</span></li>').format(
            i % 6, k, seconds(v), percent(v / total, places=0)
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
