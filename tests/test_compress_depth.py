"""Blocks left out: every measure against a model without the block, conditional order, uniform choices."""

import pytest
import torch

from compress_toys import PLAIN, SMALL, sites, tokens, toy
from intarsia.arch import Architecture, Attention, FeedForward, Mamba2
from intarsia.base.errors import IntarsiaError
from intarsia.compress.assemble import with_blocks
from intarsia.compress.depth import MEASURES, Removal, by_kind, count_looks, removal_order
from intarsia.compress.options import options_for
from intarsia.compress.problem import pair_name
from intarsia.compress.recipe import Options
from intarsia.compress.score import Scorer
from intarsia.compress.solve import Bound, Option
from intarsia.compress.targets import Problem
from intarsia.compress.uniform import Space, Uniform

HYBRID = Architecture(
    blocks=(Mamba2(4, 8, 8, 2), FeedForward(48, "relu2", False), Mamba2(4, 8, 8, 2), Attention(4, 2, 8, rope=False),
            FeedForward(48, "relu2", False)), rope=None, **SMALL)  # fmt: skip


def scorer(model) -> Scorer:
    return Scorer(model, tokens(4, 24, seed=5), 2)


@pytest.mark.parametrize("measure", MEASURES)
def test_a_damage_is_that_of_a_model_without_the_blocks(measure):
    model = toy(HYBRID)
    score, gone = scorer(model), {1, 3}
    child = with_blocks(model, [b for i, b in enumerate(model.blocks) if i not in gone])
    whole, without = (m.hidden(score.ids)[:, score.positions] for m in (model, child))
    change = without - whole
    expected = {
        "mse": change.square().mean(),
        "logits": (change @ model.head_weight.T).square().sum() / (whole @ model.head_weight.T).square().sum(),
        "kl": torch.tensor(score.whole(child)["kl"]),
    }[measure]
    found = Removal(score, measure).damages({1})
    assert set(found) == {0, 2, 3, 4}
    assert found[3] == pytest.approx(float(expected), rel=1e-4)


def test_the_order_is_conditional():
    """A block that only another's removal makes precious: its copy."""
    model = toy(PLAIN)
    removal = Removal(scorer(model), "kl")
    once = [index for index, _ in removal_order(removal, 0)]
    order = removal_order(removal, 3)
    assert sorted(once) == sorted(index for index, _ in order) == [0, 1, 2, 3]
    assert order[0][0] == once[0] and order[1][1] == min(removal.damages({once[0]}).values())
    assert removal_order(removal, 99)[-1][0] in range(4)
    assert count_looks(4, 3) == 4 + 3 + 2 + 1 and count_looks(4, 99) == count_looks(4, 3)


def test_ranked_by_kind():
    assert by_kind(HYBRID, [4, 2, 0, 3, 1]) == {"ffn": [4, 1], "mamba2": [2, 0], "attention": [3]}


def test_an_unknown_measure():
    with pytest.raises(IntarsiaError, match="known: mse, logits, kl"):
        Removal(scorer(toy(PLAIN)), "cosine")


def test_greedy_answers():
    model = toy(PLAIN)
    score = scorer(model)
    found = score.greedy(model)
    assert found["agreement"] == 1
    answers = model(score.ids)[:, score.positions].argmax(-1)
    assert found["accuracy"] == float((answers == score.ids[:, score.positions + 1]).float().mean())


def space(absent=True) -> Space:
    recipe = Options(
        ffn_widths=(0.5,), multiple=4, mamba_heads=(0.5,), mamba_states=(), linear=False, absent=absent
    )
    options = {i: options_for(block, recipe) for i, block in enumerate(HYBRID.blocks)}
    model_sites, problem_sites = sites(toy(HYBRID)), []
    cost = {"parent": 2.0, "none": 0.0, "ffn 24": 1.0, "mamba2 2x8 n8": 1.0}
    for site in model_sites:
        slots = [[s.name for s in options[i]] if i is not None else ["absent"] for i in (site.attention, site.ffn)]
        pairs = [(a, f) for a in slots[0] for f in slots[1]]
        problem_sites.append([
            Option(pair_name(*("parent" if n == "absent" else n for n in pair)), 0.0,
                   {"size": sum(cost.get(n, 0.0 if n == "absent" else 1.5) for n in pair)}) for pair in pairs
        ])  # fmt: skip
    return Space(HYBRID, model_sites, options, Problem(problem_sites), {"mamba2": [2, 0], "ffn": [1, 4],
                                                                        "attention": [3]})  # fmt: skip


def test_uniform_members_keep_all_they_can():
    found, limit = space(), Bound("size", {"size": 1.0}, 7.0)
    members = list(found.maximal([limit], 0.0))
    assert len({m.name for m in members}) == len(members) and all(found.met(m, [limit]) for m in members)
    assert "2 mamba2 at mamba2 2x8 n8, 2 ffn at ffn 24, 1 attention" in {m.name for m in members}
    every = [
        Uniform({"mamba2": m, "ffn": f, "attention": a}, {"mamba2": x, "ffn": y, "attention": "parent"})
        for m in range(3) for f in range(3) for a in range(2)
        for x in ("parent", "mamba2 2x8 n8") for y in ("parent", "ffn 24")
    ]  # fmt: skip
    fit = [u for u in every if found.met(u, [limit])]
    best = [u for u in fit if not any(v != u and v.options == u.options and all(v.kept[k] >= u.kept[k] for k in u.kept)
                                      for v in fit)]  # fmt: skip
    assert {m.name for m in members} == {u.name for u in best}


def test_the_least_important_leave_first():
    found = space()
    member = Uniform({"mamba2": 1, "ffn": 1, "attention": 1},
                     {"mamba2": "parent", "ffn": "ffn 24", "attention": "parent"})  # fmt: skip
    names = [site[n].name for site, n in zip(found.problem.sites, found.picks(member))]
    assert names == ["parent | none", "none | parent", "parent | ffn 24"]


def test_blocks_must_be_allowed_to_leave():
    with pytest.raises(IntarsiaError, match=r"set options\.absent to true"):
        space(absent=False)
