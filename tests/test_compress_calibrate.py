"""Scores around a child: each is that of the child put together with one change; what they find is held against every
choice there is; what was measured is not measured again."""

import itertools
import math
from types import SimpleNamespace

import pytest

from compress_toys import PLAIN, all_options, sites, statistics, tokens, toy
from intarsia.arch import Architecture, Attention, FeedForward, block_parameters
from intarsia.base.files import read_json, read_jsonl, write_json
from intarsia.compress import search
from intarsia.compress.calibrate import NAME as CALIBRATED
from intarsia.compress.calibrate import Around, Ground, calibrate, rescored
from intarsia.compress.library import Builder, Library
from intarsia.compress.options import NONE, PARENT
from intarsia.compress.problem import choice_of, pair_name
from intarsia.compress.recipe import Library as Recipe
from intarsia.compress.recipe import Options
from intarsia.compress.score import Scorer, compose, score_library
from intarsia.compress.solve import Bound, Option, solve
from intarsia.compress.targets import Problem
from tiny_compression import VOCABULARY, compress, make_parent, make_recipe, make_text

OPTIONS = Options(ffn_widths=(0.5, 0.25), multiple=4, kv_methods=("drop",), linear=False)
DEEP = Architecture.transformer(
    8, Attention(4, 2, 16), FeedForward(96), hidden_size=64, vocab_size=VOCABULARY, tied_embeddings=True,
    max_positions=256,
)  # fmt: skip
SEED_TEXT = tokens(3, 20, seed=300)


@pytest.fixture(scope="module")
def scene(tmp_path_factory):
    """Ground, problem and scores of a random parent of two layers."""
    folder, model = tmp_path_factory.mktemp("calibrate"), toy(PLAIN)
    options, where, scorer = all_options(model, OPTIONS), sites(model), Scorer(model, SEED_TEXT, 3)
    builder = Builder(model, options, statistics(model, 4), Recipe(tokens=0), "refit", folder)
    losses = builder.losses(SEED_TEXT)
    builder.store(losses, losses)
    library = Library.open(folder, model)
    scores = compose(score_library(scorer, library, where, options, folder / "scores.jsonl"), "kl")

    def option(site, a, f):
        costs = {"params": float(sum(block_parameters(s.block, model.arch.hidden_size) for s in (a, f) if s.block))}
        free = a.name == f.name == PARENT
        return Option(pair_name(a.name, f.name), 0.0 if free else scores[site.layer, a.name, f.name], costs)

    known = [[option(s, a, f) for a, f in itertools.product(options[s.attention], options[s.ffn])] for s in where]
    return Ground(scorer, library, where, options, "kl", folder / "around.jsonl"), Problem(known)


def measured(ground, problem, choice):
    return ground.measure([[site[n].name for site, n in zip(problem.sites, choice)]])[0]


def bounds_of(problem, share):
    return [Bound("params", {"params": 1.0}, share * problem.parent_costs()["params"])]


def test_every_score_is_that_of_the_child_with_one_change(scene):
    ground, problem = scene
    center = solve(problem.sites, bounds_of(problem, 0.5))[0].choice
    value = measured(ground, problem, center)
    scores, checked = rescored(ground, problem.sites, center, "around"), set()
    for position, (site, row) in enumerate(zip(problem.sites, scores)):
        here = site[center[position]].name.split(" | ")
        for n, (option, score) in enumerate(zip(site, row)):
            apart = sum(a != b for a, b in zip(here, option.name.split(" | ")))
            checked.add(apart)
            if apart < 2:
                changed = [n if p == position else c for p, c in enumerate(center)]
                assert score == pytest.approx(measured(ground, problem, changed) - value, abs=1e-5)
            else:
                alone = dict(zip((o.name for o in site), row))
                (a, f), (b, g) = here, option.name.split(" | ")
                assert score == alone[f"{b} | {f}"] + alone[f"{a} | {g}"]
    assert checked == {0, 1, 2}


