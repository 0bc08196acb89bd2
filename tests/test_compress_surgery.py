"""Options made without training: rotations that change nothing, slices, means, least squares."""

import copy
import dataclasses

import numpy as np
import pytest
import torch

from compress_toys import ALL, BIASED, LADDER, NORMED, PLAIN, SMALL, all_options, relative, statistics, tokens, toy
from intarsia.arch import Architecture, Attention, FeedForward, Linear
from intarsia.compress.importance import RIDGE, rank_kv_heads
from intarsia.compress.options import OptionSpec, options_for
from intarsia.compress.statistics import collect
from intarsia.compress.surgery import _align, _any_rotation, _heads, _pair_rotation, make_option, procrustes

WIDE = Architecture.transformer(2, Attention(8, 4, 8, qkv_bias=True), FeedForward(24), **SMALL)


def option(model, index, spec, stats):
    order = torch.arange(getattr(model.arch.blocks[index], "intermediate_size", 0)) if spec.method == "prefix" else None
    return make_option(model.blocks[index], spec, model.arch, stats, order)


def fewer(model, index, kv, method) -> OptionSpec:
    """The option of a method with `kv` KV heads."""
    recipe = LADDER.model_copy(update={"kv_methods": (method,)})
    return next(s for s in options_for(model.arch.blocks[index], recipe)
                if s.method == method and s.block.num_kv_heads == kv)  # fmt: skip


def orthogonal(size, seed):
    return torch.linalg.qr(torch.randn(size, size, generator=torch.Generator().manual_seed(seed)))[0]


