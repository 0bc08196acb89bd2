"""A Mamba-2 block from attention: what is copied, what is new, what training makes of it."""

import dataclasses

import pytest
import torch
import torch.nn.functional as F

from compress_toys import ALL, BIASED, LADDER, NORMED, PLAIN, relative, statistics, tokens, toy
from intarsia.arch import Attention, Mamba2
from intarsia.compress.hybrid import DECAYS, SIZES, TIME_STEPS
from intarsia.compress.library import Builder, Library, stream
from intarsia.compress.options import options_for
from intarsia.compress.recipe import Library as Recipe
from intarsia.compress.surgery import make_option
from intarsia.compress.trainees import Own, import_option
from intarsia.model import Cache, ResidualBlock
from intarsia.ops.norm import rms_norm

MAMBA = LADDER.model_copy(update={
    "mamba": True, "kv_methods": ("drop",), "linear": False, "mamba_heads": (), "mamba_states": (),
})  # fmt: skip
HELDOUT = tokens(8, seed=900)


def converted(model, index=0, stats=None):
    spec = next(s for s in options_for(model.blocks[index].spec, MAMBA) if s.method == "mamba")
    stats = stats or statistics(model)[index]
    return make_option(model.blocks[index], spec, model.arch, stats)


def inputs(model, index=0):
    """What the mixer of a block reads, (B, L, D), and its update, on held-out text."""
    return next((n, update) for i, _, n, update, _ in stream(model, HELDOUT) if i == index)


def test_the_option_has_the_widths_of_the_attention():
    found = {s.name: s for s in options_for(Attention(9, 3, 64), MAMBA)}
    assert found["mamba2 9x64 n64"].block == Mamba2(9, 64, 64, 9) and found["mamba2 9x64 n64"].method == "mamba"
    biased = next(s.block for s in options_for(BIASED.blocks[0], MAMBA) if s.method == "mamba")
    assert biased.proj_bias and not any(s.method == "mamba" for s in options_for(PLAIN.blocks[1], MAMBA))
    assert not any(s.method == "mamba" for s in options_for(PLAIN.blocks[0], LADDER))  # asked for, or not there
    assert [s.name for s in options_for(Mamba2(4, 8, 8), MAMBA)] == ["parent", "none"]


@pytest.mark.parametrize("arch", [PLAIN, BIASED], ids=["plain", "biased"])
@torch.no_grad()
def test_projections_are_the_attentions_own(arch):
    model = toy(arch)
    old, new = model.blocks[0].mixer, converted(model).mixer
    n, _ = inputs(model)
    _, xbc, dt = new.in_proj(n).split([32, 96, 4], -1)
    group = old.spec.group
    for part, layer, repeat in zip(xbc.split(32, -1), (old.v, old.k, old.q), (group, group, 1)):
        heads = layer(n).unflatten(-1, (-1, 8)).repeat_interleave(repeat, -2)
        torch.testing.assert_close(part.unflatten(-1, (-1, 8)), heads)
    assert torch.equal(new.out_proj.weight, old.o.weight) and not dt.any()
    assert (new.out_proj.bias is None) if old.o.bias is None else torch.equal(new.out_proj.bias, old.o.bias)


@torch.no_grad()
def test_normed_queries_and_keys_have_the_size_that_their_norm_gave():
    model = toy(NORMED)
    old, new = model.blocks[0].mixer, converted(model).mixer
    n, _ = inputs(model)
    _, _, b, c, _ = new.in_proj(n).split([32, 32, 32, 32, 4], -1)
    for part, layer, norm, repeat in ((b, old.k, old.k_norm, 2), (c, old.q, old.q_norm, 1)):
        wanted = rms_norm(layer(n).unflatten(-1, (-1, 8)), norm.weight, 1e-5).repeat_interleave(repeat, -2)
        sizes = [t.square().mean((0, 1, 3)).sqrt() for t in (part.unflatten(-1, (-1, 8)), wanted)]
        torch.testing.assert_close(*sizes, rtol=0.15, atol=0)
        cosine = F.cosine_similarity(part.unflatten(-1, (-1, 8)), wanted, dim=-1)
        assert cosine.min() > 0.999  # the direction of every head is that of its norm's output


@torch.no_grad()
def test_the_block_is_linear_attention_that_forgets():
    """Against attention's own weights with sums in place of a softmax, token by token in float64."""
    model = toy(PLAIN)
    old, new = model.blocks[0].mixer, converted(model).mixer
    n, _ = inputs(model)
    wide, taps = n.double(), new.conv.weight[::32, -1].double()
    v, k, q = (F.silu(tap * (wide @ layer.weight.double().T)).unflatten(-1, (-1, 8))
               for tap, layer in zip(taps, (old.v, old.k, old.q)))  # fmt: skip
    k, v = k.repeat_interleave(2, -2), v.repeat_interleave(2, -2)
    part = (torch.arange(4, dtype=torch.float64) + 0.5) / 4
    steps = TIME_STEPS[0] * (TIME_STEPS[1] / TIME_STEPS[0]) ** part
    decay = (-steps * (DECAYS[0] + (DECAYS[1] - DECAYS[0]) * part)).exp()
    rows = []
    for t in range(n.shape[1]):
        y = v[:, t].clone()
        for s in range(t + 1):
            weight = (q[:, t] * k[:, s]).sum(-1) * steps * decay ** (t - s)
            y += weight[..., None] * v[:, s]
        rows.append(y)
    y = torch.stack(rows, 1) * F.silu(wide @ new.in_proj.weight[:32].double().T).unflatten(-1, (-1, 8))
    y = y / (y.square().mean(-1, keepdim=True) + 1e-5).sqrt()
    assert relative(new(n), y.flatten(2) @ old.o.weight.double().T) < 1e-5


