"""Controls: what simpler methods choose within the same bounds."""

import itertools
from collections import Counter

import pytest

from compress_toys import LADDER, PLAIN, SMALL
from intarsia.arch import Architecture, Attention, FeedForward
from intarsia.compress.baselines import brute_force
from intarsia.compress.controls import control_choice, uniform_width, uniform_width_within
from intarsia.compress.measure import PHASES, CostTable, distinct, key
from intarsia.compress.options import options_for, sites_of
from intarsia.compress.problem import choice_of, make_problem, pair_name
from intarsia.compress.solve import Bound, Infeasible, Option, solve, total_costs
from intarsia.engine.scenario import Scenario

ARCH = Architecture.transformer(6, Attention(4, 2, 8), FeedForward(96), tied_embeddings=True, **SMALL)
ODD = ARCH.replace(blocks=(Attention(4, 2, 8), *ARCH.blocks[:4], FeedForward(96)))  # layers of one block at both ends
SCENARIO = Scenario(1, 20, 10)
TIME = dict.fromkeys(PHASES, 1.0)
FIXED = 0.5
SIMPLE = ("uniform", "depth", "greedy", "random")  # those that want no precisions


def seconds(block) -> float:
    return 0.02 + 0.001 * block.intermediate_size if isinstance(block, FeedForward) else 0.08


def setting(arch):
    """options, sites, costs and a scored problem: later layers matter more, as does cutting deeper."""
    where, options = sites_of(arch), {i: options_for(b, LADDER) for i, b in enumerate(arch.blocks)}
    blocks = {k: dict.fromkeys(PHASES, seconds(b) / 2) for k, (_, b) in distinct(options, where).items()}
    table = CostTable(blocks, dict.fromkeys(PHASES, FIXED / 2), {}, parent_blocks=list(arch.blocks))
    scores = {}
    for site in where:
        lists = [["parent"] if i is None else [s.name for s in options[i]] for i in (site.attention, site.ffn)]
        for (n, a), (m, f) in itertools.product(*(enumerate(names) for names in lists)):
            scores[site.layer, a, f] = (1 + site.layer) * (0.1 * n + 0.07 * m + 0.01 * n * m)
    return options, where, table, make_problem(arch, where, options, table, SCENARIO, 4, scores)


def chosen_seconds(choice) -> float:
    return FIXED + sum(seconds(s.block) for pair in choice for s in pair if s is not None and s.block is not None)


# Uniform width


def test_the_uniform_width_is_the_widest_that_meets_the_time():
    _, where, table, _ = setting(ARCH)
    whole = table.parent_seconds()
    assert whole == pytest.approx(FIXED + 6 * (0.08 + 0.116))

    def takes(width):
        """Costs between the measured widths (24, 48, 72, 96), and below them, lie on their line."""
        return whole - 6 * 0.001 * (96 - width)

    for target, multiple in itertools.product((0.95, 0.9, 0.8, 0.72), (1, 4, 8)):
        width = uniform_width(where, FeedForward(96), table, target * whole, multiple)
        assert width % multiple == 0
        assert takes(width) <= target * whole * (1 + 1e-9)
        assert width + multiple >= 96 or takes(width + multiple) > target * whole
    assert uniform_width(where, FeedForward(96), table, takes(10) + 1e-9, 1) == 10  # narrower than any measured


def test_widths_between_measured_ones_are_interpolated():
    """On costs that are on no line: the width whose interpolated cost fits the budget exactly."""
    _, where, table, _ = setting(ARCH)
    table.blocks[key(FeedForward(48))] = dict.fromkeys(PHASES, 0.05 / 2)
    whole = table.parent_seconds()
    halfway = (0.05 + seconds(FeedForward(72))) / 2  # at 60 channels
    saved = 6 * (seconds(FeedForward(96)) - halfway)
    assert uniform_width(where, FeedForward(96), table, whole - saved + 1e-9, 1) == 60
    assert uniform_width(where, FeedForward(96), table, whole - saved - 1e-6, 1) == 59


def test_widths_are_multiples_even_where_the_parents_is_not():
    arch = Architecture.transformer(2, Attention(4, 2, 8), FeedForward(100), **SMALL)
    _, where, table, _ = setting(arch)
    for share in (0.97, 0.9, 0.83):
        assert uniform_width(where, FeedForward(100), table, share * table.parent_seconds(), 16) % 16 == 0


