"""Scores against a KL in float64 from whole logits, of models put together by hand; compositions; interruption."""

import dataclasses
import itertools
import json
import math

import pytest
import torch
import torch.nn.functional as F

from compress_toys import ALL, PLAIN, SMALL, all_options, sites, statistics, tokens, toy
from intarsia.arch import Architecture, Attention, FeedForward
from intarsia.base.errors import IntarsiaError
from intarsia.base.files import read_jsonl
from intarsia.compress.assemble import assemble, independent
from intarsia.compress.library import Builder, Library
from intarsia.compress.recipe import Library as Recipe
from intarsia.compress.score import Scored, Scorer, compose, count_measurements, mean_and_se, score_library
from intarsia.compress.solve import Bound, Option, solve

IDS = tokens(3, 20, seed=300)
STRIDE = 3
POSITIONS = [2, 5, 8, 11, 14, 17]  # every third token that has a next one


def library_of(model, folder):
    made = Builder(model, all_options(model), statistics(model, 4), Recipe(tokens=0), "refit", folder)
    losses = made.losses(IDS)
    made.store(losses, losses)
    return Library.open(folder, model)


def choice_of(model, layer, attention, ffn):
    """The parent with one layer replaced, by option names."""
    options, result = all_options(model), []
    for site in sites(model):
        names = (attention, ffn) if site.layer == layer else ("parent", "parent")
        pair = zip((site.attention, site.ffn), names)
        result.append(tuple(None if i is None else next(s for s in options[i] if s.name == n) for i, n in pair))
    return result


@torch.no_grad()
def figures(parent, child):
    """Of every sequence, from all logits in float64: KL, loss of the child beyond the parent's, 1 - cosine."""
    parent, child = (independent(m).double() for m in (parent, child))
    p, q = (F.log_softmax(m(IDS)[:, POSITIONS], -1) for m in (parent, child))
    following = IDS[:, [t + 1 for t in POSITIONS]]
    loss_p, loss_q = (-x.gather(-1, following[..., None]).mean((1, 2)) for x in (p, q))
    kl = (p.exp() * (p - q)).sum(-1).mean(-1)
    cosine = F.cosine_similarity(parent.hidden(IDS)[:, POSITIONS], child.hidden(IDS)[:, POSITIONS], dim=-1).mean(-1)
    return {"kl": kl, "lm_loss": loss_q - loss_p, "cosine": 1 - cosine}


@pytest.mark.parametrize("arch", ALL.values(), ids=ALL)
def test_every_score_is_that_of_the_model_built_by_hand(tmp_path, arch):
    model = toy(arch)
    library, where, options = library_of(model, tmp_path), sites(model), all_options(model)
    rows = score_library(Scorer(model, IDS, STRIDE), library, where, options, tmp_path / "scores.jsonl")
    assert len(rows) == count_measurements(where, options) == len({(r.layer, r.attention, r.ffn) for r in rows})
    assert {(r.layer, r.attention) for r in rows if r.ffn == "parent"} == {
        (site.layer, spec.name) for site in where for spec in options[site.attention][1:]
    }
    pairs = [r for r in rows if "parent" not in (r.attention, r.ffn)]
    assert [r.layer for r in pairs] == [0, 0, 1, 1]  # a typical one and the layer left out
    assert [(r.attention, r.ffn) for r in pairs[1::2]] == [("none", "none")] * 2
    for row in rows:
        child = assemble(library, where, choice_of(model, row.layer, row.attention, row.ffn))
        for name, values in figures(model, child).items():
            mean, se = float(values.mean()), float(values.std() / math.sqrt(len(values)))
            assert getattr(row, name) == pytest.approx(mean, rel=2e-3, abs=2e-5), (row, name)
            assert getattr(row, f"{name}_se") == pytest.approx(se, rel=1e-2, abs=2e-5), (row, name)
    kl = [r.kl for r in rows]
    assert min(kl) > 1e-4 and max(kl) > 10 * min(kl)  # nothing here is close by being nothing


def test_the_parent_scores_nothing():
    for arch in ALL.values():
        model = toy(arch)
        scorer = Scorer(model, IDS, STRIDE)
        for start in range(len(arch.blocks) + 1):
            found = scorer.measure(model.run(model.embed_tokens(IDS), 0, start), start)
            assert all(abs(value) < 1e-5 for value in found.values())
            x = model.run(model.embed_tokens(IDS), 0, start)
            if start < len(arch.blocks):
                torch.testing.assert_close(scorer.change(x, model.blocks[start]), model.run(x, start, start + 1))
            assert torch.equal(scorer.change(x, None), x)


