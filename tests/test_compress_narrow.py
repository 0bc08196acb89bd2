"""Narrower Mamba-2 blocks: a slice equals a mask, an order changes nothing, and the ranking finds what matters."""

import dataclasses

import pytest
import torch

from compress_toys import SMALL, relative, statistics, tokens, toy
from intarsia.arch import Architecture, FeedForward, Mamba2
from intarsia.base.errors import IntarsiaError
from intarsia.compress.narrow import Kept, rank_mamba, slice_mamba, state_power, x_power
from intarsia.compress.options import narrower, options_for
from intarsia.compress.recipe import Options
from intarsia.model import ResidualBlock
from intarsia.model.mamba import Mamba2Mixer
from intarsia.ops.norm import rms_norm
from intarsia.ops.ssd import ssd, time_steps

WIDE = Mamba2(8, 8, 16, num_groups=2)
CASES = {
    "heads": (WIDE, {"num_heads": 4}),
    "channels": (WIDE, {"head_dim": 4}),
    "states": (WIDE, {"state_size": 8}),
    "all": (WIDE, {"num_heads": 6, "head_dim": 6, "state_size": 12}),
    "biased": (dataclasses.replace(WIDE, proj_bias=True), {"num_heads": 4, "head_dim": 4, "state_size": 8}),
    "one norm": (dataclasses.replace(WIDE, norm_groups=1), {"num_heads": 4, "head_dim": 4}),
    "bare conv": (dataclasses.replace(WIDE, conv_bias=False), {"num_heads": 4}),
}


def hybrid(block: Mamba2, seed: int = 0):
    model = toy(Architecture(blocks=(block, FeedForward(48, "relu2", gated=False)), rope=None, **SMALL), seed)
    mixer = model.blocks[0].mixer
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():  # unequal heads, channels and states, so that there is something to find
        for part, size in ((slice(block.inner_size, 2 * block.inner_size), 1.0),
                           (slice(2 * block.inner_size, block.inner_size + block.conv_size), 0.7)):  # fmt: skip
            rows = mixer.in_proj.weight[part]
            rows.mul_((size * torch.randn(len(rows), 1, generator=generator)).exp())
    return model


def child_mixer(model, block: Mamba2) -> Mamba2Mixer:
    return ResidualBlock(block, model.arch, torch.float32).requires_grad_(False).mixer


def inputs(model) -> torch.Tensor:
    block = model.blocks[0]
    return rms_norm(model.embed_tokens(tokens(seed=77)), block.norm.weight, block.eps)


def masked(mixer: Mamba2Mixer, x: torch.Tensor, kept: Kept) -> torch.Tensor:
    """The parent with what leaves set to zero, and its norm over what is left, written out."""
    spec = mixer.spec
    gone = torch.ones(spec.num_groups * spec.state_size, dtype=torch.bool)
    gone[kept.shared(spec)] = False
    z, xbc, dt = mixer.in_proj(x).split([spec.inner_size, spec.conv_size, spec.num_heads], -1)
    xbc, _ = mixer.conv(xbc, None, None)
    both = torch.cat([torch.zeros(spec.inner_size, dtype=torch.bool), gone, gone])
    xbc = xbc.masked_fill(both, 0)
    width = spec.num_groups * spec.state_size
    v, b, c = xbc.split([spec.inner_size, width, width], -1)
    steps = time_steps(dt, mixer.dt_bias, spec.dt_min, spec.dt_max)
    heads = v.unflatten(-1, (spec.num_heads, -1))
    b, c = (t.unflatten(-1, (spec.num_groups, -1)) for t in (b, c))
    y, _ = ssd(heads, steps, -mixer.A_log.exp(), b, c, mixer.D, None, None, spec.chunk_size)
    inner = kept.inner(spec)
    gated = (y.flatten(-2) * torch.nn.functional.silu(z))[..., inner]
    parts = gated.unflatten(-1, (spec.groups_of_norm, -1))
    normed = (parts * (parts.square().mean(-1, keepdim=True) + mixer.eps).rsqrt()).flatten(-2)
    out = (normed * mixer.norm.weight[inner]) @ mixer.out_proj.weight[:, inner].T
    return out if mixer.out_proj.bias is None else out + mixer.out_proj.bias


@pytest.mark.parametrize("name", CASES)
def test_a_slice_equals_a_mask(name):
    block, cut = CASES[name]
    model = hybrid(block)
    mixer, x = model.blocks[0].mixer, inputs(model)
    child = child_mixer(model, dataclasses.replace(block, **cut))
    kept = rank_mamba(mixer, child.spec, statistics(model)[0])
    slice_mamba(mixer, child, kept)
    assert relative(child(x), masked(mixer, x, kept)) < 1e-5


def test_the_sorted_parent_equals_the_parent():
    model = hybrid(CASES["biased"][0])
    mixer, x = model.blocks[0].mixer, inputs(model)
    kept = rank_mamba(mixer, mixer.spec, statistics(model)[0])
    assert not torch.equal(kept.heads, torch.arange(8)) and not torch.equal(kept.channels, torch.arange(8))
    child = child_mixer(model, mixer.spec)
    slice_mamba(mixer, child, kept)
    assert relative(child(x), mixer(x)) < 1e-5
    slice_mamba(mixer, child, Kept.everything(mixer.spec))
    assert torch.equal(child(x), mixer(x))


