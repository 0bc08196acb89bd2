"""Blends: exact proportions in every prefix, boundaries that scale, sources by name, budgets that are refused."""

from fractions import Fraction

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from intarsia.base.errors import IntarsiaError
from intarsia.data.blend import Blend, Phase, blend_names, load_blend, tokens_of
from intarsia.data.order import Order, Stretch, budget_table, check_epochs, make_order
from intarsia.data.turns import Turns

PUBLISHED = load_blend("nemotron-h")
EVERY = dict.fromkeys(PUBLISHED.categories, 10**12)
SMALL = dict.fromkeys(PUBLISHED.categories, 10**8)

WEIGHTS = st.lists(st.one_of(st.integers(1, 10**12), st.floats(1e-3, 1e3)), min_size=1, max_size=12)


def walk(turns, count):
    """Turns one by one, with what everyone had so far, counted here."""
    had = dict.fromkeys(turns.shares, 0)
    for turn in range(count):
        name, rank = turns.at(turn)
        assert rank == had[name]
        had[name] += 1
        yield turn + 1, had


@pytest.mark.parametrize("phase", range(4))
def test_the_published_proportions_hold_in_every_prefix(phase):
    turns = Turns(PUBLISHED.weights(EVERY)[phase])
    for count, had in walk(turns, 3000):
        assert had == turns.counts(count)
        assert all(abs(n - count * turns.shares[name]) <= turns.errors[name] for name, n in had.items())
    assert max(turns.errors.values()) < 1.4


@given(WEIGHTS, st.integers(0, 10**15))
@settings(max_examples=60, deadline=None)
def test_any_proportions_hold_at_any_place(weights, far):
    turns = Turns({f"s{i}": w for i, w in enumerate(weights)})
    assert sum(turns.shares.values()) == 1
    for count, had in walk(turns, 40):
        assert had == turns.counts(count) and sum(had.values()) == count
    before, after = turns.counts(far), turns.counts(far + 1)
    name, rank = turns.at(far)
    assert rank == before[name] and after == before | {name: rank + 1}
    assert all(abs(n - far * turns.shares[s]) <= turns.errors[s] + 1e-9 for s, n in before.items())
    assert max(turns.errors.values()) < 2


