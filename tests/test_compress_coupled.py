"""Pairs of surviving options trained together: what survives, what is learned, and that the search goes by it."""

import os
import signal
import time
from types import SimpleNamespace

import pytest
import torch

from compress_toys import ALL, LADDER, all_options, sites, tokens, toy
from intarsia.base.errors import IntarsiaError
from intarsia.base.files import read_json, read_jsonl
from intarsia.base.recipe import load_recipe
from intarsia.base.runfolder import RunFolder
from intarsia.compress import stages, text
from intarsia.compress.assemble import assemble
from intarsia.compress.coupled import Coupled, Lesson, pairs, survivors, train_pair
from intarsia.compress.mend import lightly, with_matrices
from intarsia.compress.options import NONE, PARENT, Site
from intarsia.compress.pipeline import prepare
from intarsia.compress.problem import choice_of
from intarsia.compress.recipe import Library, Recipe
from intarsia.compress.solve import Solution
from intarsia.evaluate import compare as distance
from intarsia.ops.losses import normalised_mse
from tiny_compression import begin, compress, make_parent, make_recipe, make_text

SETTINGS = ("library.tokens=256", "library.refit_tokens=1024", "library.coupled=1024", "library.survivors=3",
            "cost.repeats=1", "cost.calibration=0", "search.repeats=1", "search.rounds=1", "tournament.finalists=1",
            "distill.tokens=256", "distill.evaluations=1", "evaluate.documents=2")  # fmt: skip


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A finished run with coupled pairs and a control, and its job, opened again."""
    folder = tmp_path_factory.mktemp("coupled")
    parent, data = make_parent(folder / "parent"), make_text(folder / "text")
    recipe = make_recipe(folder / "tiny.toml", data, "params = 130_000")
    words = (parent, "--recipe", recipe, *(w for s in SETTINGS for w in ("--set", s)), "--controls",
             "--set", 'controls.kinds=["greedy"]')  # fmt: skip
    run = folder / "run"
    status, _, err = compress(*words, "--out", run)
    assert status == 0, err
    job = prepare(RunFolder(run), parent, load_recipe(Recipe, str(recipe), SETTINGS))
    for stage in (stages.data, stages.cost, stages.library):
        stage(job)
    return SimpleNamespace(run=run, words=words, job=job, stage=run / "stages" / "coupled")


def kept_of(made) -> dict:
    names = read_json(made.stage / "survivors.json")
    return {i: [s for s in specs if s.name in names[str(i)]] for i, specs in made.job.options.items()}


def scores_of(made) -> dict:
    rows = read_jsonl(made.stage / "scores.0.jsonl")
    return {(r["layer"], r["attention"], r["ffn"]): r for r in rows}


def test_every_pair_of_survivors_is_trained_and_scored_once(made):
    kept, job = kept_of(made), made.job
    wanted = {(site.layer, *(s.name for s in pair)) for site in job.sites for pair in pairs(site, kept)}
    rows = read_jsonl(made.stage / "scores.0.jsonl")
    assert len(rows) == len(wanted) and set(scores_of(made)) == wanted
    assert all(specs[0].name == PARENT and len(specs) <= 3 for specs in kept.values())
    assert any(len(kept[i]) < len(job.options[i]) for i in kept)


def test_no_pair_is_worse_than_the_decoupled_blocks_and_most_are_better(made):
    job, rows = made.job, read_jsonl(made.stage / "losses.0.jsonl")
    losses = [loss for row in rows for loss in row["losses"].values()]
    assert all(after <= before for before, after in losses)
    assert sum(after < before for before, after in losses) > len(losses) / 2
    # By hand, of the second layer: what it began from and what is stored.
    site, kept = job.sites[1], kept_of(made)
    ids = job.batch(0, 256, text.HELDOUT, "heldout", 32)
    coupled = Coupled(made.stage, job.library, "")
    with torch.no_grad():
        x = job.model.run(job.model.embed_tokens(ids), 0, 2)
        whole, rope = job.model.run(x, 2, 4) - x, job.model.rope_tables(0, 32)
        for pair in pairs(site, kept):
            name = " | ".join(spec.name for spec in pair)
            for turn, library in enumerate((job.library, coupled)):
                y = x
                for block in library.pair(site, pair):
                    y = block(y, rope.get(getattr(block.spec, "head_dim", 0)))
                if name in rows[1]["losses"]:
                    found = float(normalised_mse(y - x, whole))
                    assert found == pytest.approx(rows[1]["losses"][name][turn], rel=1e-3), (name, turn)


def test_the_second_search_goes_by_the_scores_of_the_pairs(made):
    job, scores = made.job, scores_of(made)
    coupled, kept = Coupled(made.stage, job.library, ""), kept_of(made)
    scorer, judging, site = stages.make_scorer(job), stages.make_judging(job), job.sites[2]
    for pair in pairs(site, kept):
        child = assemble(coupled, [site], [pair])
        x = job.model.run(job.model.embed_tokens(scorer.ids), 0, site.attention)
        found = scorer.measure(child.run(x, rope=scorer.rope), site.ffn + 1)
        if all(spec.method in (PARENT, NONE) for spec in pair):  # taken over by the block before
            assert scores[site.layer, *(s.name for s in pair)]["kl"] < found["kl"]
            continue
        assert found["kl"] == pytest.approx(scores[site.layer, *(s.name for s in pair)]["kl"], rel=1e-3, abs=1e-6)
    for solution in read_json(made.run / "stages" / "search" / "solutions.json")["solutions"]:
        names = [(site.layer, *name.split(" | ")) for site, name in zip(job.sites, solution["names"])]
        assert all(key in scores or key[1:] == (PARENT, PARENT) for key in names)  # nothing else is offered
        assert solution["score"] == pytest.approx(sum(max(0.0, scores[k]["kl"]) for k in names if k in scores))
        choice = choice_of(solution["names"], job.sites, job.options)
        child, matrices = assemble(coupled, job.sites, choice), next(lightly(job, coupled, [choice]))
        real = judging.whole(with_matrices(child, matrices))["kl"]
        known = read_json(made.run / "stages" / "search" / "solutions.json")["kl"][solution["name"]]
        assert real == pytest.approx(known, rel=1e-3)


def test_the_child_is_made_of_pairs_and_controls_of_the_library(made):
    job, summary = made.job, read_json(made.run / "summary.json")
    ids = job.judged()
    for name, shown, library in (
        ("child", summary["child"]["sites"], Coupled(made.stage, job.library, "")),
        ("greedy", summary["controls"]["greedy"]["sites"], job.library),
    ):
        wanted = [tuple(option_at(job, i, row[slot]) for slot, i in (("attention", s.attention), ("ffn", s.ffn)))
                  for s, row in zip(job.sites, shown)]  # fmt: skip
        assembled = read_json(made.run / "stages" / f"mend-{name}" / "done.json")["kl_before"]
        found = distance(job.model, assemble(library, job.sites, wanted), ids)["kl"]["value"]
        assert found == pytest.approx(assembled, rel=1e-3), name


def test_nothing_is_chosen_by_the_text_that_tells_how_good_models_are(made):
    evaluated, judged = ({tuple(row) for row in rows.tolist()} for rows in (made.job.evaluated(), made.job.judged()))
    assert len(evaluated) == 16 and len(judged) == 8 and not evaluated & judged


def option_at(job, index: int, cell: dict):
    """The option of a block that a row of the summary shows; the parent's own goes by its label."""
    own = job.options[index][0]
    return next((s for s in job.options[index] if s.name == cell["option"]), own)


