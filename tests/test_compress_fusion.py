"""FFNs beside one another as one: the parallel formula, what is fused, what it costs, and a run that does it."""

import dataclasses
import json
from types import SimpleNamespace

import pytest
import torch

import intarsia
from compress_toys import SMALL, relative, tokens, toy
from intarsia.arch import Architecture, Attention, FeedForward, block_flops, block_parameters
from intarsia.compress.assemble import with_blocks
from intarsia.compress.controls import interpolated, known_widths
from intarsia.compress.distill import Boundary
from intarsia.compress.fusion import dependence, fuse, fused, outside, places, runs
from intarsia.compress.measure import PHASES, CostTable, key
from intarsia.compress.score import Scorer
from intarsia.compress.summary import _predicted_seconds
from intarsia.ops.norm import rms_norm
from tiny_compression import VOCABULARY, compress, make_parent, make_recipe, make_text

A, HELDOUT = Attention(4, 2, 8), tokens(8, seed=900)
GATED, PLAIN = FeedForward(48), FeedForward(40, "relu2", gated=False)
BIASED = FeedForward(40, "gelu", gated=False, bias=True)


def narrow(block, size):
    return dataclasses.replace(block, intermediate_size=size)


def model_of(*blocks, seed=0):
    return toy(Architecture(blocks=blocks, **SMALL), seed)


def test_runs_are_ffns_of_one_make():
    blocks = (A, GATED, narrow(GATED, 16), GATED, A, GATED, A, PLAIN, PLAIN, GATED, GATED)
    assert runs(blocks) == [range(1, 4), range(7, 9), range(9, 11)]
    assert runs((A, GATED) * 3) == runs(()) == []


def test_the_last_of_a_run_stays_alone():
    blocks = (A, *[GATED] * 8, A, GATED, GATED)
    assert places(blocks, 8) == [range(1, 8)]
    assert places(blocks, 4) == [range(1, 5), range(5, 8)] or places(blocks, 4) == [range(1, 4), range(4, 8)]
    assert [len(group) for group in places(blocks, 3)] == [2, 3, 2]
    assert places(blocks, 1) == places(blocks, 0) == []


@pytest.mark.parametrize("block", [GATED, PLAIN, BIASED], ids=["gated", "plain", "biased"])
@torch.no_grad()
def test_a_fused_block_is_the_sum_of_what_each_gives_to_the_same_stream(block):
    """By the formula, in float64, each FFN with its own norm; widths differ."""
    model = model_of(A, block, narrow(block, 24), narrow(block, 8), block)
    child = fuse(model, [range(1, 4)])
    assert child.arch == fused(model.arch, [range(1, 4)])
    size = block.intermediate_size
    assert [b.intermediate_size for b in child.arch.feed_forwards] == [size + 32, size]
    x = model.run(model.embed_tokens(HELDOUT), 0, 1)
    wide, parts = x.double(), [model.blocks[i] for i in (1, 2, 3)]
    wanted = wide.clone()
    for part in parts:
        twin = toy(Architecture(blocks=(part.spec,), **SMALL)).blocks[0]
        twin.load_state_dict(part.state_dict())
        twin.double()
        wanted += twin.mixer(rms_norm(wide, twin.norm.weight, 1e-5))
    assert relative(child.run(x, 1, 2), wanted) < 3e-6
    assert child.blocks[2] is model.blocks[4] and child.blocks[0] is model.blocks[0]
    assert relative(fuse(model, [range(1, 2)])(HELDOUT), model(HELDOUT)) < 1e-5  # one alone is what it was


@torch.no_grad()
def test_fusing_is_an_error_of_second_order_and_leaving_out_of_first():
    """In what the blocks add, which is small beside the stream of a trained model. KL goes with the error's square, so
    at half of it one falls to a sixteenth and the other to a quarter."""

    def harm(size, seed):
        model = model_of(A, *[GATED] * 4, seed=seed)
        for block in model.blocks[1:]:
            block.mixer.down.weight.mul_(size)
        scorer = Scorer(model, HELDOUT, 2)
        left_out = with_blocks(model, [model.blocks[0], model.blocks[1], model.blocks[4]])
        return [scorer.whole(child)["kl"] for child in (fuse(model, [range(1, 4)]), left_out)]

    for seed in range(3):
        (fused_kl, out_kl), (fused_half, out_half) = harm(0.03, seed), harm(0.015, seed)
        assert 0 < fused_kl < 0.2 * out_kl
        assert 8 < fused_kl / fused_half < 24 and 2.5 < out_kl / out_half < 6


