"""Where attention may stay: the rules as bounds of the search, against the rules as they are told."""

import itertools
import random

import pytest

from intarsia.arch import Architecture, Attention, FeedForward, Linear, Mamba2
from intarsia.base.errors import IntarsiaError
from intarsia.compress.baselines import brute_force, greedy, random_choice
from intarsia.compress.options import options_for, sites_of
from intarsia.compress.placement import Placement
from intarsia.compress.problem import check_placement, pair_name
from intarsia.compress.recipe import Options
from intarsia.compress.solve import Bound, Infeasible, Option, solve
from intarsia.compress.targets import Problem, Target, check_feasible

ATTENTION, FFN = Attention(4, 2, 8), FeedForward(48)
MIXERS = {"parent": ATTENTION, "fewer": Attention(2, 1, 8), "mamba": Mamba2(4, 8, 8, 4), "none": None}
FFNS = {"parent": FFN, "narrow": FeedForward(16), "linear": Linear(), "none": None}


def transformer(layers: int) -> Architecture:
    return Architecture.transformer(layers, ATTENTION, FFN, hidden_size=32, vocab_size=61)


def problem(layers: int, share: float, seed: int = 0, mixers=tuple(MIXERS), ffns=("parent", "none")) -> Problem:
    draw, placement = random.Random(seed), Placement(share, sites_of(transformer(layers)))
    pairs = [(a, f) for a in mixers for f in ffns]

    def option(layer, a, f):
        whole = (a, f) == ("parent", "parent")
        score, seconds = 0.0 if whole else draw.random(), 1.0 if whole else draw.random()
        costs = {"prefill_seconds": seconds, "decode_seconds": seconds, "params": 1.0}
        return Option(pair_name(a, f), score, costs | placement.costs(layer, MIXERS[a], FFNS[f]))

    found = [[option(layer, a, f) for a, f in pairs] for layer in range(layers)]
    words = ["as little attention as may stay"]
    return Problem(found, tokens=1.0, rules=placement.bounds(), besides=words)


def kept(names) -> list[int]:
    return [n for n, name in enumerate(names) if name.startswith(("parent", "fewer"))]


