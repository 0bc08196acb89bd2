"""The page as a whole: from a run folder of realistic size, from one that lacks parts, from what is no run folder."""

from __future__ import annotations

import copy
import json
import shutil
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path
from xml.etree import ElementTree

import pytest

from intarsia import report
from intarsia.base.errors import IntarsiaError

SAMPLE = Path(__file__).parent / "data" / "run"
VOID = {"meta", "link", "br", "img", "input", "hr"}


@pytest.fixture
def run(tmp_path: Path) -> Path:
    return Path(shutil.copytree(SAMPLE, tmp_path / "run"))


@pytest.fixture
def summary() -> dict:
    return json.loads((SAMPLE / "summary.json").read_text())


def drawn(folder: Path, summary: dict | None = None) -> str:
    if summary is not None:
        (folder / "summary.json").write_text(json.dumps(summary))
    return report.render(folder).read_text(encoding="utf-8")


class Page(HTMLParser):
    """Checks that elements nest, and collects ids, attributes that could fetch, and the text outside scripts."""

    def __init__(self, html: str):
        super().__init__()
        self.open: list[str] = []
        self.ids: list[str] = []
        self.links: list[str] = []
        self.words = ""
        self.feed(html)
        assert self.open == []

    def handle_starttag(self, tag, attributes):
        if tag not in VOID:
            self.open.append(tag)
        self._note(attributes)

    def handle_startendtag(self, tag, attributes):
        self._note(attributes)

    def _note(self, attributes):
        for key, value in attributes:
            if key == "id":
                self.ids.append(value)
            if key in ("src", "href", "xlink:href", "srcset", "data"):
                self.links.append(value)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if not self.open or self.open[-1] not in ("script", "style"):
            self.words += data


def test_page_is_one_small_offline_file(run: Path):
    before = {p: p.read_bytes() for p in run.rglob("*") if p.is_file()}
    path = report.render(run)
    assert path == run / "report.html" and path.stat().st_size < 1_000_000
    html = path.read_text(encoding="utf-8")
    page = Page(html)
    assert page.links == [] and "@import" not in html and "url(http" not in html
    assert len(page.ids) == len(set(page.ids))
    assert {p: p.read_bytes() for p in run.rglob("*") if p.is_file() and p != path} == before


def test_every_part_of_a_finished_run_is_there(run: Path, summary: dict):
    page = Page(drawn(run))
    wanted = [
        "mosaic",
        "frontier",
        "controls",
        "scores",
        "losses",
        "costs",
        "predictions",
        "distillation",
        "bits",
        "tasks",
        "samples",
        "time",
        "again",
    ]
    assert [i for i in page.ids if i in wanted] == wanted and "missing" not in page.ids
    for words in (
        "1.34 × faster, 0.32 nats from its parent, 71 % the same next token.",
        summary["command"],
        summary["device"],
        summary["sample"]["child"],
        "134.5 M",
        "PIQA",
        "every FFN at 832 channels",
    ):
        assert words in page.words, words
    for name, control in summary["controls"].items():
        assert f"{name} {control['kl']:.2f}" in page.words  # its name on the frontier


def test_parts_that_a_run_lacks_are_named_with_what_makes_them(run: Path, summary: dict):
    for key, section, remedy in (
        ("controls", "controls", "--controls"),
        ("tasks", "tasks", "intarsia fetch tasks"),
        ("distillation", "distillation", "distilled"),
        ("options", "scores", "one block replaced"),
    ):
        less = copy.deepcopy(summary)
        for holder in (less, *less["controls"].values()):
            holder.pop(key, None)
        page = Page(drawn(run, less))
        assert section not in page.ids and "missing" in page.ids
        assert remedy in page.words, key


CONTENT = json.loads((SAMPLE / "summary.json").read_text())


@pytest.mark.parametrize("key", [k for k, v in CONTENT.items() if isinstance(v, (dict, list))])
def test_any_single_part_may_be_null(run: Path, summary: dict, key: str):
    Page(drawn(run, {**summary, key: None}))


def test_all_single_figures_may_be_null(run: Path, summary: dict):
    scalars = {k: None for k, v in summary.items() if not isinstance(v, (dict, list)) and k != "format"}
    Page(drawn(run, {**summary, **scalars}))


