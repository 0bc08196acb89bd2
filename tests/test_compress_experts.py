"""Fewer experts, and experts out of a dense FFN: slices equal masks, all pieces are the FFN, clusters are the best."""

import dataclasses
import itertools

import pytest
import torch
import torch.nn.functional as F

from compress_toys import LADDER, PLAIN, SMALL, relative, sites, statistics, tokens, toy
from intarsia.arch import (
    Architecture,
    Attention,
    Experts,
    FeedForward,
    active_parameters,
    block_flops,
    block_parameters,
)
from intarsia.base.errors import IntarsiaError
from intarsia.compress.experts import assign, balanced_clusters, rank_experts, representatives, slice_experts
from intarsia.compress.gates import check
from intarsia.compress.library import Builder, Library, stream
from intarsia.compress.options import fewer_experts, options_for
from intarsia.compress.recipe import Library as Recipe
from intarsia.compress.score import Scorer, score_library
from intarsia.compress.statistics import collect
from intarsia.compress.surgery import make_option
from intarsia.formats import export, load, save
from intarsia.model import ResidualBlock, make_mixer

MIXED = Experts(8, 2, 12, shared_size=16)
CASES = {
    "plain": MIXED,
    "gated": Experts(6, 2, 12, activation="silu", gated=True, normalise=False, routed_scale=2.5),
    "groups": Experts(8, 3, 12, num_expert_groups=2, groups_per_token=2),
    "neurons": Experts(6, 2, 12, shared_size=16, activation="silu", gated=True, router="neurons"),
}
HELDOUT = tokens(8, seed=900)
RELU2 = Architecture.transformer(2, Attention(4, 2, 8), FeedForward(48, "relu2", gated=False), **SMALL)
CUT = LADDER.model_copy(update={
    "ffn_widths": (), "kv_methods": (), "linear": False, "moe": ("S2A2E8", "S1A3E12"),
    "moe_methods": ("cmoe", "moefication"),
})  # fmt: skip


def mixture(block: Experts, seed: int = 0):
    """Experts that are used unequally, and say unequally much."""
    model = toy(Architecture(blocks=(Attention(4, 2, 8), block) * 2, **SMALL), seed)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for each in model.blocks[1::2]:
            count = block.num_experts
            each.mixer.experts.down.mul_(torch.randn(count, 1, 1, generator=generator).exp())
            each.mixer.router.bias.copy_(0.1 * torch.randn(count, generator=generator))
    return model


def inputs(model, index=1):
    return next((n, update) for i, _, n, update, _ in stream(model, HELDOUT) if i == index)


def answer(mixer, expert, token):
    """(D,): what one expert says to one token (D,)."""
    stack, spec = mixer.experts, mixer.spec
    gate = F.silu(stack.gate[expert] @ token) if spec.gated else 1
    rises = stack.up[expert] @ token
    return stack.down[expert] @ (gate * rises if spec.gated else rises.relu().square())


def sliced(block, spec, order, arch):
    child = ResidualBlock(spec, arch, torch.float32).requires_grad_(False)
    slice_experts(block.mixer, child.mixer, order)
    return child.mixer


@pytest.mark.parametrize("name", CASES)
def test_contributions_are_sums_over_the_tokens_of_an_expert(name):
    model = mixture(CASES[name])
    ids = tokens(seed=3)
    found = collect(model, [ids])[1].experts
    with torch.no_grad():
        x = model.run(model.embed_tokens(ids), 0, 1)
        block = model.blocks[1].double()
        mixer = block.mixer
        n = F.rms_norm(x.double(), (32,), block.norm.weight, 1e-5).flatten(0, 1)
        weights, chosen = mixer.router(n)
        expected = torch.zeros(CASES[name].num_experts, dtype=torch.float64)
        for token, row, picks in zip(n, weights, chosen):
            for weight, expert in zip(row, picks.tolist()):
                expected[expert] += weight * answer(mixer, expert, token).norm()
    assert relative(found, expected) < 1e-4


