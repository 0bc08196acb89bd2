"""A narrower stream: a slice equals a mask, an order changes nothing, and the ranking finds what matters."""

import copy

import pytest
import torch
import torch.nn.functional as F

from compress_toys import BIASED, NORMED, PLAIN, SMALL, relative, statistics, tokens, toy
from intarsia.arch import Architecture, Attention, Experts, FeedForward, Linear, Mamba1, Mamba2
from intarsia.compress.gates import check
from intarsia.compress.score import Scorer
from intarsia.compress.stream import narrow_stream, stream_axes, stream_power
from intarsia.formats import load, save

EVERYTHING = Architecture(
    blocks=(
        Mamba2(4, 8, 8, num_groups=2, proj_bias=True), FeedForward(24, "relu2", gated=False, bias=True),
        Attention(4, 2, 8, qkv_bias=True, out_bias=True), Experts(4, 2, 12, shared_size=8),
        Mamba1(32, time_step_rank=3), Linear(bias=True),
        Experts(3, 1, 8, activation="silu", gated=True, router="neurons"),
    ),
    tied_embeddings=False, **SMALL,
)  # fmt: skip
CASES = {"plain": PLAIN, "biased": BIASED, "normed": NORMED, "everything": EVERYTHING}
HELDOUT = tokens(8, seed=900)


def unequal(arch, seed=0):
    """A model whose stream has channels of many sizes."""
    model = toy(arch, seed)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        sizes = torch.randn(arch.hidden_size, generator=generator).exp()
        for name, axes in stream_axes(arch).items():
            if not name.endswith("norm.weight") and _writes(name):
                shape = [1] * model.get_parameter(name).dim()
                shape[axes[0]] = arch.hidden_size
                model.get_parameter(name).mul_(sizes.view(shape))
    return model


def _writes(name: str) -> bool:
    """Whether a parameter adds to the stream."""
    last = ("o", "down", "out_proj", "proj")
    return name == "embed.weight" or name.endswith("experts.down") or name.split(".")[-2] in last


@torch.no_grad()
def masked(model, keep):
    """The parent with every write to the other channels set to zero: by hand, matrix for matrix."""
    twin = copy.deepcopy(model)
    gone = torch.ones(model.arch.hidden_size, dtype=torch.bool)
    gone[keep] = False
    twin.embed.weight[:, gone] = 0
    for block in twin.blocks:
        mixer, spec = block.mixer, block.spec
        if isinstance(spec, Experts):
            mixer.experts.down[:, gone] = 0
            if spec.shared_size:
                mixer.shared.down.weight[gone] = 0
            continue
        names = {Attention: "o", FeedForward: "down", Linear: "proj"}
        last = getattr(mixer, names.get(type(spec), "out_proj"))
        last.weight[gone] = 0
        if last.bias is not None:
            last.bias[gone] = 0
    return twin


def ranking(model):
    return stream_power(model, [tokens(seed=n) for n in range(4)]).argsort(descending=True)


@pytest.mark.parametrize("name", CASES)
@torch.no_grad()
def test_a_slice_equals_a_mask(name):
    model = unequal(CASES[name])
    keep = ranking(model)[:20]
    child = narrow_stream(model, keep)
    assert child.arch.hidden_size == 20 and child.arch.blocks == model.arch.blocks
    wanted = masked(model, keep)(HELDOUT)
    assert relative(child(HELDOUT), wanted) < 1e-3 and relative(wanted, model(HELDOUT)) > 1e-2


@pytest.mark.parametrize("name", CASES)
@torch.no_grad()
def test_the_sorted_parent_equals_the_parent(name):
    model = unequal(CASES[name])
    order = ranking(model)
    assert not torch.equal(order, order.sort().values)
    assert relative(narrow_stream(model, order)(HELDOUT), model(HELDOUT)) < 1e-4
    assert torch.equal(narrow_stream(model, order.sort().values)(HELDOUT), model(HELDOUT))


def test_what_knows_the_width_of_the_stream():
    axes = stream_axes(EVERYTHING)
    assert axes["embed.weight"] == axes["head.weight"] == axes["blocks.0.mixer.in_proj.weight"] == (1,)
    assert axes["blocks.3.mixer.experts.down"] == axes["blocks.3.mixer.router.weight"] == (1,)
    assert axes["blocks.3.mixer.experts.up"] == (2,) and axes["blocks.5.mixer.proj.weight"] == (0, 1)
    assert axes["blocks.2.mixer.o.bias"] == axes["norm.weight"] == (0,)
    assert not {"blocks.0.mixer.norm.weight", "blocks.2.mixer.q.bias", "blocks.3.mixer.router.bias"} & axes.keys()


@torch.no_grad()
def test_power_is_the_mean_size_of_what_all_norms_give():
    model = unequal(BIASED)
    batches = [tokens(seed=n) for n in range(2)]
    total = torch.zeros(32, dtype=torch.float64)
    for ids in batches:
        x = model.embed_tokens(ids)
        for index, block in enumerate(model.blocks):
            total += F.rms_norm(x.double(), (32,), block.norm.weight.double(), 1e-5).abs().sum((0, 1))
            x = model.run(x, index, index + 1)
        total += F.rms_norm(x.double(), (32,), model.norm.weight.double(), 1e-5).abs().sum((0, 1))
    assert relative(stream_power(model, batches), total / (5 * sum(ids.numel() for ids in batches))) < 1e-4


@pytest.mark.parametrize("arch", [PLAIN, EVERYTHING], ids=["plain", "everything"])
def test_the_ranking_beats_the_original_and_the_reversed_order(arch):
    """With a quarter gone: without half of its stream a random model's answers are as wrong in any order."""
    for seed in range(3):
        model = unequal(arch, seed)
        rank, scorer = ranking(model), Scorer(model, HELDOUT, 2)
        orders = (rank, rank.sort().values, rank.flip(0))
        found = [scorer.whole(narrow_stream(model, order[:24]))["kl"] for order in orders]
        assert found[0] < 0.5 * min(found[1:]), found


def test_the_gate_of_the_stream():
    model = unequal(EVERYTHING)
    found = check(Scorer(model, HELDOUT, 2), statistics(model, 1), {}, stream=ranking(model))
    gates = {gate.axis: gate for gate in found}
    assert list(gates) == ["mamba heads", "mamba channels", "mamba states", "experts", "stream channels"]
    assert all(gate.sorted < 1e-4 for gate in gates.values())
    stream = gates["stream channels"]
    scorer, rank = Scorer(model, HELDOUT, 2), ranking(model)
    orders = {"ranking": rank, "original": rank.sort().values, "reversed": rank.flip(0)}
    for value, order in ((getattr(stream, name), order) for name, order in orders.items()):
        assert value == pytest.approx(scorer.whole(narrow_stream(model, order[:16]))["kl"], rel=1e-4)


@torch.no_grad()
def test_a_narrower_model_is_a_model_of_its_family(tmp_path):
    model = unequal(PLAIN)
    child = narrow_stream(model, ranking(model)[:16])
    assert child.arch.tied_embeddings and child.head_weight is child.embed.weight
    save(child, tmp_path / "child")
    again = load(tmp_path / "child", dtype="float32")[0]
    assert again.arch == child.arch and torch.equal(again(HELDOUT), child(HELDOUT))
    scores = Scorer(model, HELDOUT, 2).whole(child)
    assert scores["kl"] > 0 and scores["cosine"] != scores["cosine"]  # streams of two widths have no angle
    assert 0 < Scorer(model, HELDOUT, 2).greedy(child)["agreement"] < 1