@torch.no_grad()
def test_dependence_is_what_a_block_adds_without_another():
    model, run = model_of(A, GATED, narrow(GATED, 24), GATED, A), range(1, 4)
    found = dependence(model, HELDOUT, run)

    def added(blocks):
        x, updates = model.embed_tokens(HELDOUT), {}
        for index in blocks:
            updates[index] = model.blocks[index].update(x, model.rope_tables(0, 24)[8])
            x = x + updates[index]
        return updates

    whole = added(range(4))
    for i in run:
        rest = added([n for n in range(4) if n != i])
        for j in run:
            away = 1 - torch.cosine_similarity(rest[j], whole[j], dim=-1).mean() if j > i else torch.tensor(0.0)
            assert found[i - 1, j - 1] == pytest.approx(float(away), abs=1e-5)
    assert found[0, 1] > 0


def test_ends_of_layers_inside_a_fused_block_are_left_out():
    ends = [Boundary(2, 2), Boundary(4, 3), Boundary(6, 4), Boundary(8, 5), Boundary(10, 6)]
    assert outside(ends, [range(1, 4)]) == [Boundary(6, 2), Boundary(8, 3), Boundary(10, 4)]
    assert outside(ends, []) == ends


def test_it_costs_one_block():
    blocks = (A, GATED, narrow(GATED, 24), GATED, GATED)
    arch = Architecture(blocks=blocks, **SMALL)
    child = fused(arch, places(blocks, 4))
    one = child.blocks[1]
    assert len(child.blocks) == 3 and one == FeedForward(120)
    assert block_parameters(one, 32) == sum(block_parameters(b, 32) for b in blocks[1:4]) - 2 * 32
    assert block_flops(one, 32, 1) == sum(block_flops(b, 32, 1) for b in blocks[1:4])
    # Seconds: a constant of every block and a slope, of which the fused one has the constant once.
    ladder = [narrow(GATED, w) for w in (24, 48)]
    seconds = {key(b): {p: 1e-3 + 1e-5 * b.intermediate_size for p in PHASES} for b in ladder} | {
        key(A): dict.fromkeys(PHASES, 2e-3)
    }
    table = CostTable(seconds, dict.fromkeys(PHASES, 5e-3), {}, parent_blocks=list(blocks))
    known = known_widths(GATED, table)
    assert interpolated(known, 120) == pytest.approx(2 * (1e-3 + 120e-5))
    specs = [SimpleNamespace(block=b, precision="") for b in ladder]
    job = SimpleNamespace(sites=[SimpleNamespace(ffn=1)], options={1: specs}, table=table,
                          model=SimpleNamespace(arch=arch))  # fmt: skip
    assert _predicted_seconds(job, arch.blocks) - _predicted_seconds(job, child.blocks) == pytest.approx(2 * 2 * 1e-3)


def test_a_run_fuses_after_the_search(tmp_path):
    ffn = FeedForward(96)
    arch = Architecture(
        blocks=(Attention(4, 2, 16), *[ffn] * 5), hidden_size=64, vocab_size=VOCABULARY, max_positions=256,
        family="intarsia",
    )  # fmt: skip
    parent = make_parent(tmp_path / "parent", arch)
    recipe = make_recipe(tmp_path / "tiny.toml", make_text(tmp_path / "text"))
    settings = ("fusion.most=4", "options.ffn_widths=[0.5]", "options.absent=false", "options.linear=false",
                "options.kv_methods=[]", "library.tokens=0", "cost.repeats=1", "cost.calibration=0",
                "tournament.finalists=1", "search.solutions=1", "distill.tokens=256", "distill.evaluations=1",
                "distill.cosine_weight=0.5", "evaluate.tokens=256")  # fmt: skip
    words = [word for setting in settings for word in ("--set", setting)]
    status, _, err = compress(parent, "--recipe", recipe, "--params", "0.13M", "--out", tmp_path / "run", *words)
    assert status == 0, err
    found = intarsia.load(tmp_path / "run" / "child")[0].arch
    sites = json.loads((tmp_path / "run" / "summary.json").read_text())["child"]["sites"]
    widths = [row["ffn"]["block"]["intermediate_size"] for row in sites]
    assert len(found.blocks) == 3 and len(widths) == 5
    assert [b.intermediate_size for b in found.feed_forwards] == [sum(widths[:-1]), widths[-1]]