def pair_turn(size, seed):
    """A rotation within each rotary pair (d, d + P/2)."""
    angle = 6.28 * torch.rand(size // 2, generator=torch.Generator().manual_seed(seed))
    first, turn = torch.arange(size // 2), torch.zeros(size, size)
    second = first + size // 2
    turn[first, first] = turn[second, second] = angle.cos()
    turn[second, first], turn[first, second] = angle.sin(), -angle.sin()
    return turn


@torch.no_grad()
def make_copies(model, index):
    """All KV heads of a block become rotated copies of its first: values by any rotation, keys within rotary pairs."""
    mixer, size = model.blocks[index].mixer, model.blocks[index].spec.head_dim
    for head in range(1, mixer.spec.num_kv_heads):
        rows, turns = slice(head * size, (head + 1) * size), (pair_turn(size, head), orthogonal(size, head))
        for layer, turn in zip((mixer.k, mixer.v), turns):
            layer.weight[rows] = turn @ layer.weight[:size]
            if layer.bias is not None:
                layer.bias[rows] = turn @ layer.bias[:size]


# Alignment of heads


@pytest.mark.parametrize(
    "arch, merged", [(PLAIN, 2), (NORMED, 2), (BIASED, 2), (BIASED, 4), (WIDE, 2), (WIDE, 4)],
    ids=["plain 2", "normed 2", "biased 2", "biased 4", "wide 2", "wide 4"],
)  # fmt: skip
@torch.no_grad()
def test_rotating_heads_before_merging_changes_nothing(arch, merged):
    model, ids = toy(arch), tokens(seed=70)
    kv = arch.blocks[0].num_kv_heads
    turned, found = copy.deepcopy(model), statistics(model)
    for index in (0, 2):
        mixer, spec = turned.blocks[index].mixer, arch.blocks[index]
        weights = {name: _heads(getattr(mixer, name), kv) for name in ("k", "v")}
        for name, heads in _align(mixer, found[index], spec, weights, merged).items():
            layer, flat = getattr(mixer, name), heads.flatten(0, 1)
            layer.weight.copy_(flat[:, : layer.in_features])
            if layer.bias is not None:
                layer.bias.copy_(flat[:, -1])
        for name in ("v", "o") if spec.qk_norm else ("q", "k", "v", "o"):
            assert relative(getattr(mixer, name).weight, getattr(model.blocks[index].mixer, name).weight) > 0.05
    torch.testing.assert_close(turned(ids), model(ids), atol=5e-4, rtol=1e-4)


@pytest.mark.parametrize("arch, kv", [(PLAIN, 1), (BIASED, 2), (BIASED, 1), (WIDE, 2), (WIDE, 1)],
                         ids=["plain 1", "biased 2", "biased 1", "wide 2", "wide 1"])  # fmt: skip
@torch.no_grad()
def test_rotated_copies_merge_without_loss(arch, kv):
    model = toy(arch)
    make_copies(model, 0)
    stats, x = statistics(model)[0], model.embed_tokens(tokens(seed=71))
    wanted = model.blocks[0].update(x, model.rope_tables(0, 24)[8])
    errors = {}
    for method in ("aligned", "mean"):
        block = option(model, 0, fewer(model, 0, kv, method), stats)
        assert block.mixer.k.weight.shape == block.mixer.v.weight.shape == (8 * kv, 32)
        assert block.mixer.q.weight.shape == model.blocks[0].mixer.q.weight.shape
        errors[method] = relative(block.update(x, model.rope_tables(0, 24)[8]), wanted)
    assert errors["aligned"] < 1e-3
    assert errors["mean"] > 0.2


@torch.no_grad()
def test_aligned_heads_agree_better_than_unaligned_ones_on_any_model():
    for seed in range(4):
        model = toy(WIDE, seed)
        for index, found in statistics(model).items():
            if not isinstance(WIDE.blocks[index], Attention):
                continue
            for gram, fit in ((found.values, _any_rotation), (found.keys, _pair_rotation)):
                turns = procrustes(gram, 8, fit)
                cross = gram.unflatten(0, (4, 8)).unflatten(2, (4, 8)).transpose(1, 2)
                pairs = [(i, j) for i in range(4) for j in range(4) if i != j]
                before = sum(float(cross[i, j].trace()) for i, j in pairs)
                after = sum(float((turns[i].T @ cross[i, j] @ turns[j]).trace()) for i, j in pairs)
                assert after > before
                for turn in turns:
                    torch.testing.assert_close(turn.T @ turn, torch.eye(8), atol=1e-4, rtol=0)


def test_a_pair_rotation_is_the_best_of_all_angles():
    cross = torch.randn(6, 6, generator=torch.Generator().manual_seed(1))
    found = _pair_rotation(cross)
    assert torch.linalg.det(found) == pytest.approx(1.0, abs=1e-5)
    best = float((found.T @ cross).trace())
    for pair in range(3):
        for degrees in range(0, 360, 5):
            other, angle = found.clone(), torch.tensor(degrees * torch.pi / 180)
            other[pair, pair] = other[pair + 3, pair + 3] = angle.cos()
            other[pair + 3, pair], other[pair, pair + 3] = angle.sin(), -angle.sin()
            assert float((other.T @ cross).trace()) <= best + 1e-5


@torch.no_grad()
def test_keys_normalised_by_channel_are_not_rotated():
    model = toy(NORMED)
    stats = statistics(model)[0]
    aligned, mean = (option(model, 0, fewer(model, 0, 1, m), stats).mixer for m in ("aligned", "mean"))
    parent = model.blocks[0].mixer
    assert torch.equal(aligned.k.weight, mean.k.weight) and torch.equal(aligned.q.weight, parent.q.weight)
    assert not torch.allclose(aligned.v.weight, mean.v.weight, atol=0.01)
    for name in ("q_norm", "k_norm"):
        assert torch.equal(getattr(aligned, name).weight, getattr(parent, name).weight)


# Means, picks and slices of heads


@torch.no_grad()
def test_the_mean_is_of_neighbours_bias_and_all():
    model = toy(WIDE)
    parent, child = model.blocks[0].mixer, option(model, 0, fewer(model, 0, 2, "mean"), statistics(model)[0]).mixer
    for name in ("k", "v"):
        weight, bias = getattr(parent, name).weight.view(2, 2, 8, 32), getattr(parent, name).bias.view(2, 2, 8)
        torch.testing.assert_close(getattr(child, name).weight, weight.mean(1).flatten(0, 1))
        torch.testing.assert_close(getattr(child, name).bias, bias.mean(1).flatten())
    for name in ("q.weight", "q.bias", "o.weight"):
        assert torch.equal(child.get_parameter(name), parent.get_parameter(name))


def blank(mixer, heads, size):
    """The parent with some KV heads' part of the output projection at zero; `size` is that of a group of queries."""
    for head in heads:
        mixer.o.weight[:, head * size : (head + 1) * size] = 0


@pytest.mark.parametrize("arch", [BIASED, WIDE, NORMED], ids=["biased", "wide", "normed"])
@torch.no_grad()
def test_keep_and_drop_keep_the_heads_that_matter(arch):
    """Planted: one KV head in each pair speaks, the others whisper."""
    model, spec = toy(arch), arch.blocks[0]
    size, loud = spec.head_dim * spec.group, [1, 2] if spec.num_kv_heads == 4 else [1]
    quiet = [h for h in range(spec.num_kv_heads) if h not in loud]
    for head in quiet:
        model.blocks[0].mixer.o.weight[:, head * size : (head + 1) * size] *= 0.01
    parent, stats = model.blocks[0], statistics(model)[0]
    order = rank_kv_heads(stats.channels, parent.mixer.o.weight.T, spec.num_kv_heads)
    assert set(order[: len(loud)].tolist()) == set(loud)
    masked = copy.deepcopy(parent)
    blank(masked.mixer, quiet, size)
    x, rope = model.embed_tokens(tokens(seed=72)), model.rope_tables(0, 24)[8]
    wanted = masked.update(x, rope)

    kept = option(model, 0, fewer(model, 0, len(loud), "keep"), stats)
    assert kept.mixer.q.weight.shape == parent.mixer.q.weight.shape
    assert kept.mixer.k.weight.shape == (len(loud) * spec.head_dim, 32)
    torch.testing.assert_close(kept.update(x, rope), wanted, atol=1e-4, rtol=1e-4)

    alone = dataclasses.replace(stats, channels=stats.channels.diagonal().diag())  # nothing to refit
    dropped = option(model, 0, fewer(model, 0, len(loud), "drop"), alone)
    assert dropped.spec.num_heads == len(loud) * spec.group
    assert dropped.mixer.o.weight.shape == (32, len(loud) * size)
    torch.testing.assert_close(dropped.update(x, rope), wanted, atol=1e-4, rtol=1e-4)


@torch.no_grad()
def test_drop_refits_the_output_projection():
    for seed in range(3):
        model = toy(WIDE, seed)
        ids = tokens(8, seed=seed)
        stats, x = collect(model, [ids])[0], model.embed_tokens(ids)
        rope = model.rope_tables(0, 24)[8]
        wanted = model.blocks[0].update(x, rope)
        alone = dataclasses.replace(stats, channels=stats.channels.diagonal().diag())
        for kv in (1, 2, 3):
            spec = fewer(model, 0, kv, "drop")
            fitted, cut = (relative(option(model, 0, spec, s).update(x, rope), wanted) for s in (stats, alone))
            assert fitted < cut


# Linear layers, and everything at once


@pytest.mark.parametrize("arch", ALL.values(), ids=ALL)
@torch.no_grad()
def test_the_linear_layer_is_least_squares(arch):
    model, ids = toy(arch), tokens(8)
    found = collect(model, [ids])
    x = model.embed_tokens(ids)
    rope = model.rope_tables(0, 24)[8]
    for index in (0, 1):
        block, stats = model.blocks[index], found[index]
        spec = next(s for s in options_for(block.spec, LADDER) if s.method == "linear")
        child = option(model, index, spec, stats)
        last = block.mixer.o if index == 0 else block.mixer.down
        n = torch.nn.functional.rms_norm(x, (32,), block.norm.weight, block.eps).flatten(0, 1).double().numpy()
        y = block.update(x, rope).flatten(0, 1).double().numpy()
        bias = 0.0 if last.bias is None else last.bias.double().numpy()
        root = np.sqrt(RIDGE * np.square(n).sum(0).mean())
        system = np.vstack([n, root * np.eye(32)])
        expected = np.linalg.lstsq(system, np.vstack([y - bias, np.zeros((32, 32))]), rcond=None)[0]
        np.testing.assert_allclose(child.mixer.proj.weight, expected.T, atol=2e-3)
        assert spec.block == Linear(bias=last.bias is not None)
        if last.bias is not None:
            assert torch.equal(child.mixer.proj.bias, last.bias)
        fitted = child.update(x, rope).flatten(0, 1).double().numpy()
        np.testing.assert_allclose(fitted, n @ expected + bias, atol=1e-2)
        assert np.square(fitted - y).sum() < np.square(y).sum()  # better than nothing at all
        x = block(x, rope)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("arch", ALL.values(), ids=ALL)
@torch.no_grad()
def test_every_option_of_every_site_is_a_whole_float32_block(arch, dtype):
    model = toy(arch, dtype=dtype)
    found, x = statistics(model, 2), torch.randn(2, 24, 32, generator=torch.Generator().manual_seed(0))
    tables = tuple(t.float() for t in model.rope_tables(0, 24)[8])
    for index, specs in all_options(model).items():
        for spec in specs:
            if spec.block is None:
                continue
            block = option(model, index, spec, found[index])
            assert block.spec == spec.block
            assert all(p.dtype == torch.float32 and p.isfinite().all() for p in block.parameters())
            assert torch.equal(block.norm.weight, model.blocks[index].norm.weight.float())
            y = block.update(x, tables)
            assert y.isfinite().all() and y.shape == x.shape
            if spec.method == "parent" and dtype == torch.float32:
                assert torch.equal(y, model.blocks[index].update(x, tables))


def test_surgery_leaves_the_parent_alone():
    model, untouched = toy(WIDE), toy(WIDE)
    found = statistics(model, 2)
    for index, specs in all_options(model).items():
        for spec in specs:
            if spec.block is not None:
                option(model, index, spec, found[index])
    for a, b in zip(model.parameters(), untouched.parameters()):
        assert torch.equal(a, b)
