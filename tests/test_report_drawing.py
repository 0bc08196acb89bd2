"""The pure functions under the pictures: scales, label spreading, numbers in words, what a cell stands for."""

from __future__ import annotations

import itertools
import json
import math
import re
from pathlib import Path
from xml.etree import ElementTree

import pytest
from hypothesis import given
from hypothesis import strategies as st

from intarsia.arch import Attention, FeedForward, block_to_dict
from intarsia.report import charts, wording
from intarsia.report.frontier import frontier
from intarsia.report.library import limits, strip
from intarsia.report.mosaic import mosaic
from intarsia.report.run import Run, sites
from intarsia.report.scale import Scale, fit, spread

SUMMARY = json.loads((Path(__file__).parent / "data" / "run" / "summary.json").read_text())
SVG = "{http://www.w3.org/2000/svg}"


@given(st.lists(st.floats(0, 300), min_size=1, max_size=12), st.floats(1, 20))
def test_spread_labels_keep_order_distance_and_bounds(wanted: list[float], gap: float):
    placed = spread(wanted, gap, 0, 300)
    ordered = [placed[i] for i in sorted(range(len(wanted)), key=lambda i: wanted[i])]
    assert all(b - a >= gap - 1e-6 for a, b in itertools.pairwise(ordered))
    assert min(placed) >= -1e-6 and max(placed) <= 300 + 1e-6


def test_labels_that_do_not_collide_stay_where_they_are():
    assert spread([10.0, 200.0, 90.0], 15, 0, 300) == [10.0, 200.0, 90.0]


@given(st.floats(1e-6, 1e6), st.floats(1.001, 1e6), st.booleans())
def test_ticks_lie_inside_and_are_few(lo: float, factor: float, log: bool):
    scale = Scale(lo, lo * factor, 0, 400, log=log)
    ticks = scale.ticks(5)
    assert len(ticks) <= 11
    assert all(lo * 0.998 <= t <= lo * factor * 1.002 for t in ticks)
    assert ticks == sorted(ticks)


def test_a_wide_span_gets_a_logarithmic_axis_and_a_single_value_still_a_scale():
    assert fit([0.01, 5.0], 0, 100).log and not fit([1.0, 3.0], 0, 100).log and not fit([0.0, 50.0], 0, 100).log
    only = fit([0.3], 0, 100)
    assert 0 < only(0.3) < 100
    assert fit([], 0, 100).ticks()


@pytest.mark.parametrize(
    ("said", "expected"),
    [
        (wording.number(0.01234), "0.0123"),
        (wording.number(457.2), "457"),
        (wording.number(0), "0"),
        (wording.number(None), "–"),
        (wording.number(math.nan), "–"),
        (wording.number(math.inf), "–"),
        (wording.with_error(0.3201, 0.0113), "0.320 ± 0.011"),
        (wording.with_error(0.32, None), "0.320"),
        (wording.percent(0.7141, places=0), "71 %"),
        (wording.count(134_515_008), "134.5 M"),
        (wording.size(215_000_000), "215 MB"),
        (wording.seconds(0.00482), "4.82 ms"),
        (wording.seconds(185), "3 min 05 s"),
        (wording.times(1.338), "1.34 ×"),
        (wording.number(True), "–"),
    ],
)
def test_numbers_in_words(said: str, expected: str):
    assert said == expected


def row(attention, ffn) -> dict:
    def described(block):
        return {"option": "x", "block": None if block is None else block_to_dict(block)}

    return {"layer": 0, "attention": described(attention), "ffn": described(ffn)}


def test_a_site_says_what_is_left_of_the_parents_block():
    kept, half = sites(SUMMARY, [row(Attention(9, 3, 64), FeedForward(768))])
    assert (kept.state, kept.share) == ("kept", 1.0)
    assert (half.state, half.share) == ("smaller", 0.5)
    fewer, gone = sites(SUMMARY, [row(Attention(3, 1, 64), None)])
    assert fewer.state == "smaller" and fewer.share == pytest.approx(1 / 3)
    assert (gone.state, gone.share, gone.option) == ("absent", 0.0, "absent")


def heights(svg: str, class_: str) -> list[float]:
    return [float(e.get("height")) for e in ElementTree.fromstring(svg).iter(f"{SVG}rect") if e.get("class") == class_]


def test_the_height_of_a_piece_is_its_share():
    svg = mosaic(SUMMARY, [row(Attention(9, 3, 64), FeedForward(width)) for width in (1536,)], width=100, label="")
    whole = heights(svg, "w-ffn")[0]
    for width in (384, 768, 1152):
        svg = mosaic(SUMMARY, [row(None, FeedForward(width))], width=100, label="")
        assert heights(svg, "w-ffn") == [pytest.approx(whole * width / 1536, abs=0.1)]
        assert heights(svg, "w-attention") == []


def test_outliers_do_not_set_the_axis_and_are_counted():
    low, high = limits([0.01 * i for i in range(1, 100)] + [457.0])
    assert high < 10 and low <= 0.01
    text = " ".join(
        e.text or "" for e in ElementTree.fromstring(strip(Run(Path("."), SUMMARY), "ffn")).iter(f"{SVG}text")
    )
    worst = max(r["kl"] for r in SUMMARY["options"] if r["slot"] == "ffn")
    assert re.search(rf"\b{wording.number(worst, 2)} ×\d", text)


def test_models_lie_on_the_frontier_where_their_figures_say():
    root = ElementTree.fromstring(frontier(SUMMARY, 1040, 430, "wide"))
    marks = {t.text.split(":")[0]: e for e in root.iter() for t in e.findall(f"{SVG}title") if "measured" in t.text}
    assert set(marks) == {"child", *SUMMARY["controls"]}
    depth = [float(v) for v in re.findall(r"[\d.]+", marks["depth"].get("d"))[:2]]
    child = float(marks["child"].get("cx")), float(marks["child"].get("cy"))
    assert depth[0] > child[0] and depth[1] < child[1]  # faster, and further from the parent (up)


def test_a_far_deviation_is_clipped_with_its_number():
    svg = charts.deviations([("KL", 3.0, 1.0, "3", "1", "k-child")], label="")
    assert "+200 %" in svg
    assert "+4 %" not in charts.deviations([("KL", 1.04, 1.0, "1.04", "1", "k-child")], label="").split("</title>")[1]
