"""Rankings of channels and heads: gates of surgery, brute force on tiny cases, least squares against numpy."""

import copy
import dataclasses
import itertools

import numpy as np
import pytest
import torch

from compress_toys import ALL, NORMED, PLAIN, relative, statistics, tokens, toy
from intarsia.arch import FeedForward
from intarsia.base.errors import IntarsiaError
from intarsia.compress.importance import METHODS, RIDGE, rank_channels, rank_kv_heads, refit_rows, ridge, ridge_inverse
from intarsia.compress.options import OptionSpec
from intarsia.compress.statistics import collect
from intarsia.compress.surgery import make_option


def sample(channels=6, width=4, count=200, seed=0):
    """Correlated channel activations (N, C) and rows (C, D), float64 numpy."""
    rng = np.random.default_rng(seed)
    mix = rng.normal(size=(channels, channels)) * rng.lognormal(size=channels)
    return rng.normal(size=(count, channels)) @ mix, rng.normal(size=(channels, width))


def float32(array):
    return torch.tensor(array, dtype=torch.float32)


def narrow(model, index, width, order, stats):
    block = dataclasses.replace(model.blocks[index].spec, intermediate_size=width)
    return make_option(model.blocks[index], OptionSpec(f"ffn {width}", block, "prefix"), model.arch, stats, order)


def inputs_of(model, index, ids):
    """The stream that a block reads."""
    with torch.no_grad():
        return model.run(model.embed_tokens(ids), 0, index)


FFNS = [i for i, b in enumerate(PLAIN.blocks) if isinstance(b, FeedForward)]


# Gates of surgery


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("arch", ALL.values(), ids=ALL)
@torch.no_grad()
def test_the_sorted_parent_is_the_parent(arch, method):
    model, ids = toy(arch), tokens(seed=50)
    stats, turned = statistics(model), copy.deepcopy(model)
    for index in FFNS:
        parent = model.blocks[index]
        order = rank_channels(stats[index].channels, parent.mixer.down.weight.T, method, step=5)
        assert sorted(order.tolist()) == list(range(parent.spec.intermediate_size))
        assert order.tolist() != sorted(order.tolist())
        turned.blocks[index] = narrow(model, index, parent.spec.intermediate_size, order, stats[index])
        assert not torch.equal(turned.blocks[index].mixer.up.weight, parent.mixer.up.weight)
    torch.testing.assert_close(turned(ids), model(ids), atol=2e-4, rtol=1e-4)


@pytest.mark.parametrize("arch", ALL.values(), ids=ALL)
@torch.no_grad()
def test_a_masked_block_is_the_physical_slice(arch):
    """With channels that know nothing of each other the refit has nothing to do: what stays is the plain slice."""
    model = toy(arch)
    index, width = 1, 12
    parent, stats = model.blocks[index], statistics(model)[index]
    order = rank_channels(stats.channels, parent.mixer.down.weight.T, "independent")
    plain = dataclasses.replace(stats, channels=torch.eye(len(order)))
    child = narrow(model, index, width, order, plain)
    masked = copy.deepcopy(parent)
    masked.mixer.down.weight[:, order[width:]] = 0
    x = inputs_of(model, index, tokens(seed=51))
    torch.testing.assert_close(child(x), masked(x), atol=1e-4, rtol=1e-4)
    assert relative(child(x), parent(x)) > 1e-3  # the slice did cut something
    assert child.mixer.up.weight.shape == (width, 32) and child.mixer.down.weight.shape == (32, width)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("arch", [PLAIN, NORMED], ids=["plain", "normed"])
@torch.no_grad()
def test_a_ranking_beats_the_original_and_the_reversed_order(arch, method):
    """On other text than it was made from, with and without the refit."""
    model = toy(arch)
    stats = statistics(model, 16)
    for index, share in itertools.product(FFNS, (0.75, 0.5, 0.25)):
        parent = model.blocks[index]
        width = int(parent.spec.intermediate_size * share)
        order = rank_channels(stats[index].channels, parent.mixer.down.weight.T, method, step=4)
        x = inputs_of(model, index, tokens(8, seed=60))
        wanted = parent.update(x)
        plain = dataclasses.replace(stats[index], channels=torch.eye(len(order)))
        for moments in (stats[index], plain):
            errors = [
                float((narrow(model, index, width, o, moments).update(x) - wanted).square().mean())
                for o in (order, torch.arange(len(order)), order.flip(0))
            ]
            if moments is plain and method == "refit":  # it ranks for blocks that are refitted
                assert errors[0] < errors[2]
            else:
                assert errors[0] < min(errors[1:]), (index, share, errors)