def test_the_published_boundaries_and_their_scale():
    """Nemotron-H: 20T run 0-12 / 12-16 / 16-19.62 / 19.62-20, 15T run 0-9 / 9-12 / 12-14.62 / 14.62-15 (in T)."""
    assert PUBLISHED.ends(20 * 10**12) == [12 * 10**12, 16 * 10**12, 19_620 * 10**9, 20 * 10**12]
    assert PUBLISHED.ends(15 * 10**12) == [9 * 10**12, 12 * 10**12, 14_620 * 10**9, 15 * 10**12]
    assert PUBLISHED.ends(15_000_000) == [9_000_000, 12_000_000, 14_620_000, 15_000_000]
    for budget, tokens in ((20_000_000, SMALL), (20 * 10**12, EVERY)):
        order = make_order(PUBLISHED, tokens, budget, 1024)
        assert [s.end for s in order.stretches] == [end // 1024 for end in PUBLISHED.ends(budget)]
        assert order.total == budget // 1024 and order.phase(0) == "1" and order.phase(order.total - 1) == "4"


def test_weights_are_the_published_ones_normalised():
    phases = PUBLISHED.weights(EVERY)
    assert [round(100 * float(p["code"]), 1) for p in phases] == [20.0] * 4
    assert "sft" not in phases[0] and float(phases[3]["sft"]) == pytest.approx(0.318, abs=5e-4)
    assert phases[0]["web"] == Fraction(59, 100) and all(sum(p.values()) == 1 for p in phases)


def test_sources_stand_for_categories():
    blend = Blend(
        phases=(Phase(weights={"web": 60, "math": 30, "code": 10}), ),
        sources={"web": ["wiki", "news"], "math": [], "code": {"python": 3, "c": 1}},
    )
    shares = blend.weights({"wiki": 100, "news": 300, "python": 5, "c": 5})[0]
    assert shares == {
        "wiki": Fraction(60, 70) / 4, "news": Fraction(60, 70) * 3 / 4, "python": Fraction(10, 70) * 3 / 4,
        "c": Fraction(10, 70) / 4,
    }
    twice = Blend(phases=(Phase(weights={"web": 1, "crawl": 1}),), sources={"web": ["wiki"], "crawl": ["wiki"]})
    assert twice.weights({"wiki": 7}) == [{"wiki": 1}]


@pytest.mark.parametrize(
    ("changes", "tokens", "words"),
    [
        ({}, {"web": 9, "code": 9}, r"has math, and the data have no category .*: web, code\. Say in sources"),
        ({"sources": {"math": ["wiki"]}}, {"web": 9, "code": 9}, "takes wiki for math, and the data have no"),
        ({"sources": {"maths": []}}, {"web": 9}, r"names maths, which no phase has.*Did you mean 'math'"),
        ({"sources": {"math": []}}, {"web": 9, "code": 0}, "code has no tokens to train on"),
        ({"sources": {"web": [], "math": [], "code": []}}, {"web": 9}, "phase one has no text left"),
    ],
)
def test_what_the_data_lack_is_named(changes, tokens, words):
    blend = Blend(phases=(Phase(weights={"web": 6, "math": 3, "code": 1}, name="one"),), **changes)
    with pytest.raises(IntarsiaError, match=words):
        blend.weights(tokens)


def test_recipes_are_read_strictly(tmp_path):
    assert {"nemotron-h", "nemotron-h-text"} <= set(blend_names())
    text = load_blend("nemotron-h-text")
    assert text.phases == PUBLISHED.phases and text.sources["web"] == [] and text.full_scale == "15T"
    assert load_blend("nemotron-h", ["max_epochs=2.5"]).max_epochs == 2.5
    own = tmp_path / "own.toml"
    for content, words in [
        ("[[phases]]\nweights = { web = -1 }", "the weight of web must be finite and not negative"),
        ("[[phases]]\nweights = { web = 0 }", "at least one category needs a positive weight"),
        ("[[phases]]\nweights = { web = 1 }\nuntil = 1.5", "fraction over 0 and up to 1"),
        ("[[phases]]\nweights = { web = 1 }\nuntil = 'last week'", "'week' is no count of tokens"),
        ("[[phase]]\nweights = { web = 1 }", "Did you mean 'phases'"),
        ("about = 'none'", "has no phases"),
        ("base = 'nemotron'", r"no blend 'nemotron'.*Did you mean 'nemotron-h'"),
    ]:
        own.write_text(content)
        with pytest.raises(IntarsiaError, match=words):
            load_blend(own)
    own.write_text("base = 'nemotron-h'\nmax_epochs = 2\n[sources]\nweb = ['wiki']")
    assert load_blend(own).max_epochs == 2 and load_blend(own).phases == PUBLISHED.phases


def test_counts_of_tokens():
    assert [tokens_of(t) for t in ("380B", "1.5T", "20m", "20_000_000", 5, "1e6")] == [
        380 * 10**9, 1_500 * 10**9, 20_000_000, 20_000_000, 5, 1_000_000,
    ]
    for wrong in ("", "many", "-3M", "3 G"):
        with pytest.raises(IntarsiaError, match="no count of tokens"):
            tokens_of(wrong)


def test_phases_must_follow_each_other():
    phases = (Phase(weights={"a": 1}, until=0.6), Phase(weights={"a": 1}, until="last 380B"), Phase(weights={"a": 1}))
    assert Blend(phases=phases).ends(10**12) == [600 * 10**9, 620 * 10**9, 10**12]
    with pytest.raises(IntarsiaError, match=r"phase 2 would end \(last 380B\) before it begins"):
        Blend(phases=phases).ends(10**11)
    with pytest.raises(IntarsiaError, match="the last phase ends after 600 of 1,000 tokens"):
        Blend(phases=phases[:1]).ends(1000)


def test_a_source_goes_on_through_phases_and_changes():
    """Every source's own samples count up without a gap, whatever the phases, and through a change of blend."""
    order = make_order(PUBLISHED, SMALL, 2_000_000, 1000)
    half_new = Blend(phases=(Phase(weights={"math": 1, "web": 1, "new": 2}),))
    other = make_order(half_new, SMALL | {"new": 1}, 3_000_000, 1000)
    changed = order.changed(1300, other)
    assert [changed.at(i) for i in range(1300)] == [order.at(i) for i in range(1300)]
    assert changed.total == 3000 and changed.at(4000)  # past the plan the last phase goes on
    for which in (order, changed):
        had = dict.fromkeys(which.sources, 0)
        for index in range(which.total):
            assert index % 97 or which.consumed(index) == had
            source, rank = which.at(index)
            assert rank == had[source]
            had[source] += 1
        assert which.consumed(which.total) == had
    later = changed.consumed(3000)["new"] - changed.consumed(1300)["new"]
    assert later == 850 and changed.phase(1299) == "2" and changed.phase(1300) == "1"
    assert order.changed(0, other).at(5) == other.at(5)
    with pytest.raises(IntarsiaError, match="planned for 3,000 samples and cannot begin at 3,000"):
        order.changed(3000, other)


def test_the_budget_is_told_and_too_many_epochs_are_refused():
    """The paper's own draw: at 20T about 456B (phase 3) and 121B (phase 4) of 230B SFT-style tokens, 2.5 epochs."""
    length, budget = 8192, 20 * 10**12
    tokens = EVERY | {"sft": 230 * 10**9, "web": 9 * 10**12, "code": 4 * 10**12}
    order = make_order(PUBLISHED, tokens, budget, length)
    rows = {s: n // length for s, n in tokens.items()}
    sft = {d.phase: d.tokens / 1e9 for d in budget_table(order, rows, length) if d.source == "sft"}
    assert sft["3"] == pytest.approx(456, abs=2) and sft["4"] == pytest.approx(121, abs=1)
    total = {s: sum(d.epochs for d in budget_table(order, rows, length) if d.source == s) for s in rows}
    assert total["sft"] == pytest.approx(2.5 + 36 / 230, abs=0.05)  # 36B in phase 2, where the share is by subtraction
    check_epochs(order, rows, length, 4)
    with pytest.raises(IntarsiaError, match=r"read sft 2\.7 times .* max_epochs is 2\. Train on at most .* 14,\d"):
        check_epochs(order, rows, length, 2)


def test_an_order_far_out_costs_nothing():
    order = Order([Stretch("1", 0, 10**15, Turns(PUBLISHED.weights(EVERY)[0]))])
    source, rank = order.at(10**15 - 1)
    assert rank == order.consumed(10**15 - 1)[source]
