"""Targets: what is typed, what it bounds, and what is said when it cannot be met."""

import math
import re

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from intarsia.base.errors import IntarsiaError
from intarsia.compress.baselines import brute_force
from intarsia.compress.solve import Infeasible, Option, solve
from intarsia.compress.targets import (
    KINDS,
    Problem,
    Target,
    check_feasible,
    nearest_feasible,
    parse_target,
    parse_targets,
    reach,
    reachable,
)


def option(name, score, prefill, decode, weights, cache=0.0):
    costs = {"prefill_seconds": prefill, "decode_seconds": decode, "weight_bytes": weights, "cache_bytes": cache}
    return Option(name, score, {**costs, "params": weights / 2})


def problem(score=1.0, **rest):
    """Four sites. `fast` saves time and needs memory, `small` the other way round: they compete."""
    site = [
        option("parent", 0.0, 1.0, 4.0, 100e6, 20e6),
        option("fast", 1.0 * score, 0.5, 2.0, 90e6, 20e6),
        option("small", 1.0 * score, 0.9, 3.8, 40e6, 10e6),
    ]
    fixed = {"prefill_seconds": 0.5, "decode_seconds": 1.5, "weight_bytes": 60e6, "params": 30e6}
    return Problem([site] * 4, fixed, tokens=440, **rest)


@pytest.mark.parametrize(("text", "value"), [
    ("speedup=1.3", 1.3), ("speedup = 2x", 2.0), ("memory=220MB", 220e6), ("memory=1.5GiB", 1.5 * 2**30),
    ("memory=5000", 5000.0), ("params=100M", 100e6), ("params=1.2B", 1.2e9), ("ttft=80ms", 0.08),
    ("latency=2.5 s", 2.5),     ("throughput=1_200 tok/s", 1200.0), ("latency=1e-2", 0.01),
])
def test_parse(text, value):
    target = parse_target(text)
    assert target.value == pytest.approx(value, rel=1e-12) and target.kind == text.split("=")[0].strip()
    assert parse_target(str(target)).value == pytest.approx(value, rel=1e-9)


@pytest.mark.parametrize(("given", "words"), [
    (["speedup"], "kind=value"), (["quality=3"], "kind=value"), (["speedup=fast"], "no number"),
    (["memory=3 parsecs"], "no number"), (["speedup=0.8"], "no speed-up"), (["speedup=1"], "no speed-up"),
    (["memory=-3MB"], "above zero"), (["latency=0"], "above zero"), (["params=1e999"], "above zero"),
    (["speedup=1.3", "speedup=1.5"], "twice"), ([], "no target"), ({"speedup": "nan"}, "no number"),
])
def test_meaningless_targets_get_a_sentence(given, words):
    with pytest.raises(IntarsiaError, match=words):
        parse_targets(given)


def test_a_recipe_may_hold_them_as_a_table():
    assert parse_targets({"speedup": 1.5, "memory": "2MB"}) == [Target("speedup", 1.5), Target("memory", 2e6)]


def test_targets_are_the_budgets_they_say():
    p = problem()
    assert p.parent_costs()["decode_seconds"] == 17.5
    targets = parse_targets(["speedup=1.1", "throughput=22", "latency=20", "memory=0.5GB"])
    assert [p.bound(t).limit for t in targets] == pytest.approx([20.0, 20.0, 20.0, 5e8])
    assert [str(t) for t in targets] == ["speedup=1.1", "throughput=22tok/s", "latency=20s", "memory=500MB"]
    assert p.value("speedup", p.parent_costs()) == 1.0 and p.value("ttft", p.parent_costs()) == 4.5
    assert p.value("memory", p.parent_costs()) == 540e6 and p.value("throughput", p.parent_costs()) == 20.0
    with pytest.raises(IntarsiaError, match="scenario"):
        Problem(p.sites).bound(Target("throughput", 3.0))


def test_a_share_is_of_what_the_parent_has():
    p = problem()
    targets = parse_targets(["memory=80%", "latency=75 %", "params=1e2%"])
    assert [str(t) for t in targets] == ["memory=80%", "latency=75%", "params=100%"]
    assert [t.value for t in map(p.settled, targets)] == pytest.approx([0.8 * 540e6, 0.75 * 22.0, 230e6])
    assert p.settled(Target("memory", 5.0)) == Target("memory", 5.0) and not any(p.settled(t).share for t in targets)
    with pytest.raises(IntarsiaError, match="no number"):
        parse_target("speedup=80%")