def keeps_the_rules(names, share: float) -> bool:
    """The rules of the paper, told once more: share, order, distance."""
    blocks = sum(part != "none" for name in names for part in name.split(" | "))
    layers, most = kept(names), int(share * 2 * len(names) + 1e-6)
    behind = all(names[n].endswith(("parent", "narrow")) for n in layers)
    halves = [n * 2 * most // len(names) for n in layers]
    apart = all(b - a > 1 for a, b in itertools.pairwise(halves))
    return len(layers) <= share * blocks + 1e-6 and 0 not in layers and not names[0].startswith("none") and behind \
        and apart  # fmt: skip


@pytest.mark.parametrize("seed", range(12))
def test_the_search_agrees_with_brute_force_and_with_the_rules(seed):
    share = (0.1, 0.2, 0.3, 0.0)[seed % 4]
    made = problem(5, share, seed)
    bounds = made.bounds([Target("speedup", 1.2)])
    found, expected = solve(made.sites, bounds)[0], brute_force(made.sites, bounds)
    assert found.score == pytest.approx(expected.score) and keeps_the_rules(found.names, share)
    allowed = [
        names for names in itertools.product(*([o.name for o in site] for site in made.sites))
        if keeps_the_rules(names, share)
    ]  # fmt: skip
    scores = [{o.name: o for o in site} for site in made.sites]

    def seconds(names):
        return sum(site[name].costs["prefill_seconds"] for site, name in zip(scores, names))

    best = min(sum(s[n].score for s, n in zip(scores, names)) for names in allowed if seconds(names) * 1.2 <= 5 + 1e-9)
    assert found.score == pytest.approx(best)


@pytest.mark.parametrize(("share", "most"), [(0.08, 4), (8 / 60, 8), (4 / 60, 4), (0.01, 0), (0.5, 30), (0.1, 6)])
def test_thirty_layers_keep_what_the_share_allows(share, most):
    made = problem(30, share, seed=3, mixers=("parent", "mamba"), ffns=("parent",))
    found = solve(made.sites, made.bounds([]))[0]
    layers = kept(found.names)
    # Nothing gains by giving attention up, so as much stays as may (with all of it allowed, the first mixer leaves).
    assert len(layers) == (29 if most == 30 else most) and keeps_the_rules(found.names, share)
    if 1 < most < 15:
        assert min(b - a for a, b in itertools.pairwise(layers)) > 30 / most / 2 - 1


def test_fewer_blocks_allow_less_attention():
    """The share is of the blocks that the child has, not of the parent's."""
    made = problem(10, 0.2, mixers=("parent", "mamba"))
    few = Bound("few", {"blocks": 1.0}, 14.0)
    found = solve(made.sites, [*made.bounds([]), few])[0]
    assert found.costs["blocks"] <= 14 and len(kept(found.names)) == 2


def test_an_ffn_of_any_width_will_do_and_a_linear_layer_will_not():
    placement = Placement(0.2, sites_of(transformer(10)))
    costs = {name: placement.costs(4, ATTENTION, ffn)["misplaced"] for name, ffn in FFNS.items()}
    assert costs == {"parent": 0, "narrow": 0, "linear": 1, "none": 1}
    first = {name: placement.costs(0, mixer, FFN)["misplaced"] for name, mixer in MIXERS.items()}
    assert first == {"parent": 1, "fewer": 1, "mamba": 0, "none": 1}


@pytest.mark.parametrize("seed", range(4))
def test_controls_keep_the_rules(seed):
    made = problem(12, 0.15, seed)
    bounds = made.bounds([Target("speedup", 1.3)])
    best = solve(made.sites, bounds)[0].score
    for found in (greedy(made.sites, bounds), random_choice(made.sites, bounds, seed)):
        assert keeps_the_rules(found.names, 0.15) and found.score >= best - 1e-9
        assert all(b.met(found.costs) for b in bounds)


def test_greedy_does_not_share_out_attention_in_parts():
    """With an equal split of counts every site had a part of an attention, which is none."""
    made = problem(12, 0.2, mixers=("parent", "mamba"), ffns=("parent",))
    assert len(kept(greedy(made.sites, made.bounds([])).names)) >= 2


def test_where_nothing_can_stand_for_attention_a_sentence_says_so():
    arch = transformer(6)
    sites = sites_of(arch)

    def options(**rest):
        return {i: options_for(b, Options(linear=False, **rest)) for i, b in enumerate(arch.blocks)}

    with pytest.raises(Infeasible, match=r"lets 1 attention blocks stay.*layers 0, 1, 2, 3, 4, 5 no.*options.mamba"):
        check_placement(Placement(0.1, sites), sites, options(absent=False))
    with pytest.raises(Infeasible, match="at the layers 0 no option"):  # the first mixer may not be left out either
        check_placement(Placement(0.1, sites), sites, options())
    check_placement(Placement(0.1, sites), sites, options(mamba=True, absent=False))


def test_targets_out_of_reach_within_the_rules_are_told():
    made = problem(6, 0.1)
    check_feasible(made, [])
    check_feasible(made, [Target("speedup", 1.5)])
    with pytest.raises(Infeasible, match=r"speed-up of 1000.000 is out of reach.* as little attention as may stay"):
        check_feasible(made, [Target("speedup", 1000.0)])
    with pytest.raises(IntarsiaError, match="already meets what is asked of its attention"):
        check_feasible(Problem(made.sites, rules=[Bound("any", {"blocks": 1.0}, 100.0)]), [])


def test_evenly_spaced_attention_is_never_first():
    for layers, share in ((30, 4 / 60), (30, 8 / 60), (10, 0.15), (4, 0.25), (6, 0.1), (5, 0.0)):
        sites = sites_of(transformer(layers))
        even = Placement(share, sites).evenly(sites)
        names = ["parent | parent" if n in even else "mamba | parent" for n in range(layers)]
        assert keeps_the_rules(names, share) and len(even) == int(share * 2 * layers + 1e-6)
    sites = sites_of(transformer(30))
    assert Placement(4 / 60, sites).evenly(sites) == [4, 12, 19, 27]
