"""The search's problem: its sums are the real sizes of the assembled children."""

import math
import random

import pytest
import torch

from compress_toys import ALL, PLAIN, SMALL, all_options, sites, statistics, tokens, toy
from intarsia.arch import Architecture, Attention, FeedForward, memory_bytes
from intarsia.compress.assemble import assemble
from intarsia.compress.library import Builder, Library
from intarsia.compress.measure import PHASES, CostTable, distinct
from intarsia.compress.problem import choice_of, make_problem, pair_name
from intarsia.compress.recipe import Library as Recipe
from intarsia.compress.solve import total_costs
from intarsia.engine.scenario import Scenario
from intarsia.model import Cache, weight_bytes

SCENARIO = Scenario(3, 20, 10)
ODD = Architecture(
    blocks=(FeedForward(24), Attention(4, 2, 8), Attention(2, 1, 8), FeedForward(24)), tied_embeddings=True, **SMALL
)
EVERY = ALL | {"odd": ODD}


def table_of(options, where, arch) -> CostTable:
    """Made-up seconds, different for every kind of block."""
    kinds = distinct(options, where)
    blocks = {k: {p: (n + 1) * (0.01 if p == PHASES[0] else 0.03) for p in PHASES} for n, k in enumerate(kinds)}
    return CostTable(blocks, dict.fromkeys(PHASES, 0.5), {}, parent_blocks=list(arch.blocks))


def library_of(model, folder):
    made = Builder(model, all_options(model), statistics(model, 2), Recipe(tokens=0), "independent", folder)
    losses = made.losses(tokens())
    made.store(losses, losses)
    return Library.open(folder, model)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("arch", EVERY.values(), ids=EVERY)
def test_costs_add_up_to_the_assembled_child(tmp_path, arch, dtype):
    model = toy(arch, dtype=dtype)
    options, where, library = all_options(model), sites(model), library_of(model, tmp_path)
    table, size = table_of(options, where, arch), dtype.itemsize
    problem = make_problem(arch, where, options, table, SCENARIO, size)
    rng, seen = random.Random(0), set()
    for turn in range(25):
        picked = [0 if turn == 0 else len(s) - 1 if turn == 1 else rng.randrange(len(s)) for s in problem.sites]
        costs = total_costs(problem.sites, picked, problem.fixed)
        choice = choice_of([s[i].name for s, i in zip(problem.sites, picked)], where, options)
        child = assemble(library, where, choice)
        assert costs["params"] == sum(p.numel() for p in child.parameters())
        assert costs["weight_bytes"] == weight_bytes(child)
        cache = Cache(child.arch, SCENARIO.batch, SCENARIO.length, dtype)
        assert costs["cache_bytes"] == cache.bytes
        whole = memory_bytes(child.arch, SCENARIO.length, SCENARIO.batch, size)
        assert costs["weight_bytes"] + costs["cache_bytes"] == whole
        assert costs[PHASES[0]] + costs[PHASES[1]] == pytest.approx(table.total(list(child.arch.blocks)))
        seen.add(costs["params"])
        if turn == 0:
            assert child.arch == arch and all(a is b for a, b in zip(child.blocks, model.blocks))
            assert costs["prefill_seconds"] + costs["decode_seconds"] == pytest.approx(table.parent_seconds())
        if turn == 1:
            assert child.arch.blocks == () and costs["cache_bytes"] == 0
    assert len(seen) > 15


def test_the_parent_comes_first_and_scores_nothing():
    model = toy(PLAIN)
    options, where = all_options(model), sites(model)
    scores = {(s.layer, a.name, f.name): 1.0 + n for s in where
              for n, (a, f) in enumerate((a, f) for a in options[s.attention] for f in options[s.ffn])}  # fmt: skip
    problem = make_problem(PLAIN, where, options, table_of(options, where, PLAIN), SCENARIO, 4, scores)
    for site, place in zip(problem.sites, where):
        assert len(site) == len(options[place.attention]) * len(options[place.ffn])
        assert site[0].name == pair_name("parent", "parent") and site[0].score == 0.0
        assert [o.score for o in site[1:]] == [2.0 + n for n in range(len(site) - 1)]
    assert problem.tokens == 3 * 30
    scores[1, "none", "none"] = math.inf
    wild = make_problem(PLAIN, where, options, table_of(options, where, PLAIN), SCENARIO, 4, scores)
    assert wild.sites[1][-1].score == math.inf and wild.sites[0][-1].score < math.inf
    blank = make_problem(PLAIN, where, options, table_of(options, where, PLAIN), SCENARIO, 4)
    assert {o.score for site in blank.sites for o in site} == {0.0}


@pytest.mark.parametrize("arch", [PLAIN, ODD], ids=["plain", "odd"])
def test_names_lead_back_to_the_options(arch):
    model = toy(arch)
    options, where = all_options(model), sites(model)
    problem = make_problem(arch, where, options, table_of(options, where, arch), SCENARIO, 4)
    for place, site in zip(where, problem.sites):
        pairs = [choice_of([o.name], [place], options)[0] for o in site]
        assert len(set(pairs)) == len(site)
        for o, pair in zip(site, pairs):
            assert o.name == pair_name(*("parent" if s is None else s.name for s in pair))
            assert [s is None for s in pair] == [place.attention is None, place.ffn is None]
            for spec, index in zip(pair, (place.attention, place.ffn)):
                assert spec is None or spec in options[index]