def test_a_speedup_out_of_reach_names_the_range_and_the_nearest():
    p = problem()
    with pytest.raises(Infeasible) as caught:
        check_feasible(p, parse_targets(["speedup=3"]))
    text = str(caught.value)
    # 22 s at most, 4 x 2.5 + 2 = 12 s at least, where every site has lost 1.
    assert "a speed-up of 3.000 is out of reach: between 1.000 and 1.833 is possible" in text
    assert "loss of 4 " in text and text.endswith("--speedup 1.833")
    with pytest.raises(Infeasible) as unscored:
        check_feasible(problem(score=0.0), parse_targets(["speedup=3"]))
    assert "between 1.000 and 1.833" in str(unscored.value) and "loss" not in str(unscored.value)


def test_a_conflicting_pair_is_named_with_the_best_of_each():
    p = problem()
    with pytest.raises(Infeasible) as caught:
        check_feasible(p, parse_targets(["speedup=1.8", "memory=300MB", "params=215M"]))
    text = str(caught.value)
    assert "speedup=1.8 and memory=300MB cannot be met together" in text and "params=215M cannot" not in text
    # Beside 300 MB every site is small: 22 / (4 x 4.7 + 2). At a speed-up of 1.8 all four are fast: 60 + 4 x 110 MB.
    assert "with memory=300MB, speedup reaches 1.057 at best" in text
    assert "with speedup=1.8, memory reaches 500 MB at best" in text
    check_feasible(p, parse_targets(["=".join(found) for found in re.findall(r"--(\w+) (\S+)", text)]))


def test_three_that_only_together_are_too_much():
    """Two sites, three budgets that each need one of them."""
    names = ["prefill_seconds", "weight_bytes", "params"]
    costs = dict.fromkeys([*names, "decode_seconds", "cache_bytes"], 2.0)
    site = [Option("parent", 0.0, costs), *(Option(name, 1.0, costs | {name: 0.0}) for name in names)]
    p = Problem([site] * 2)
    targets = parse_targets(["ttft=2", "memory=6", "params=2"])
    for index in range(3):
        check_feasible(p, [*targets[:index], *targets[index + 1 :]])
    with pytest.raises(Infeasible, match="though any two of them can: with memory=6B and params=2, ttft reaches 4 s"):
        check_feasible(p, targets)


def test_what_the_parent_already_meets_is_said():
    with pytest.raises(IntarsiaError, match=r"already meets memory=2GB \(it has memory 540 MB\)"):
        check_feasible(problem(), parse_targets(["memory=2GB"]))
    check_feasible(problem(), parse_targets(["memory=2GB", "speedup=1.2"]))


def test_nothing_to_gain_is_said():
    p = Problem([[option("parent", 0.0, 1, 1, 1)]], {"weight_bytes": 1.0})
    with pytest.raises(Infeasible, match="No target of these kinds"):
        check_feasible(p, parse_targets(["speedup=1.5"]))


def test_reachable_ranges_respect_the_other_targets():
    p = problem()
    free, bound = reachable(p), reachable(p, [Target("memory", 300e6)])
    assert set(free) == set(KINDS) and free["latency"].extreme == pytest.approx(12.0)
    assert free["memory"].extreme == bound["memory"].extreme == pytest.approx(260e6)
    assert bound["latency"].extreme == pytest.approx(4 * 4.7 + 2)
    assert reach(p, "speedup", [Target("memory", 1e6)]).extreme is None
    other = problem(parent=[1] * 4)
    assert reach(other, "latency").parent == pytest.approx(12.0)


numbers = st.integers(0, 5).map(float)


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_verdict_agrees_with_brute_force_and_the_advice_can_be_followed(data):
    def site():
        return [
            option(f"o{i}", float(i), *(data.draw(numbers) + 0.1 * (i == 0) for _ in range(4)))
            for i in range(data.draw(st.integers(1, 3)))
        ]

    p = Problem([site() for _ in range(data.draw(st.integers(1, 4)))], {"decode_seconds": 1.0, "weight_bytes": 1.0})
    kinds = [kind for kind in ("speedup", "memory", "ttft") if data.draw(st.booleans())] or ["speedup"]
    targets = [Target(kind, data.draw(st.integers(2, 40)) / (8 if kind == "speedup" else 2)) for kind in kinds]
    targets = [t if t.kind != "speedup" else Target("speedup", max(t.value, 1.01)) for t in targets]
    near = nearest_feasible(p, targets)
    try:
        expected = brute_force(p.sites, p.bounds(targets), fixed=p.fixed)
    except Infeasible:
        with pytest.raises(Infeasible):
            check_feasible(p, targets)
        assert near != targets
    else:
        assert near == targets
        assert solve(p.sites, p.bounds(targets), fixed=p.fixed)[0].score == pytest.approx(expected.score, abs=1e-6)
    if near:
        assert math.isfinite(brute_force(p.sites, p.bounds(near), fixed=p.fixed).score)