def test_bfloat16_parents_are_scored_in_float32(tmp_path):
    """The error of the scores is that of the stream, not of logits rounded to eight bits."""
    exact = toy(PLAIN, dtype=torch.bfloat16)
    library = library_of(exact, tmp_path)
    rows = score_library(Scorer(exact, IDS, STRIDE), library, sites(exact), all_options(exact), tmp_path / "s.jsonl")
    scorer = Scorer(exact, IDS, STRIDE)
    assert scorer.last.dtype == scorer.parent[0].dtype == torch.float32
    assert abs(scorer.measure(exact.run(exact.embed_tokens(IDS)), len(PLAIN.blocks))["kl"]) < 1e-6
    for row in rows:
        child = assemble(library, sites(exact), choice_of(exact, row.layer, row.attention, row.ffn))
        assert row.kl == pytest.approx(float(figures(exact, child)["kl"].mean()), rel=0.25, abs=0.01)


@pytest.mark.parametrize("length, stride, expected", [
    (20, 3, POSITIONS), (8, 1, list(range(7))), (8, 4, [3]), (9, 4, [3, 7]),
])  # fmt: skip
def test_only_positions_with_a_next_token_are_scored(length, stride, expected):
    assert Scorer(toy(PLAIN), tokens(2, length), stride).positions.tolist() == expected


def test_a_layer_of_one_block_is_scored_alone(tmp_path):
    arch = Architecture(blocks=(FeedForward(24), Attention(4, 2, 8), Attention(2, 1, 8), FeedForward(24)), **SMALL)
    model = toy(arch)
    library, where = library_of(model, tmp_path), sites(model)
    assert [(s.attention, s.ffn) for s in where] == [(None, 0), (1, None), (2, 3)]
    rows = score_library(Scorer(model, IDS, STRIDE), library, where, all_options(model), tmp_path / "s.jsonl")
    assert len(rows) == count_measurements(where, all_options(model))
    for row in rows:
        child = assemble(library, where, choice_of(model, row.layer, row.attention, row.ffn))
        assert row.kl == pytest.approx(float(figures(model, child)["kl"].mean()), rel=2e-3, abs=2e-5)
    scores = compose(rows, "kl")
    assert {f for layer, a, f in scores if layer == 0} == {s.name for s in all_options(model)[0]}
    assert {a for layer, a, f in scores if layer == 0} == {"parent"}


# Interruption


def test_what_is_in_the_file_is_not_measured_again(tmp_path, monkeypatch):
    model = toy(PLAIN)
    library, where, options = library_of(model, tmp_path), sites(model), all_options(model)
    count, file = count_measurements(where, options), tmp_path / "scores.jsonl"
    measured = []
    measure = Scorer.measure
    monkeypatch.setattr(Scorer, "measure", lambda self, *a: measured.append(1) or measure(self, *a))
    advanced = []
    whole = score_library(Scorer(model, IDS, STRIDE), library, where, options, file, lambda: advanced.append(1))
    assert len(measured) == len(advanced) == count
    lines = file.read_text().splitlines()
    for kept, torn in ((0, True), (5, False), (7, True), (count - 1, True), (count, False)):
        text = "".join(line + "\n" for line in lines[:kept])
        file.write_text(text + (lines[kept][:25] if torn else ""))
        measured.clear()
        rows = score_library(Scorer(model, IDS, STRIDE), library, where, options, file)
        assert len(measured) == count - kept
        assert rows == whole
        stored = read_jsonl(file)
        assert len(stored) == count == len({(r["layer"], r["attention"], r["ffn"]) for r in stored})
        assert [json.dumps(r) for r in stored] == lines


def test_mean_and_standard_error():
    assert mean_and_se([1.0, 2.0, 6.0]) == (3.0, pytest.approx(math.sqrt((4 + 1 + 9) / 2 / 3)))
    mean, se = mean_and_se([2.0])
    assert mean == 2.0 and math.isnan(se)


# Compositions


def row(layer, attention, ffn, kl):
    return Scored(layer, attention, ffn, kl, 0.0, 2 * kl, 0.0, 0.5 * kl, 0.0)


ROWS = [
    row(0, "a1", "parent", 0.09), row(0, "a2", "parent", 0.16), row(0, "parent", "f1", 0.04),
    row(0, "parent", "f2", 0.25), row(0, "a1", "f2", 0.09 + 0.25 - 0.5 * 0.15),
]  # fmt: skip


def test_the_coupling_reproduces_the_measured_pair_and_predicts_the_others():
    found = compose(ROWS, "kl")
    assert len(found) == 9 and found[0, "parent", "parent"] == 0.0
    for r in ROWS:
        assert found[0, r.attention, r.ffn] == pytest.approx(r.kl)
    assert found[0, "a2", "f2"] == pytest.approx(0.16 + 0.25 - 0.5 * 0.4 * 0.5)  # the formula with c = -1/2
    assert found[0, "a1", "f1"] == pytest.approx(max(0.09 + 0.04 - 0.5 * 0.06, 0.09))
    assert compose(ROWS, "lm_loss")[0, "a1", "f2"] == pytest.approx(2 * ROWS[-1].kl)
    assert compose(ROWS, "cosine")[0, "a2", "parent"] == pytest.approx(0.08)
    alone = compose(ROWS[:4], "kl")  # nothing composed was measured: the sum
    assert alone[0, "a2", "f2"] == pytest.approx(0.41)