@pytest.mark.parametrize("name", CASES)
@torch.no_grad()
def test_a_slice_equals_a_mask(name):
    """Against the parent with a correction bias that keeps every token away from the experts that left."""
    model, block = mixture(CASES[name]), CASES[name]
    order = rank_experts(statistics(model, 2)[1])
    fewer = fewer_experts(block, 0.5)
    assert fewer.num_experts == block.num_experts // 2 or name == "gated"
    n, _ = inputs(model)
    if name == "neurons":  # shares are of the experts that are left: they grow alike, beside nothing else
        model.blocks[1].mixer.router.bias.zero_()
        model.blocks[1].mixer.router.scale.zero_()
    child = sliced(model.blocks[1], fewer, order, model.arch)
    size, kept = block.num_experts // block.num_expert_groups, fewer.num_experts // block.num_expert_groups
    for group in range(block.num_expert_groups):
        gone = [e for e in order.tolist() if e // size == group][kept:]
        model.blocks[1].mixer.router.bias[gone] = -torch.inf
    assert relative(child(n), model.blocks[1].mixer(n)) < 1e-5


@pytest.mark.parametrize("name", CASES)
@torch.no_grad()
def test_the_sorted_parent_equals_the_parent(name):
    model = mixture(CASES[name])
    order = rank_experts(statistics(model, 2)[1])
    n, update = inputs(model)
    assert not torch.equal(order, order.sort().values)
    assert relative(sliced(model.blocks[1], CASES[name], order, model.arch)(n), update) < 1e-5


def test_the_ranking_beats_the_original_and_the_reversed_order():
    errors, gates = torch.zeros(3), []
    for seed in range(4):
        model = mixture(MIXED, seed)
        stats = statistics(model, 4)
        rank, n, update = rank_experts(stats[1]), *inputs(model)
        for place, order in enumerate((rank, torch.arange(8), rank.flip(0))):
            errors[place] += relative(sliced(model.blocks[1], fewer_experts(MIXED, 0.5), order, model.arch)(n), update)
        gates += check(Scorer(model, HELDOUT, 2), stats, {})
    assert errors[0] < errors[1] and errors[0] < errors[2], errors
    assert {gate.axis for gate in gates} == {"experts"} and all(gate.sorted < 1e-5 for gate in gates)
    assert sum(g.ranking for g in gates) < min(sum(g.original for g in gates), sum(g.reversed for g in gates))


def test_how_many_experts_may_stay():
    assert [s.name for s in options_for(MIXED, LADDER)] == ["parent", "experts 2/6 x 12", "experts 2/4 x 12", "none"]
    assert fewer_experts(MIXED, 0.1).num_experts == 2  # a token needs two
    assert fewer_experts(CASES["groups"], 0.5).num_experts == 4 and fewer_experts(CASES["groups"], 0.1).num_experts == 4
    assert fewer_experts(Experts(8, 3, 4, num_expert_groups=4, groups_per_token=1 + 1), 0.1).num_experts == 8


@pytest.mark.parametrize("arch", [PLAIN, RELU2], ids=["gated", "squared ReLU"])
@pytest.mark.parametrize("method", ["cmoe", "moefication"])
@pytest.mark.parametrize("shape", ["S2A6E8", "S0A12E12", "S3A1E4"])
@torch.no_grad()
def test_all_pieces_together_are_the_dense_ffn(arch, method, shape):
    model = toy(arch)
    stats = collect(model, [tokens(seed=n) for n in range(4)], marks=True)
    recipe = CUT.model_copy(update={"moe": (shape,), "moe_methods": (method,)})
    spec = options_for(arch.blocks[1], recipe)[1]
    assert (spec.name, spec.method) == (f"experts {shape} {method}", method)
    child = make_option(model.blocks[1], spec, arch, stats[1]).mixer
    n, update = inputs(model)
    assert relative(child(n), update) < 1e-5
    # Every channel is in one piece, once.
    rows = child.experts.up.flatten(0, 1)
    rows = torch.cat([rows, child.shared.up.weight]) if spec.block.shared_size else rows
    parent = model.blocks[1].mixer.up.weight
    assert sorted(torch.cdist(rows, parent).argmin(1).tolist()) == list(range(48))


@torch.no_grad()
def test_fewer_pieces_are_nearer_with_shared_channels_and_clusters_than_by_the_order_of_the_channels():
    errors = dict.fromkeys(("cmoe", "as they stand"), 0.0)
    for seed in range(4):
        model = toy(PLAIN, seed)
        stats = collect(model, [tokens(seed=n) for n in range(8)], marks=True)[1]
        spec = next(s for s in options_for(PLAIN.blocks[1], CUT) if s.name == "experts S2A2E8 cmoe")
        child = make_option(model.blocks[1], spec, PLAIN, stats)
        n, update = inputs(model)
        errors["cmoe"] += relative(child.mixer(n), update)
        blind = dataclasses.replace(stats, marks=torch.eye(48) + 1e-3 * torch.ones(48, 48))
        child = make_option(model.blocks[1], spec, PLAIN, blind)
        errors["as they stand"] += relative(child.mixer(n), update)
    assert errors["cmoe"] < errors["as they stand"], errors


def test_marks_count_the_tokens_to_which_both_channels_add_most():
    model, ids = toy(PLAIN), tokens(seed=5)
    found = collect(model, [ids], marks=True)[1].marks
    assert collect(model, [ids])[1].marks is None
    with torch.no_grad():
        x = model.run(model.embed_tokens(ids), 0, 1)
        mixer = model.blocks[1].mixer
        channels = mixer.channels(F.rms_norm(x, (32,), model.blocks[1].norm.weight, 1e-5)).flatten(0, 1)
        expected = torch.zeros(48, 48)
        for token in channels:
            most = (token.abs() * mixer.down.weight.norm(dim=0)).argsort(descending=True)[:10]
            for i, j in itertools.product(most.tolist(), repeat=2):
                expected[i, j] += 1
    assert (found - expected).abs().sum() < 1e-2 * expected.sum()  # a tie within rounding may go either way
    # It is the same whatever a channel is multiplied with and its column divided by.
    with torch.no_grad():
        scale = torch.linspace(0.2, 5, 48)
        model.blocks[1].mixer.up.weight.mul_(scale[:, None])
        model.blocks[1].mixer.down.weight.div_(scale)
    assert (collect(model, [ids], marks=True)[1].marks - expected).abs().sum() < 1e-2 * expected.sum()


def test_an_assignment_is_the_best_there_is():
    """Against all ways to give six channels to three centres, two each."""
    for seed in range(5):
        likeness = torch.randn(6, 3, generator=torch.Generator().manual_seed(seed))
        found = assign(likeness)
        assert sorted(found.flatten().tolist()) == list(range(6))

        def worth(order, likeness=likeness):
            return sum(float(likeness[channel, place // 2]) for place, channel in enumerate(order))

        best = max(map(worth, itertools.permutations(range(6))))
        assert worth(found.flatten().tolist()) == pytest.approx(best)


def test_inner_products_find_what_distances_find():
    """Marks are 0 or 1: with clusters of one size, the least sum of L1 distances is the largest sum of likeness."""
    generator = torch.Generator().manual_seed(1)
    marks = (torch.rand(50, 6, generator=generator) < 0.4).double()
    centres = torch.stack([marks[:, :2].mean(1), marks[:, 2:4].mean(1), marks[:, 4:].mean(1)], 1)  # (tokens, 3)
    distance = (marks[:, :, None] - centres[:, None]).abs().sum(0)
    orders = list(itertools.permutations(range(6)))
    best = min(sum(float(distance[c, p // 2]) for p, c in enumerate(order)) for order in orders)
    found = assign(marks.T @ centres)
    assert sum(float(distance[c, p]) for p in range(3) for c in found[p].tolist()) == pytest.approx(best)
    clusters = torch.tensor([[0, 1, 2], [3, 4, 5]])
    away = [[float((marks[:, c] - marks[:, row].mean(1)).abs().sum()) for c in row] for row in clusters]
    for row, picked, distances in zip(clusters.tolist(), representatives(marks.T @ marks, clusters).tolist(), away):
        assert distances[row.index(picked)] == pytest.approx(min(distances))


def test_planted_clusters_are_found():
    generator = torch.Generator().manual_seed(0)
    centres = 4 * torch.randn(4, 16, generator=generator)
    mixed = torch.randperm(24, generator=generator)
    rows = (centres.repeat_interleave(6, 0) + 0.3 * torch.randn(24, 16, generator=generator))[mixed]
    clusters = balanced_clusters(rows @ rows.T, 4, sweeps=10)
    assert {frozenset((mixed[c] // 6).tolist()) for c in clusters} == {frozenset([n]) for n in range(4)}


def test_a_token_costs_the_experts_that_it_uses():
    dense = FeedForward(48)
    pieces = Experts(6, 2, 6, 12, "silu", True, router="neurons")
    router = 2 * 32 * 6
    assert block_flops(pieces, 32, 1) == 2 * (router + 3 * 32 * (2 * 6 + 12))
    everything = dataclasses.replace(pieces, experts_per_token=6)
    assert block_flops(everything, 32, 1) == block_flops(dense, 32, 1) + 2 * router
    assert block_parameters(pieces, 32) == block_parameters(dense, 32) + router + 12
    assert active_parameters(pieces, 32) == 32 + router + 12 + 3 * 32 * (2 * 6 + 12)
    assert active_parameters(dense, 32) == block_parameters(dense, 32)
    for block in (*CASES.values(), pieces):
        mixer = make_mixer(block, 32, 1e-5, torch.float32, "meta")
        assert sum(p.numel() for p in mixer.parameters()) + 32 == block_parameters(block, 32)


def test_the_router_learns_from_where_all_pieces_count_fully():
    model = toy(PLAIN)
    stats = collect(model, [tokens()], marks=True)[1]
    mixer = make_option(model.blocks[1], options_for(PLAIN.blocks[1], CUT)[1], PLAIN, stats).mixer.requires_grad_(True)
    mixer(inputs(model)[0]).square().sum().backward()
    assert mixer.router.scale.grad.any() and not mixer.router.weight.grad.any()
    with torch.no_grad():
        mixer.router.scale.fill_(0.1)
    mixer(inputs(model)[0]).square().sum().backward()
    assert mixer.router.weight.grad.any() and mixer.router.gate.grad.any()
    assert mixer.to(torch.bfloat16).router.scale.dtype == torch.float32


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("unchosen", [0.0, 0.25, 1.0])
def test_all_experts_answer_while_they_learn_and_the_chosen_alone_count_fully(name, unchosen):
    """float64, token by token, and gradients as well (DS-MoE, arXiv 2404.05567)."""
    model = mixture(CASES[name]).double()
    mixer, spec = model.blocks[1].mixer.requires_grad_(True), CASES[name]
    n = torch.randn(1, 7, 32, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    mixer.unchosen = unchosen
    y = mixer(n)[0]
    weights, chosen = mixer.router.all_weights(n[0])
    expected = []
    for token, row, picks in zip(n[0], weights, chosen):
        counts = [1.0 if e in picks else unchosen for e in range(spec.num_experts)]
        said = sum(c * w * answer(mixer, e, token) for e, (c, w) in enumerate(zip(counts, row)))
        expected.append(said + (mixer.shared(token[None])[0] if spec.shared_size else 0))
    expected = torch.stack(expected)
    assert relative(y, expected) < 1e-12
    wanted = torch.autograd.grad(expected.square().sum(), list(mixer.experts.parameters()), retain_graph=True)
    found = torch.autograd.grad(y.square().sum(), list(mixer.experts.parameters()))
    assert all(relative(f, w) < 1e-12 for f, w in zip(found, wanted))
    idle = set(range(spec.num_experts)) - set(chosen.flatten().tolist())
    assert all(bool(found[-1][e].any()) == bool(unchosen) for e in idle)


def test_in_the_library_scored_and_saved(tmp_path):
    model = toy(PLAIN)
    options = {i: options_for(b, CUT) for i, b in enumerate(PLAIN.blocks)}
    stats = collect(model, [tokens(seed=n) for n in range(4)], marks=True)
    made = Builder(model, options, stats, Recipe(tokens=0, batch_tokens=96), "refit", tmp_path)
    losses = made.losses(HELDOUT)
    made.store(losses, losses)
    library = Library.open(tmp_path, model)
    n, update = inputs(model)
    with torch.no_grad():
        for spec in options[1][1:-1]:
            y = library.block(1, spec).mixer(n)
            loss = float((y - update).square().sum() / update.square().sum())
            assert loss == pytest.approx(losses[1][spec.name], rel=1e-3) and 0 < loss < 1
    rows = score_library(Scorer(model, HELDOUT, 2), library, sites(model), options, tmp_path / "scores.jsonl")
    assert all(r.kl > 0 for r in rows)
    assert {"experts S2A2E8 cmoe", "experts S1A3E12 moefication"} <= {r.ffn for r in rows}
    model.blocks[1] = library.block(1, options[1][1])
    model.arch = PLAIN.replace(blocks=(PLAIN.blocks[0], options[1][1].block, *PLAIN.blocks[2:]))
    save(model, tmp_path / "child")
    again = load(tmp_path / "child", dtype="float32")[0]
    with torch.no_grad():
        assert again.arch.family == "llama" and torch.equal(again(HELDOUT), model(HELDOUT))
    for target, why in (("llama", "as llama: its blocks are not"), ("nemotron_h", "its embeddings are tied"),
                        ("gguf", "no kind for this model: its blocks are not an alternation")):  # fmt: skip
        with pytest.raises(IntarsiaError, match=why):
            export(tmp_path / "child", tmp_path / f"out.{target}", target)


def test_a_format_without_such_routers_says_so():
    from intarsia.formats.nemotron_h import why_not

    arch = RELU2.replace(rope=None, blocks=(Experts(6, 2, 6, 12, router="neurons"),))
    assert "chosen by channels that stand for them" in why_not(arch)


@pytest.mark.parametrize("block, shape, why", [
    (FeedForward(48), "S2A2", "'S2A2' is no way to cut an FFN up"),
    (FeedForward(48), "S2A7E8", "is no way to cut an FFN up"),
    (FeedForward(48), "S1A1E7", "its 48 channels, no multiple of 7"),
    (FeedForward(48, bias=True), "S2A2E8", "cannot be cut up because of its biases"),
])  # fmt: skip
def test_what_cannot_be_cut_up_is_a_sentence(block, shape, why):
    with pytest.raises(IntarsiaError, match=why):
        options_for(block, CUT.model_copy(update={"moe": (shape,)}))
    with pytest.raises(IntarsiaError, match="a router of kind 'softmax' is not known; known: sigmoid, neurons"):
        Experts(4, 2, 8, router="softmax")