@pytest.mark.parametrize("arch", ALL.values(), ids=ALL)
@torch.no_grad()
def test_what_goes_into_the_silu_has_the_sizes_that_are_meant(arch):
    model = toy(arch)
    new, (n, _) = converted(model).mixer, inputs(model)
    assert not new.conv.weight[:, :-1].any() and not new.conv.bias.any()
    seen = new.in_proj(n)[..., 32:128] * new.conv.weight[:, -1]
    sizes = seen.unflatten(-1, (3, 32)).square().mean((0, 1, 3)).sqrt()
    torch.testing.assert_close(sizes, torch.tensor(SIZES), rtol=0.1, atol=0)


@torch.no_grad()
def test_the_gate_is_open_where_the_input_has_a_mean():
    """Least squares to 1: exact where a direction of the input is constant."""
    model = toy(PLAIN)
    stats = statistics(model)[0]
    n = torch.randn(4000, 32, generator=torch.Generator().manual_seed(0))
    n[:, 3] = 2.0
    shifted = dataclasses.replace(stats, inputs=n.T @ n, total=n.sum(0), tokens=len(n))
    z = n @ converted(model, stats=shifted).mixer.in_proj.weight[:32].T
    assert (z - 2).abs().max() < 0.05


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@torch.no_grad()
def test_what_is_stored_is_what_was_trained(dtype):
    model = toy(PLAIN, dtype=dtype)
    spec = next(s for s in options_for(PLAIN.blocks[0], MAMBA) if s.method == "mamba")
    trainee = Own([spec], [converted(model)], dtype)
    n, _ = inputs(model)
    stored = trainee.export()
    assert {t.dtype for name, t in stored.items() if name.endswith(("A_log", "/D", "dt_bias"))} == {torch.float32}
    assert stored[f"{spec.name}/in_proj.weight"].dtype == dtype
    block = ResidualBlock(spec.block, model.arch, dtype)
    import_option(stored, spec, block)
    assert torch.equal(block.mixer(n), next(iter(trainee.outputs(n, None)))[1])
    inner, weight = trainee.inner(n, None)[0], block.mixer.out_proj.weight
    assert relative(inner @ weight.T, block.mixer(n)) < (1e-6 if dtype == torch.float32 else 0.01)


def builder(model, folder, steps, batch=96):
    options = {i: options_for(b, MAMBA) for i, b in enumerate(model.arch.blocks)}
    recipe = Recipe(tokens=batch * steps, batch_tokens=batch, lr=3e-3)
    return Builder(model, options, statistics(model, 4), recipe, "refit", folder)


def batches(step):
    return tokens(4, 24, seed=step)


def nothing(*_):
    pass


@pytest.mark.parametrize("arch", ALL.values(), ids=ALL)
def test_training_helps_and_the_fit_after_it_too(tmp_path, arch):
    model = toy(arch)
    made = builder(model, tmp_path, 24)
    name = next(s.name for s in options_for(arch.blocks[0], MAMBA) if s.method == "mamba")
    start = made.losses(HELDOUT)
    made.train(batches, nothing, nothing)
    trained = made.losses(HELDOUT)
    after = made.fit((tokens(seed=500 + n) for n in range(24)), HELDOUT, nothing)
    for index in (0, 2):
        assert after[index][name] <= trained[index][name] < start[index][name]
        assert after[index][name] < 0.9
    made.store(start, after)
    block = Library.open(tmp_path, model).block(2, next(s for s in made.options[2] if s.name == name))
    n, update = inputs(model, 2)
    loss = float((block.mixer(n) - update).square().sum() / update.square().sum())
    assert loss == pytest.approx(after[2][name], rel=1e-4)


def test_the_first_fit_leaves_other_options_alone(tmp_path):
    model = toy(PLAIN)
    made, same = builder(model, tmp_path, 1), builder(model, tmp_path, 1)
    made._fit_mamba(batches)
    for mine, theirs in zip(made.trainees[0].mixers, same.trainees[0].mixers):
        for (name, a), b in zip(mine.state_dict().items(), theirs.state_dict().values()):
            assert torch.equal(a, b) == (not name.startswith("out_proj.weight")), name
    working, masters = made.optimizer.working, made.optimizer.masters
    assert all(torch.equal(masters[name], p.float()) for name, p in working.items())


class Killed(Exception):
    pass


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def test_an_interrupted_training_ends_in_the_same_bits(tmp_path, dtype):
    model, state = toy(PLAIN, dtype=dtype), tmp_path / "state.safetensors"
    straight = builder(model, tmp_path, 6)
    straight.train(batches, nothing, nothing)
    cut = builder(model, tmp_path, 6)

    def save():
        if cut.optimizer.steps == 3:
            cut.optimizer.save(state)
        if cut.optimizer.steps == 5:
            raise Killed

    with pytest.raises(Killed):
        cut.train(batches, save, nothing)
    last = builder(model, tmp_path, 6)
    last.optimizer.load(state)
    last.train(batches, nothing, nothing)
    for index in (0, 2):
        other = last.trainees[index].export()
        assert all(torch.equal(t, other[name]) for name, t in straight.trainees[index].export().items())


@torch.no_grad()
def test_a_converted_block_decodes_as_it_reads():
    model = toy(PLAIN)
    block = converted(model)
    arch = model.arch.replace(blocks=(block.spec,))
    x = torch.randn(2, 12, 32, generator=torch.Generator().manual_seed(0))
    cache, steps = Cache(arch, 2, 12, torch.float32), []
    for t in range(12):
        steps.append(block(x[:, t : t + 1], None, cache, 0))
        cache.advance(1, None)
    torch.testing.assert_close(torch.cat(steps, 1), block(x), atol=1e-4, rtol=1e-4)
