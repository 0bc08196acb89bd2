"""What stands on the page, section by section: a picture, a sentence, the numbers behind it."""

from __future__ import annotations

from typing import Any

from markupsafe import Markup

from intarsia.report import closing, figures, library, mosaic, quality
from intarsia.report.frontier import curve, frontier
from intarsia.report.parts import Section, Table, legend, model_legend, swatches
from intarsia.report.run import Contender, Run, contenders, option_state, sites
from intarsia.report.svg import marker, picture
from intarsia.report.wording import finite, number, seconds, size, times, with_error


def all_sections(run: Run) -> list[Section]:
    """The page from top to bottom. A run without a summary has only its end: what it did so far, its recipe."""
    ending = [closing.time_spent, closing.reproduce]
    middle = [
        what_stands,
        frontier_section,
        control_section,
        scores,
        figures.losses,
        figures.costs,
        figures.predictions,
        figures.rounds,
        figures.tournament,
        figures.distillation,
        quality.text,
        quality.tasks,
        closing.samples,
    ]
    made = [draw(run) for draw in ((middle if run.summary else []) + ending)]
    return [section for section in made if section is not None]


def what_stands(run: Run) -> Section:
    rows = (run.summary.get("child") or {}).get("sites") or []
    title = "What stands where"
    if not rows:
        sentence = "No child: it is assembled after the search. The same command again continues the run."
        return Section("mosaic", title, missing=sentence)
    words = mosaic.describe(run.summary, rows)
    wide = mosaic.mosaic(run.summary, rows, **mosaic.wide(len(rows)), label=words, class_="wide")
    narrow = mosaic.mosaic(run.summary, rows, **mosaic.narrow(len(rows)), label=words, class_="narrow")
    known = {(p.layer, p.slot): p for p in sites(run.summary, rows)}
    states = {p.state for p in known.values()}
    kinds = [
        ("a", "attention", True),
        ("f", "FFN", True),
        ("m", "Mamba", any(p.option.startswith("mamba") for p in known.values())),
        ("l", "one linear layer", "linear" in states),
        ("g", "cut away", states & {"linear", "smaller"}),
        ("e", "removed whole", states & {"absent", "covered"}),
    ]
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
    columns = ["layer", "attention", "FFN", "KL of the layer", "attention alone", "FFN alone"]
    lede = (
        f"{words} Each piece is as high as the share of the parent’s weights that is left there; "
        "the pale outline is the parent."
    )
    key = swatches([(letter, words) for letter, words, occurs in kinds if occurs])
    return Section("mosaic", title, lede, wide + narrow, (Table(columns, table),), legend=key)


def _said(piece: Any) -> str:
    if piece is None:
        return "none in the parent"
    return {"kept": f"{piece.option} (kept)", "absent": "absent", "covered": "covered"}.get(
        piece.state, f"{piece.option} ({100 * piece.share:.0f} %)"
    )


def frontier_section(run: Run) -> Section:
    title = "How much quality the speed costs"
    wide, narrow = frontier(run.summary, 1040, 430, "wide"), frontier(run.summary, 420, 400, "narrow")
    if wide is None:
        sentence = "No measured speed: the assembled child is timed and distilled at the end of the run."
        return Section("frontier", title, missing=sentence)
    lede = (
        "Solid marks are measured; bars are 95 % for the KL and the spread of repeats for the speed. "
        "A thin line falls to each mark from where it stood before distillation"
    )
    seen = curve(run.summary)
    foreseen = "; the dashed curve is what the search foresaw for other speeds, before any distillation"
    lede += f"{foreseen if len(seen) > 1 else ''}."
    columns = [
        "model", "speed measured", "predicted", "KL, nats", "before distillation", "as assembled", "bits per byte"
    ]  # fmt: skip
    tables = [Table(columns, [_model_row(c) for c in contenders(run.summary)])]
    if seen:
        rows = [[times(speed), number(kl)] for speed, kl in seen]
        tables.append(Table(["speed-up foreseen", "KL foreseen, nats"], rows, "The curve of the search"))
    return Section("frontier", title, lede, wide + narrow, tuple(tables), legend=model_legend(run))


def _model_row(model: Contender) -> list[str]:
    bits = model.data.get("bits_per_byte") or {}
    whole = ((bits.get("child") if model.name == "child" else bits) or {}).get("all") or {}
    return [
        model.name,
        times(model.data.get("speedup_measured")),
        times(model.data.get("speedup_predicted")),
        with_error(model.data.get("kl"), model.data.get("kl_se")),
        number(model.data.get("kl_before_distillation")),
        number(model.data.get("kl_assembled")),
        with_error(whole.get("value"), whole.get("se")),
    ]