def test_the_coupling_is_the_layers_own():
    other = [dataclasses.replace(r, layer=1) for r in ROWS[:4]] + [row(1, "a1", "f2", 0.09 + 0.25 + 0.15)]
    found = compose(ROWS + other, "kl")
    assert found[0, "a2", "f2"] == pytest.approx(0.41 - 0.1)
    assert found[1, "a2", "f2"] == pytest.approx(0.41 + 0.2)


@pytest.mark.parametrize("joint", [0.0, 0.1, 0.25, 0.3, 0.5, 0.64, 3.0])
def test_a_pair_is_never_predicted_better_than_its_worse_half_nor_beyond_the_quadratic_form(joint):
    found = compose([*ROWS[:4], row(0, "a1", "f2", joint)], "kl")
    assert found[0, "a1", "f2"] == joint  # as measured, whatever the form allows
    for a, f in (("a2", "f1"), ("a2", "f2"), ("a1", "f1")):
        x, y = found[0, a, "parent"], found[0, "parent", f]
        assert max(x, y) - 1e-12 <= found[0, a, f] <= x + y + 2 * math.sqrt(x * y) + 1e-12


@pytest.mark.parametrize("bad", [math.inf, -math.inf, math.nan, 1e6, 1e300])
@pytest.mark.parametrize("place", ["attention", "ffn", "pair"])
def test_outliers_poison_neither_their_layer_nor_the_solution(bad, place):
    """Layer 0 as in published libraries: one option is beyond all measure. It is not chosen, and the rest stands."""
    names = {"attention": ("wild", "parent"), "ffn": ("parent", "wild"), "pair": ("a2", "f1")}[place]
    rows = [row(0, *names, bad), *ROWS]
    if place == "attention" and not math.isfinite(bad):
        rows.insert(0, row(0, "wild", "f1", bad))  # even the composed measurement fell on it
    scores = compose(rows, "kl")
    reference = compose(ROWS, "kl")
    assert not any(math.isnan(v) or v < 0 for v in scores.values())
    for key, value in reference.items():
        if place != "pair" or (key[1:] != names and not math.isfinite(bad)):
            assert scores[key] == pytest.approx(value), key
    wild = [v for (_, a, f), v in scores.items() if "wild" in (a, f) or (place == "pair" and (a, f) == names)]
    assert wild
    assert all(v == math.inf if not math.isfinite(bad) else v >= 0.9e6 for v in wild)
    changed = [Option(f"{a} {f}", v, {"kept": float("parent" in (a, f))}) for (_, a, f), v in scores.items()]
    best = solve([changed], [Bound("both blocks change", {"kept": 1.0}, 0.0)])[0]
    assert "wild" not in best.names[0] and best.names[0] != " ".join(names)
    assert best.score < 0.5 or (place == "pair" and best.score < 1)


def test_the_pair_that_is_measured_is_a_typical_one(tmp_path, monkeypatch):
    """Not one of the options that destroy the model, and never one that is no number."""
    model = toy(PLAIN)
    library, where, options = library_of(model, tmp_path), sites(model), all_options(model)
    measure, count = Scorer.measure, itertools.count()

    def sometimes(self, *arguments):
        found = measure(self, *arguments)
        return found | {"kl": math.nan} if next(count) % 3 == 0 else found

    monkeypatch.setattr(Scorer, "measure", sometimes)
    rows = score_library(Scorer(model, IDS, STRIDE), library, where, options, tmp_path / "s.jsonl")
    alone = {(r.layer, r.attention, r.ffn): r.kl for r in rows}
    for pair in {r.layer: r for r in reversed(rows) if "parent" not in (r.attention, r.ffn)}.values():  # the first
        for half, column in (((pair.attention, "parent"), 0), (("parent", pair.ffn), 1)):
            mine = alone[pair.layer, *half]
            others = sorted(v for k, v in alone.items() if k[0] == pair.layer and k[2 - column] == "parent"
                            and k[1 + column] != "parent" and math.isfinite(v))  # fmt: skip
            assert mine == others[len(others) // 2]
    assert not any(math.isnan(v) for v in compose(rows, "kl").values())


def test_an_unknown_metric_is_a_sentence():
    with pytest.raises(IntarsiaError, match="'loss' is not known; known: kl, lm_loss, cosine"):
        compose(ROWS, "loss")