def test_a_summary_with_nothing_in_it_still_makes_a_page(run: Path):
    page = Page(drawn(run, {"format": 1}))
    assert "again" in page.ids and "missing" in page.ids and "mosaic" not in page.ids


def test_unfinished_run_shows_its_stages(run: Path):
    (run / "summary.json").unlink()
    page = Page(drawn(run))
    assert "has not finished yet" in page.words and "library 2 min 51 s" in " ".join(page.words.split())
    assert page.ids.count("mosaic") == 0 and "again" in page.ids


def test_numbers_that_are_not_finite_do_not_reach_the_drawing(run: Path, summary: dict):
    nan, inf = float("nan"), float("inf")
    summary["options"][3]["kl"], summary["options"][9]["kl"], summary["options"][20]["kl"] = inf, nan, None
    summary["controls"]["random"].update(kl=nan, kl_before_distillation=inf)
    summary["distillation"][2]["kl"] = nan
    summary["tasks"]["piqa"]["child"]["value"] = nan
    html = drawn(run, summary)
    drawing = [word for word in html.replace('"', " ").split() if word.lower() in ("nan", "inf", "-inf", "infinity")]
    assert drawing == [] and "∞" in html


def test_text_of_the_run_cannot_become_markup(run: Path, summary: dict):
    evil = '</svg><script>alert("x")</script><b>&'
    summary["sample"]["child"] = summary["command"] = summary["device"] = evil
    summary["controls"]["uniform"]["description"] = summary["parent"]["name"] = evil
    summary["options"][1]["option"] = summary["cost"]["blocks"][0]["option"] = evil
    summary["controls"][evil] = summary["controls"].pop("greedy")
    summary["bits_per_byte"]["child"][evil] = {"value": 1.0, "se": 0.01}
    summary["seconds"][evil] = 4.0
    html = drawn(run, summary)
    assert html.count("<script>") == 1 and "<b>&" not in html
    assert evil in Page(html).words


def test_a_deep_model_stays_under_a_megabyte(run: Path, summary: dict):
    def deeper(rows):
        return [{**row, "layer": row["layer"] + 30 * k} for k in range(4) for row in rows]

    summary["parent"]["architecture"]["blocks"] *= 4
    summary["options"] = deeper(summary["options"])
    for holder in (summary["child"], *summary["controls"].values()):
        holder["sites"] = deeper(holder["sites"])
    html = drawn(run, summary)
    assert len(html.encode()) < 1_000_000
    assert "more rows are in summary.json" in Page(html).words


def test_rendering_twice_gives_the_same_bytes(run: Path):
    assert drawn(run) == drawn(run)


def test_what_is_no_run_folder_gets_a_sentence(tmp_path: Path, run: Path, summary: dict):
    with pytest.raises(IntarsiaError, match="is no folder"):
        report.render(tmp_path / "nowhere")
    with pytest.raises(IntarsiaError, match="is no run folder"):
        report.render(tmp_path)
    with pytest.raises(IntarsiaError, match="format 7"):
        drawn(run, {**summary, "format": 7})
    (run / "summary.json").write_text('{"format": 1, "par')
    with pytest.raises(IntarsiaError, match="not readable as JSON"):
        report.render(run)
    (run / "summary.json").write_text("[1]")
    with pytest.raises(IntarsiaError, match="holds a list"):
        report.render(run)
    assert not (run / "report.html").exists()


def test_mosaic_picture_stands_alone(summary: dict):
    root = ElementTree.fromstring(report.mosaic_svg(summary))
    space = "{http://www.w3.org/2000/svg}"
    assert root.tag == f"{space}svg"
    assert len(root.findall(f"{space}g")) == 60
    assert "prefers-color-scheme" in root.find(f"{space}style").text
    defined = {e.get("id") for e in root.iter() if e.get("id")}
    used = {e.get("fill")[5:-1] for e in root.iter() if (e.get("fill") or "").startswith("url(#")}
    assert used and used <= defined


def test_report_needs_no_torch():
    code = "import sys, intarsia.report; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