def test_heads_leave_inside_their_group():
    model = hybrid(WIDE)
    kept = rank_mamba(model.blocks[0].mixer, dataclasses.replace(WIDE, num_heads=4), statistics(model)[0])
    assert [int((kept.heads // 4 == g).sum()) for g in range(2)] == [2, 2]
    assert kept.states.shape == (2, 16)


def test_moments_are_those_of_the_streams():
    model = hybrid(CASES["biased"][0])
    mixer, spec, found = model.blocks[0].mixer, CASES["biased"][0], statistics(model, 1)[0]
    block = model.blocks[0]
    n = rms_norm(model.embed_tokens(tokens(seed=0)), block.norm.weight, block.eps)
    x = mixer.in_proj(n)[..., spec.inner_size : 2 * spec.inner_size]
    assert relative(x_power(mixer, found).flatten(), x.square().sum((0, 1))) < 1e-4
    xbc, _ = mixer.conv(mixer.in_proj(n)[..., spec.inner_size : spec.inner_size + spec.conv_size], None, None)
    b, c = xbc[..., spec.inner_size :].chunk(2, -1)
    expected = b.square().sum((0, 1)) * c.square().sum((0, 1))
    assert relative(state_power(found, 2).flatten(), expected) < 1e-4
    assert relative(found.channels, _gram(mixer.channels(n))) < 1e-4


@pytest.mark.parametrize("name", ["all", "biased"])
@torch.no_grad()
def test_state_energy_is_that_of_the_recurrence_after_each_text(name):
    """Token by token in float64."""
    model = hybrid(CASES[name][0])
    mixer, spec, found = model.blocks[0].mixer, CASES[name][0], statistics(model, 2)[0]
    block, energy = model.blocks[0], torch.zeros(spec.num_groups, spec.state_size, dtype=torch.float64)
    for seed in range(2):
        n = rms_norm(model.embed_tokens(tokens(seed=seed)), block.norm.weight, block.eps)
        _, xbc, dt = mixer.in_proj(n).split([spec.inner_size, spec.conv_size, spec.num_heads], -1)
        x, b, _ = (t.double() for t in mixer._parts(mixer.conv(xbc, None, None)[0]))
        dt = time_steps(dt, mixer.dt_bias, spec.dt_min, spec.dt_max).double()
        state, b = 0, b.repeat_interleave(spec.num_heads // spec.num_groups, 2)
        for t in range(n.shape[1]):
            decay = (-mixer.A_log.double().exp() * dt[:, t]).exp()[..., None, None]
            state = decay * state + (dt[:, t, :, None] * x[:, t])[..., None] * b[:, t, :, None]
        energy += state.square().unflatten(1, (spec.num_groups, -1)).sum((0, 2, 3))
    assert relative(state_power(found, spec.num_groups, "energy"), energy) < 1e-4
    with pytest.raises(IntarsiaError, match="state measure 'size' is not known; known: balanced, energy"):
        state_power(found, spec.num_groups, "size")


def _gram(x: torch.Tensor) -> torch.Tensor:
    return x.flatten(0, 1).T @ x.flatten(0, 1)


@pytest.mark.parametrize("name, states", [
    ("heads", "balanced"), ("channels", "balanced"), ("states", "balanced"), ("states", "energy"),
])  # fmt: skip
def test_the_ranking_beats_the_original_and_the_reversed_order(name, states):
    block, cut = CASES[name]
    errors = torch.zeros(3)
    for seed in range(4):
        model = hybrid(block, seed)
        mixer, x, spec = model.blocks[0].mixer, inputs(model), dataclasses.replace(block, **cut)
        full = rank_mamba(mixer, block, statistics(model)[0], states)
        for n, order in enumerate((full, Kept.everything(block), backwards(full))):
            child = child_mixer(model, spec)
            slice_mamba(mixer, child, first(order, block, spec))
            errors[n] += relative(child(x), mixer(x))
    assert errors[0] < errors[1] and errors[0] < errors[2], errors


def first(order: Kept, parent: Mamba2, child: Mamba2) -> Kept:
    heads = order.heads.unflatten(0, (parent.num_groups, -1))[:, : child.num_heads // parent.num_groups].flatten()
    return Kept(heads, order.channels[: child.head_dim], order.states[:, : child.state_size])


def backwards(order: Kept) -> Kept:
    heads = order.heads.unflatten(0, (2, -1)).flip(1).flatten()
    return Kept(heads, order.channels.flip(0), order.states.flip(1))


def test_options_keep_the_constraints():
    big = Mamba2(128, 64, 128, num_groups=8)
    recipe = Options(mamba_heads=(0.75, 0.5, 0.3), mamba_channels=(0.5,), mamba_states=(0.5, 0.26))
    found = [spec for spec in options_for(big, recipe) if spec.method == "narrow"]
    assert len(found) == 4 * 2 * 3 - 1 and len({spec.name for spec in found}) == len(found)
    for spec in found:
        assert spec.block.num_heads % 8 == 0 and spec.block.in_size % 16 == 0 and spec.block.num_groups == 8
    assert "mamba2 32x64 n128" in {spec.name for spec in found}
    assert "mamba2 128x64 n32" in {spec.name for spec in found}


def test_what_cannot_be_cut_stays():
    alone = Mamba2(4, 16, 16, num_groups=4)  # a head a group
    assert narrower(alone, heads=0.5) == alone
    assert narrower(Mamba2(8, 16, 16, num_groups=2, norm_groups=8), heads=0.5).num_heads == 8
    assert narrower(Mamba2(6, 16, 16, num_groups=2, norm_groups=4), channels=0.5).head_dim == 16
    odd = Mamba2(12, 10, 20, num_groups=4)  # its own 332 rows are no multiple of 16: nothing is lost
    assert narrower(odd, heads=0.7).num_heads == 8