def test_what_was_measured_is_not_measured_again(scene, tmp_path):
    ground, problem = scene
    center = solve(problem.sites, bounds_of(problem, 0.6))[0].choice
    whole = rescored(ground, problem.sites, center, "around")
    rows = read_jsonl(ground.file)
    cut = Ground(**{**vars(ground), "file": tmp_path / "around.jsonl"})
    lines = ground.file.read_text().splitlines(keepends=True)
    cut.file.write_text("".join(lines[: -len(lines) // 3]))
    assert rescored(cut, problem.sites, center, "around") == whole
    assert sorted(map(str, read_jsonl(cut.file))) == sorted(map(str, rows))


def test_children_are_judged_on_one_text_and_options_scored_on_another(scene, tmp_path):
    ground, problem = scene
    other = Scorer(ground.scorer.model, tokens(4, 20, seed=301), 3)
    both = Ground(**{**vars(ground), "judge": other, "file": tmp_path / "around.jsonl"})
    center = solve(problem.sites, bounds_of(problem, 0.6))[0].choice
    names = [site[n].name for site, n in zip(problem.sites, center)]
    child = next(ground.children([choice_of(names, ground.sites, ground.options)]))
    assert measured(both, problem, center) == other.whole(child)["kl"] != measured(ground, problem, center)
    assert rescored(both, problem.sites, center, "around") == rescored(ground, problem.sites, center, "around")


@pytest.mark.parametrize("share", [0.8, 0.6, 0.5, 0.4])
def test_what_is_found_is_nearer_and_within_the_bounds(scene, share):
    ground, problem = scene
    bounds = bounds_of(problem, share)
    every = {}
    for choice in itertools.product(*(range(len(site)) for site in problem.sites)):
        if bounds[0].met({"params": sum(site[n].costs["params"] for site, n in zip(problem.sites, choice))}):
            every[choice] = measured(ground, problem, choice)
    best = min(every.values())
    starts = [s.choice for s in solve(problem.sites, bounds, num_solutions=6)]
    ends = []  # from the six best sums of scores
    for start in starts:
        found = calibrate(ground, problem, bounds, start, every[start], 8, 10.0)
        if found is None:
            ends.append(every[start])
            continue
        solution, value, around = found
        assert value == pytest.approx(every[solution.choice]) and value < every[start] and around.radius >= 1
        assert solution == around.solve(problem, bounds, 10.0)  # so a budget on time can be asked for again
        ends.append(value)
    assert min(ends) == pytest.approx(best)
    assert ends != [every[start] for start in starts]


def test_sites_change_one_after_the_other_as_long_as_that_helps(scene):
    """One of two may change at a time, and from a child of no layers both have to."""
    ground, problem = scene
    empty = [[option.name for option in site].index(pair_name(NONE, NONE)) for site in problem.sites]
    value, bounds = measured(ground, problem, empty), bounds_of(problem, 0.6)
    once, often = (calibrate(ground, problem, bounds, empty, value, rounds, 10.0) for rounds in (1, 8))
    apart = [sum(a != b for a, b in zip(empty, found[0].choice)) for found in (once, often)]
    assert apart == [1, 2] and often[1] < once[1] < value


def test_a_lesser_budget_is_met_from_the_same_scores(scene, tmp_path):
    """As a child that proves too slow asks for one."""
    ground, problem = scene
    center = solve(problem.sites, bounds_of(problem, 0.6))[0].choice
    scores = rescored(ground, problem.sites, center, "around")
    spoilt = (tuple(math.inf if n == 1 else score for n, score in enumerate(scores[0])), *scores[1:])
    around = Around(center, 0.5, spoilt, 2)
    folder, tight = tmp_path / "stages" / "search", bounds_of(problem, 0.55)
    folder.mkdir(parents=True)
    write_json(folder / "around.json", around.kept())
    assert Around.read(read_json(folder / "around.json")) == around
    recipe = SimpleNamespace(search=SimpleNamespace(time_limit=10.0))
    job = SimpleNamespace(run=SimpleNamespace(path=tmp_path), recipe=recipe)
    found = search.again(job, problem, CALIBRATED)(tight)
    assert tight[0].met(found.costs) and found.choice[0] != 1 and found.choice != center
    names = [site[n].name for site, n in zip(problem.sites, found.choice)]
    assert len(choice_of(names, ground.sites, ground.options)) == len(problem.sites)


def test_a_run_asks_for_it(tmp_path):
    parent = make_parent(tmp_path / "parent", DEEP)
    words = (parent, "--recipe", make_recipe(tmp_path / "tiny.toml", make_text(tmp_path / "text")), "--params", "60%")
    words = (*words, "--set", "search.calibrations=3", "--set", "distill.tokens=0", "--set", "mend.tokens=0",
             "--out", tmp_path / "run")  # fmt: skip
    status, said, err = compress(*words)
    assert status == 0, err
    found = read_json(tmp_path / "run" / "stages" / "search" / "solutions.json")
    rest = [value for name, value in found["kl"].items() if name != CALIBRATED]
    assert found["solutions"][0]["name"] == CALIBRATED and found["kl"][CALIBRATED] < min(rest)
    assert found["solutions"][0]["costs"]["params"] == read_json(tmp_path / "run" / "summary.json")["parameters"]
    status, said, err = compress(*words)
    assert status == 0 and "search: already done" in said, err