# Brute force


def masked_error(c, rows, gone):
    return float(np.square(c[:, gone] @ rows[gone]).sum())


@pytest.mark.parametrize("seed", range(5))
def test_independent_is_the_error_of_each_channel_alone(seed):
    c, rows = sample(seed=seed)
    errors = [masked_error(c, rows, [i]) for i in range(len(rows))]
    order = rank_channels(float32(c.T @ c), float32(rows), "independent")
    assert order.tolist() == sorted(range(len(rows)), key=lambda i: -errors[i])


@pytest.mark.parametrize("seed", range(5))
def test_iterative_is_greedy_removal_by_trying_every_channel(seed):
    c, rows = sample(seed=seed)
    gone, left = [], list(range(len(rows)))
    while left:
        best = min(left, key=lambda i: masked_error(c, rows, [*gone, i]))
        gone.append(best)
        left.remove(best)
    order = rank_channels(float32(c.T @ c), float32(rows), "iterative", step=1)
    assert order.tolist() == gone[::-1]


def regular_features(c):
    """Features whose Gram matrix is that of c with the ridge: the numbers that `refit` sees."""
    gram = c.T @ c
    gram += RIDGE * gram.diagonal().mean() * np.eye(len(gram))
    return np.linalg.cholesky(gram).T


def refitted_error(features, rows, keep):
    """The least error of any rows for the kept channels."""
    wanted = features @ rows
    found = np.linalg.lstsq(features[:, keep], wanted, rcond=None)[0] if keep else np.zeros((0, rows.shape[1]))
    return float(np.square(wanted - features[:, keep] @ found).sum())


@pytest.mark.parametrize("seed", range(5))
def test_refit_is_greedy_removal_with_a_fresh_fit_at_every_try(seed):
    c, rows = sample(seed=seed)
    features, gone, left = regular_features(c), [], list(range(len(rows)))
    while left:
        best = min(left, key=lambda i: refitted_error(features, rows, [j for j in left if j != i]))
        gone.append(best)
        left.remove(best)
    order = rank_channels(float32(c.T @ c), float32(rows), "refit", step=1)
    assert order.tolist() == gone[::-1]


def test_the_methods_differ_where_they_should():
    """Two equal channels: `refit` knows that one of them is worthless, `iterative` and `independent` do not. Two that
    cancel: `iterative` knows that both may go."""
    rng = np.random.default_rng(0)
    c = rng.normal(size=(500, 4)) * [3.0, 0.0, 1.0, 0.8]
    c[:, 1] = c[:, 0]
    rows = np.tile(rng.normal(size=(1, 5)), (4, 1))
    gram = float32(c.T @ c)
    assert set(rank_channels(gram, float32(rows), "independent")[:2].tolist()) == {0, 1}
    assert rank_channels(gram, float32(rows), "refit", 1)[-1].item() in (0, 1)
    rows[1] = -1.05 * rows[0]
    rows[3] = -rows[0]
    assert rank_channels(gram, float32(rows), "independent")[-1] == 3
    order = rank_channels(gram, float32(rows), "iterative", 1).tolist()
    errors = {k: masked_error(c, rows, order[k:]) for k in range(1, 4)}
    assert order[2:] == [2, 3] and errors[1] > errors[2] > errors[3]


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("step", [1, 2, 4, 32])
def test_every_channel_leaves_once_whatever_the_step(method, step):
    c, rows = sample(channels=7)
    order = rank_channels(float32(c.T @ c), float32(rows), method, step)
    assert sorted(order.tolist()) == list(range(7)) and order.dtype == torch.int64


def test_a_channel_that_never_fires_ranks_last():
    c, rows = sample()
    c[:, 2] = 0
    for method in METHODS:
        order = rank_channels(float32(c.T @ c), float32(rows), method, step=2)
        assert 2 in order[-2:].tolist()
        assert rank_channels(float32(c.T @ c), float32(rows), method, step=1)[-1] == 2