def test_only_layers_with_an_ffn_save_anything():
    _, where, table, _ = setting(ODD)
    ffns = sum(s.ffn is not None for s in where)
    assert ffns == 3 < len(where)
    whole = table.parent_seconds()
    width = uniform_width(where, FeedForward(96), table, whole - ffns * 0.001 * 24 + 1e-9, 1)
    assert width == 72


def test_a_time_that_no_width_reaches_is_a_sentence():
    _, where, table, _ = setting(ARCH)
    with pytest.raises(Infeasible, match="no uniform FFN width"):
        uniform_width(where, FeedForward(96), table, 0.4 * table.parent_seconds(), 4)


# Choices


def control(kind, arch, limit, width=None, seed=0):
    options, where, table, problem = setting(arch)
    bounds = [Bound("speedup", TIME, limit * table.parent_seconds())]
    return control_choice(kind, where, options, problem.sites, bounds, problem.fixed, width, seed), bounds, problem


@pytest.mark.parametrize("arch", [ARCH, ODD, PLAIN], ids=["whole", "odd", "plain"])
@pytest.mark.parametrize("kind", SIMPLE)
@pytest.mark.parametrize("limit", [0.95, 0.8, 0.7])
def test_every_control_meets_the_bound_and_is_no_better_than_the_search(arch, kind, limit):
    options, where, table, problem = setting(arch)
    budget = limit * table.parent_seconds()
    bounds, width = [Bound("speedup", TIME, budget)], None
    if kind == "uniform":
        block = next(b for b in arch.blocks if isinstance(b, FeedForward))
        try:
            width = uniform_width(where, block, table, budget, 4)
        except Infeasible:  # and truly so
            ffns = [s for s in where if s.ffn is not None]
            assert table.parent_seconds() - len(ffns) * 0.001 * (block.intermediate_size - 4) > budget
            return
    choice, words = control_choice(kind, where, options, problem.sites, bounds, problem.fixed, width, 0)
    assert words and len(choice) == len(where)
    for site, pair in zip(where, choice):
        assert [s is None for s in pair] == [site.attention is None, site.ffn is None]
    assert chosen_seconds(choice) <= budget * (1 + 1e-9)
    if width is not None:  # a width that the library need not hold
        assert {p[1].block.intermediate_size for p in choice if p[1]} == {width}
        assert {p[0].name for p in choice if p[0]} == {"parent"}
        return
    names = [pair_name(*("parent" if s is None else s.name for s in pair)) for pair in choice]
    picked = [[o.name for o in site].index(n) for site, n in zip(problem.sites, names)]
    assert bounds[0].met(total_costs(problem.sites, picked, problem.fixed))
    best = solve(problem.sites, bounds, fixed=problem.fixed)[0].score
    score = sum(site[i].score for site, i in zip(problem.sites, picked))
    assert score >= best - 1e-9
    assert score > 0


@pytest.mark.parametrize("arch", [ARCH, ODD], ids=["whole", "odd"])
def test_depth_removes_whole_layers_those_that_cost_least(arch):
    (choice, words), _, problem = control("depth", arch, 0.75)
    states = [{s.name for s in pair if s is not None} for pair in choice]
    assert all(state in ({"parent"}, {"none"}) for state in states)
    gone = [n for n, state in enumerate(states) if state == {"none"}]
    assert gone and words == f"{len(gone)} whole layers left out"
    if arch is ARCH:  # equal layers: the harmless ones are the first
        assert gone == list(range(len(gone)))
        one_fewer = chosen_seconds(choice) + 0.08 + 0.116
        assert one_fewer > 0.75 * (FIXED + 6 * (0.08 + 0.116))
    brute = [
        sum(site[-1].score for n, site in enumerate(problem.sites) if n in drop)
        for r in range(len(states) + 1) for drop in itertools.combinations(range(len(states)), r)
        if chosen_seconds([p for n, p in enumerate(setting_choice(arch)) if n not in drop])
        <= 0.75 * chosen_seconds(setting_choice(arch)) + 1e-9
    ]  # fmt: skip
    assert sum(problem.sites[n][-1].score for n in gone) == pytest.approx(min(brute))


def setting_choice(arch):
    """The parent as a choice."""
    options, where, _, _ = setting(arch)
    return [tuple(None if i is None else options[i][0] for i in (s.attention, s.ffn)) for s in where]