def test_killed_in_the_middle_it_ends_the_same_and_trains_nothing_again(made, tmp_path):
    words = [*map(str, made.words), "--out", str(tmp_path / "run")]
    losses = tmp_path / "run" / "stages" / "coupled" / "losses.0.jsonl"
    seen = []
    for count in (1, 3):
        number = begin(["compress", *words])
        while not losses.exists() or len(read_jsonl(losses)) < count:
            assert not os.waitpid(number, os.WNOHANG)[0]
            time.sleep(0.01)
        os.kill(number, signal.SIGKILL)
        os.waitpid(number, 0)
        seen.append(losses.read_bytes())
    status, _, err = compress(*words)
    assert status == 0, err
    assert all(losses.read_bytes().startswith(earlier) for earlier in seen)
    assert read_jsonl(losses) == read_jsonl(made.stage / "losses.0.jsonl")
    for file in ("child/model.safetensors", "controls/greedy/model.safetensors", "stages/coupled/scores.0.jsonl"):
        assert (tmp_path / "run" / file).read_bytes() == (made.run / file).read_bytes(), file


def test_coupling_leaves_the_library_as_it_is():
    given = [load_recipe(Recipe, "quick", s).library for s in ((), ("library.coupled=4096", "library.survivors=2"))]
    assert given[0].decoupled == given[1].decoupled and "coupled" not in given[0].decoupled
    assert load_recipe(Recipe, "quick", ["library.tokens=0"]).library.decoupled != given[0].decoupled