def control_section(run: Run) -> Section:
    title = "The same speed by simpler means"
    if not run.summary.get("controls"):
        sentence = (
            "No controls: `intarsia compress … --controls` also builds a uniform, a depth-only, a greedy and a "
            "random child of the same speed and distils them with the same tokens."
        )
        return Section("controls", title, missing=sentence)
    drawn = [(c, _rows_of(c)) for c in contenders(run.summary)]
    cards = Markup("").join(_card(run, c, rows) for c, rows in drawn)
    lede = "Every control is timed on the same machine and distilled with as many tokens as the child."
    child, best = finite(run.summary.get("kl")), _best_control(run)
    if child and best:
        name, kl = best
        better = f" Here {name} does better than the child: {number(kl, 2)} against {number(child, 2)} nats."
        worse = f" The best of them, {name}, ends {kl / child:.2f} × as far from the parent as the child."
        lede += worse if kl >= child else better
    return Section(
        "controls", title, lede, Markup('<div class="cards">{}</div>').format(cards), _site_table(run, drawn)
    )


def _rows_of(model: Contender) -> list[dict[str, Any]]:
    holder = model.data.get("child") or {} if model.name == "child" else model.data
    return holder.get("sites") or []


def _card(run: Run, model: Contender, rows: list[dict[str, Any]]) -> Markup:
    """A model's small mosaic, what it is, and its two figures."""
    said = f"{model.name}: {mosaic.describe(run.summary, rows)}"
    words = model.data.get("description") or ("what the search chose" if model.name == "child" else "")
    return Markup(
        '<figure class="card"><figcaption><b>{}{}</b><span>{}</span></figcaption>{}<p class="figures">'
        "<span><b>{}</b> nats</span><span><b>{}</b></span></p></figure>"
    ).format(
        picture(14, 14, marker(model.shape, 7, 7, 4.6, model.class_), label=model.name),
        model.name,
        words,
        mosaic.mosaic(run.summary, rows, width=320, label=said) if rows else "",
        number(model.data.get("kl"), 2),
        times(model.data.get("speedup_measured")),
    )


def _site_table(run: Run, models: list[tuple[Contender, list[dict[str, Any]]]]) -> tuple[Table, ...]:
    """What stands at each site, a column a model."""
    named = [(c.name, {(p.layer, p.slot): p.option for p in sites(run.summary, rows)}) for c, rows in models if rows]
    places = sorted({place for _, options in named for place in options})
    rows = [[f"{layer} {slot}", *(o.get((layer, slot), "") for _, o in named)] for layer, slot in places]
    return (Table(["site", *(name for name, _ in named)], rows, "Site by site"),) if rows else ()


def _best_control(run: Run) -> tuple[str, float] | None:
    known = [(k, c.name) for c in contenders(run.summary) if c.name != "child" and (k := c.value("kl")) is not None]
    return min(known)[::-1] if known else None


RARER = {
    "mamba": ("circle", "o-mamba", "Mamba-2"),
    "linear": ("diamond", "o-linear", "one linear layer"),
    "absent": ("ring", "o-absent", "absent"),
}


def scores(run: Run) -> Section | None:
    drawn = [d for slot in ("attention", "ffn") if (d := library.strip(run, slot)) is not None]
    title = "Every option tried"
    if not drawn:
        sentence = "No scores: they are the KL of the parent with one block replaced, for every option of the library."
        return Section("scores", title, missing=sentence)
    there = {option_state(row["option"], None) for row in run.summary["options"]}
    marks = legend(
        [
            ("circle", "k-child", "chosen"),
            ("circle", "ring-own", "chosen: the parent’s own, KL 0"),
            ("circle", "o-attention", "fewer heads"),
            ("circle", "o-ffn", "narrower FFN"),
            *(mark for state, mark in RARER.items() if state in there),
        ]
    )
    lede = (
        "The parent with one block replaced, layer by layer: how far its predictions move. Where children are mended, "
        "the block before takes over what is left out. Chosen options carry a bar. What lies far outside is clipped at "
        "the arrow, with the worst number and how many lie there."
    )
    columns = ["site", "option", "KL, nats", "loss before", "after", "prefill", "decode", "weights"]
    table = Table(columns, [_option_row(r) for r in run.summary["options"]], "The whole library")
    body = Markup('<div class="pair">{}</div>').format(Markup("").join(drawn))
    return Section("scores", title, lede, body, (table,), legend=marks)


def _option_row(row: dict[str, Any]) -> list[str]:
    return [
        f"{row['layer']} {row['slot']}",
        row["option"],
        with_error(row.get("kl"), row.get("kl_se")),
        number(row.get("loss_before")),
        number(row.get("loss_after")),
        seconds(row.get("prefill_seconds")),
        seconds(row.get("decode_seconds")),
        size(row.get("weight_bytes")),
    ]