def test_an_unknown_method_is_a_sentence():
    with pytest.raises(IntarsiaError, match="'magnitude' is not known; known: independent, iterative, refit"):
        rank_channels(torch.eye(2), torch.eye(2), "magnitude")


# Heads


@torch.no_grad()
def test_kv_heads_rank_by_what_leaving_them_out_changes():
    for seed in range(4):
        model = toy(ALL["biased"], seed)
        ids, parent = tokens(8, seed=5), model.blocks[0]
        stats = collect(model, [ids])[0]
        x, rope = model.embed_tokens(ids), model.rope_tables(0, 24)[8]
        errors, size = [], 8
        for head in range(4):
            masked = copy.deepcopy(parent)
            masked.mixer.o.weight[:, head * size : (head + 1) * size] = 0
            errors.append(float((masked.update(x, rope) - parent.update(x, rope)).square().sum()))
        order = rank_kv_heads(stats.channels, parent.mixer.o.weight.T, 4)
        assert order.tolist() == sorted(range(4), key=lambda h: -errors[h])


@torch.no_grad()
def test_the_queries_of_a_kv_head_count_together():
    """Two query heads that cancel are worth nothing to their KV head, however loud each is."""
    gram = torch.ones(4, 4)
    rows = torch.tensor([[5.0], [-5.0], [1.0], [1.0]])
    assert rank_kv_heads(gram, rows, 2).tolist() == [1, 0]
    assert rank_kv_heads(gram, rows, 4).tolist()[:2] == [0, 1]


# Least squares


@pytest.mark.parametrize("keep", [[0, 1, 2], [5, 3, 1, 0], [4], list(range(6))], ids=str)
@pytest.mark.parametrize("count", [4, 200])
def test_refitted_rows_are_least_squares(keep, count):
    """min |c W - c_keep W'|^2 + ridge |W' - W_keep|^2 by numpy, in float64; fewer tokens than channels as well."""
    c, rows = sample(count=count)
    root = np.sqrt(RIDGE * np.square(c).sum(0).mean())
    system = np.vstack([c[:, keep], root * np.eye(len(keep))])
    wanted = np.vstack([c @ rows, root * rows[keep]])
    expected = np.linalg.lstsq(system, wanted, rcond=None)[0]
    found = refit_rows(float32(c.T @ c), float32(rows), torch.tensor(keep))
    np.testing.assert_allclose(found, expected, atol=2e-3, rtol=2e-3)
    before = np.square(c @ rows - c[:, keep] @ rows[keep]).sum()
    after = np.square(c @ rows - c[:, keep] @ found.double().numpy()).sum()
    assert after <= before + 1e-9 * np.square(c @ rows).sum()
    if 1 < len(keep) < 6:
        assert after < 0.95 * before  # channels are correlated: there is something to win


@torch.no_grad()
def test_the_refit_is_never_worse_than_truncation_on_its_own_text():
    model = toy(PLAIN)
    ids = tokens(8)
    stats = collect(model, [ids])
    for index in FFNS:
        parent, x = model.blocks[index], inputs_of(model, index, ids)
        wanted = parent.update(x)
        for seed, width in itertools.product(range(3), (4, 20, 44)):
            order = torch.randperm(48, generator=torch.Generator().manual_seed(seed))
            fitted = narrow(model, index, width, order, stats[index])
            cut = narrow(model, index, width, order, dataclasses.replace(stats[index], channels=torch.eye(48)))
            error, truncated = (float((b.update(x) - wanted).square().sum()) for b in (fitted, cut))
            assert error < truncated


def test_ridge_and_its_inverse():
    c, _ = sample()
    gram = float32(c.T @ c)
    expected = gram.double() + RIDGE * gram.double().diagonal().mean() * torch.eye(6)
    torch.testing.assert_close(ridge(gram).double(), expected, rtol=1e-5, atol=1e-4)
    torch.testing.assert_close((ridge_inverse(gram) @ ridge(gram)).double(), torch.eye(6).double(), atol=1e-3, rtol=0)
    assert ridge_inverse(torch.zeros(3, 3)).isfinite().all()  # text that never reached the block
