"""A run in which only spans can meet the target: what it leaves, and the same run killed while they are fitted."""

import json
import time
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file

import intarsia
from intarsia.base.files import read_json
from tiny_compression import ARCH, compress, make_parent, make_recipe, make_text, start

SETTINGS = ("options.spans=[2,3]", 'options.span_methods=["fold"]', "options.ffn_widths=[]", "options.kv_methods=[]",
            "options.linear=false", "options.absent=false", "cost.repeats=1", "cost.calibration=0",
            "library.refit_tokens=8192", "distill.cosine_weight=0.5", "search.calibrations=1")  # fmt: skip
LAYER = 64 + 12_288 + 64 + 36_864  # parameters of one layer of the parent, with its norms


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("spans")
    parent, data = make_parent(folder / "parent"), make_text(folder / "text")
    # Two of four layers have to go.
    recipe = make_recipe(folder / "tiny.toml", data, f"params = {400 * 64 + 64 + 2.1 * LAYER}")
    words = (parent, "--recipe", recipe, *(w for s in SETTINGS for w in ("--set", s)))
    status, out, err = compress(*words, "--out", folder / "whole")
    assert status == 0, err
    process = start(*words, "--out", folder / "killed")
    mark = folder / "killed" / "stages" / "spans" / "attempt.json"
    while not mark.exists() and process.poll() is None:
        time.sleep(0.01)
    process.kill()
    process.communicate()
    seen = {path.parent.name for path in (folder / "killed").glob("stages/*/done.json")}
    status, _, err = compress(*words, "--out", folder / "killed")
    assert status == 0, err
    summary = json.loads((folder / "whole" / "summary.json").read_text(), parse_constant=pytest.fail)
    return SimpleNamespace(folder=folder, words=words, seen=seen, summary=summary, out=out)


def test_the_child_has_spans(runs):
    rows = runs.summary["child"]["sites"]
    names = [row["ffn"]["option"] for row in rows]
    assert names.count("covered") == 2 and 1 <= sum(name.startswith("fold") for name in names) <= 2
    for at, row in enumerate(rows):
        if row["ffn"]["option"].startswith("fold"):
            length = int(row["ffn"]["option"].split()[1])
            assert row["span"] == length and row["kl"] > 0 and row["kl_se"] > 0
            for under in rows[at + 1 : at + length]:
                assert under["attention"] == under["ffn"] == {"option": "covered", "block": None} and under["kl"] == 0
    model, tokenizer = intarsia.load(runs.folder / "whole" / "child")
    assert model.arch.blocks == ARCH.blocks[:4]
    assert runs.summary["parameters"] == sum(p.numel() for p in model.parameters())
    assert len(list(intarsia.generate(model, tokenizer.encode("def parse(text):"), 8, stop_ids=()))) == 8
    assert sum(row["kl"] for row in rows) == pytest.approx(runs.summary["kl_predicted"])


def test_the_summary_names_every_span(runs):
    spans = runs.summary["spans"]
    assert [(s["layer"], s["layers"], s["option"]) for s in spans] == [
        (0, 2, "fold 2"), (0, 3, "fold 3"), (1, 2, "fold 2"), (1, 3, "fold 3"), (2, 2, "fold 2")
    ]  # fmt: skip
    assert any(span["loss_after"] < span["loss_before"] for span in spans)
    layer = [row for row in runs.summary["options"] if row["layer"] == 0]
    for span in spans:
        assert 0 < span["loss_after"] <= span["loss_before"] < 1.5 and span["kl"] > 0
        assert span["weight_bytes"] == sum(row["weight_bytes"] for row in layer)  # one layer's, all alike here
        assert span["decode_seconds"] == pytest.approx(sum(row["decode_seconds"] for row in layer))
    page = (runs.folder / "whole" / "report.html").read_text()
    assert "fitted to stand for several" in page and "covered by a layer before it" in page


def test_a_run_killed_while_it_fits_comes_to_the_same(runs):
    assert {"library", "cost"} <= runs.seen and not {"spans", "score"} & runs.seen
    for file in ("stages/spans/block_001.safetensors", "child/model.safetensors"):
        one, other = (load_file(runs.folder / name / file) for name in ("whole", "killed"))
        assert one.keys() == other.keys() and all(torch.equal(one[n], other[n]) for n in one)


def test_other_spans_leave_the_library_as_it_is(runs):
    more = ("--set", "options.spans=[2]")
    status, out, err = compress(*runs.words, *more, "--out", runs.folder / "killed")
    assert status == 0, err
    assert all(f"{stage}: already done" in out for stage in ("cost", "importance", "library"))
    assert "spans: already done" not in out and "spans: already done" not in runs.out
    assert [s["option"] for s in read_json(runs.folder / "killed" / "summary.json")["spans"]] == ["fold 2"] * 3