@pytest.mark.parametrize("kind, limit", [("prefix", 0.8), ("none", 0.7), ("drop,prefix", 0.8), ("linear,none", 0.8)])
def test_a_search_among_some_options_finds_the_best_of_these(kind, limit):
    arch = ARCH.replace(blocks=ARCH.blocks[:8])
    (choice, words), bounds, problem = control(kind, arch, limit)
    options, where, _, _ = setting(arch)
    asked = kind.split(",")
    allowed = {spec.name for specs in options.values() for spec in specs if spec.method in {*asked, "parent"}}
    narrow = [[o for o in known if set(o.name.split(" | ")) <= allowed] for known in problem.sites]
    best = brute_force(narrow, bounds, fixed=problem.fixed)
    assert choice == choice_of(best.names, where, options)
    counted = Counter(spec.method for pair in choice for spec in pair if spec.method != "parent")
    assert words.split(", ")[0] == "{1} {0}".format(*counted.most_common(1)[0]) and counted.keys() <= set(asked)


def test_a_search_among_bits_takes_blocks_in_the_asked_ones_alone():
    """And without a precision what is packed as all others are; every option that is asked for may have it."""
    _, where, _, _ = setting(PLAIN)
    options = {i: options_for(b, LADDER.model_copy(update={"precisions": ("int8", "int4")})) for i, b in
               enumerate(PLAIN.blocks)}  # fmt: skip
    cost = {"": 1.0, "int8": 0.55, "int4": 0.3}
    sites = [
        [Option(pair_name(a.name, f.name), 0.0 if a.name == f.name == "parent" else 2.0 - cost[a.precision]
                + 1.0 - cost[f.precision], {"bytes": cost[a.precision] + cost[f.precision]})
         for a in options[site.attention] for f in options[site.ffn]]
        for site in where
    ]  # fmt: skip
    for kind, kinds in (("int8", {"", "int8"}), ("int4", {"", "int4"}), ("int4,int8,prefix", {"", "int4", "int8"})):
        bounds = [Bound("memory", {"bytes": 1.0}, 1.3 * len(where))]
        choice, _ = control_choice(kind, where, options, sites, bounds, {}, None, 0)
        picked = [spec for pair in choice for spec in pair]
        assert {spec.precision for spec in picked} <= kinds
        assert {spec.method for spec in picked} <= {"parent", *kind.split(",")}
        assert sum(cost[spec.precision] for spec in picked) <= bounds[0].limit


def test_random_choices_follow_their_seed():
    first, again, other = (control("random", ARCH, 0.8, seed=s)[0][0] for s in (0, 0, 1))
    assert first == again != other


def test_what_cannot_be_is_a_sentence():
    with pytest.raises(Infeasible):
        control("depth", ARCH, 0.1)
    with pytest.raises(Infeasible, match="a uniform width is for parents with one FFN width"):
        control("uniform", ARCH, 0.9, width=None)
    with pytest.raises(Infeasible, match="blocks alone is a control where blocks have precisions"):
        control("blocks", ARCH, 0.9)
    with pytest.raises(Infeasible, match="it names window, of which this run has no options; it has: aligned, drop,"):
        control("prefix,window", ARCH, 0.9)


def test_the_uniform_width_within_a_memory_is_the_widest_that_meets_it():
    _, where, _, problem = setting(ARCH)
    whole, channel = problem.parent_costs(), {"params": 3 * 32.0, "weight_bytes": 3 * 32 * 4.0}
    for share, multiple in itertools.product((0.95, 0.8, 0.6), (1, 4, 8)):
        limit = share * whole["weight_bytes"]
        bounds = [Bound("memory", {"weight_bytes": 1.0}, limit), Bound("params", {"params": 1.0}, whole["params"])]
        width = uniform_width_within(FeedForward(96), len(where), whole, channel, bounds, multiple)

        def weighs(width):
            return whole["weight_bytes"] - 6 * (96 - width) * channel["weight_bytes"]

        assert width % multiple == 0 and weighs(width) <= limit
        assert width + multiple >= 96 or weighs(width + multiple) > limit
    with pytest.raises(Infeasible, match="alone is small enough"):
        uniform_width_within(FeedForward(96), 6, whole, channel, [Bound("memory", {"weight_bytes": 1.0}, 1.0)], 4)