@pytest.mark.parametrize("setting", ['method="minipuzzle"', 'options.precisions=["int8"]'])
def test_what_pairs_cannot_serve_is_refused(setting):
    with pytest.raises(IntarsiaError, match=r"library\.coupled"):
        load_recipe(Recipe, "quick", ["library.coupled=1024", setting])


def test_survivors_are_counted(tmp_path):
    model = toy(ALL["plain"])
    options, where = all_options(model, LADDER), sites(model)

    def solution(*names: str) -> Solution:
        return Solution(choice=(0, 0), names=names, score=0.0, costs={}, optimal=True, gap=0.0)

    found = [solution("parent | ffn 12", "none | parent"), solution("parent | ffn 24", "parent | none"),
             solution("none | ffn 24", "parent | none"), solution("none | ffn 36", "none | none")]  # fmt: skip
    # ffn 24 is chosen twice, ffn 12 is the first solution's; of equals the one that comes first.
    assert survivors(where, options, found, 3) == {
        "0": ["parent", "none"], "1": ["parent", "ffn 24", "ffn 12"], "2": ["parent", "none"], "3": ["parent", "none"],
    }  # fmt: skip
    assert survivors(where, options, found, 2)["1"] == ["parent", "ffn 12"]
    lone = Site(0, None, 1)
    assert [p[1].name for p in pairs(lone, {1: options[1][:3]})] == [s.name for s in options[1][1:3]]


@pytest.mark.parametrize("name", ALL)
def test_a_pair_learns_the_whole_update_and_only_what_learns_moves(name):
    from intarsia.compress.assemble import independent, random_block

    model = toy(ALL[name])
    options = all_options(model, LADDER)
    streams = [model.embed_tokens(tokens(seed=n)).detach() for n in range(41)]
    lesson = Lesson(model, streams, [])
    with torch.no_grad():
        lesson.updates = [lesson.update(list(model.blocks[:2]), x) for x in streams]
        x = streams[0]
        torch.testing.assert_close(lesson.updates[0], model.run(x, 0, 2) - x, rtol=1e-4, atol=1e-4)
    small = [random_block(options[i][1].block, model, i) for i in (0, 1)]
    for learn in ([True, True], [True, False], [False, True]):
        blocks = [small[n] if learns else independent(model).blocks[n] for n, learns in enumerate(learn)]
        before = [{k: v.clone() for k, v in b.state_dict().items()} for b in blocks]
        with torch.no_grad():
            start = sum(float(lesson.loss(blocks, n)) for n in range(40))
        train_pair(blocks, learn, lesson, Library(lr=1e-2))
        with torch.no_grad():
            assert sum(float(lesson.loss(blocks, n)) for n in range(40)) < start
        for block, old, learns in zip(blocks, before, learn):
            moved = {k for k, v in block.state_dict().items() if not torch.equal(v, old[k])}
            assert moved == {k for k in old if learns and not k.startswith("norm.")}
