"""Mamba and expert mixers against their definitions in float64; how they are drawn; what stays float32."""

import copy
import math

import pytest
import torch
import torch.nn.functional as F

from intarsia.arch import Architecture, Attention, Experts, FeedForward, Mamba1, Mamba2, catalog, parameters
from intarsia.model import Cache, Decoder, ExpertsMixer, initialise
from intarsia.model.mixers import make_mixer
from intarsia.ops.reference import conv_reference, gated_norm_reference, selective_reference, ssd_reference

MAMBA2 = Mamba2(6, 8, 16, num_groups=2, proj_bias=True, dt_min=0.01, dt_max=0.05)
MAMBA1 = Mamba1(40, state_size=8, time_step_rank=3, proj_bias=True)
ROUTED = {
    "plain": Experts(6, 2, 12),
    "groups": Experts(8, 3, 12, num_expert_groups=4, groups_per_token=2, routed_scale=2.5),
    "gated, shared": Experts(4, 2, 12, shared_size=20, activation="silu", gated=True, normalise=False),
}


def arch_of(*blocks, hidden_size=24):
    return Architecture(hidden_size=hidden_size, vocab_size=31, blocks=blocks, rope=None, family="intarsia")


def mixer_of(spec, seed=0):
    mixer = initialise(Decoder(arch_of(spec)), seed=seed, std=0.3).blocks[0].mixer
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in mixer.named_parameters():
            if name.endswith("bias") and not name.startswith(("dt_", "conv")):
                parameter.normal_(0, 0.2, generator=generator)  # what starts at zero is seen by no test
    return mixer


def draw(*shape, seed=1):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def doubles(mixer):
    return {name: p.detach().double() for name, p in mixer.named_parameters()}


def test_mamba2_is_what_the_paper_says():
    mixer, x, s = mixer_of(MAMBA2), draw(2, 21, 24), MAMBA2
    w = doubles(mixer)
    z, xbc, dt = F.linear(x.double(), w["in_proj.weight"], w["in_proj.bias"]).split([48, 112, 6], -1)
    xbc, _ = conv_reference(xbc, w["conv.weight"], w["conv.bias"])
    u, b, c = xbc.split([48, 32, 32], -1)
    dt = F.softplus(dt + w["dt_bias"]).clamp(s.dt_min, s.dt_max)
    y, _ = ssd_reference(
        u.unflatten(-1, (6, 8)), dt, -w["A_log"].exp(), b.unflatten(-1, (2, 16)), c.unflatten(-1, (2, 16)), w["D"]
    )
    y = gated_norm_reference(y.flatten(-2), z, w["norm.weight"], 2, 1e-5)
    wanted = F.linear(y, w["out_proj.weight"], w["out_proj.bias"])
    torch.testing.assert_close(mixer(x).double(), wanted, atol=1e-5, rtol=1e-5)


def test_mamba1_is_what_the_paper_says():
    mixer, x = mixer_of(MAMBA1), draw(2, 21, 24)
    w = doubles(mixer)
    u, z = F.linear(x.double(), w["in_proj.weight"], w["in_proj.bias"]).chunk(2, -1)
    u, _ = conv_reference(u, w["conv.weight"], w["conv.bias"])
    dt, b, c = F.linear(u, w["x_proj.weight"]).split([3, 8, 8], -1)
    dt = F.softplus(F.linear(dt, w["dt_proj.weight"], w["dt_proj.bias"]))
    y, _ = selective_reference(u, dt, -w["A_log"].exp(), b, c, w["D"])
    wanted = F.linear(y * F.silu(z), w["out_proj.weight"], w["out_proj.bias"])
    torch.testing.assert_close(mixer(x).double(), wanted, atol=1e-5, rtol=1e-5)


def routed_slowly(mixer, x):
    """One token after the other, straight from the description."""
    s, w = mixer.spec, doubles(mixer)
    out = torch.zeros_like(x, dtype=torch.float64)
    per_group = s.num_experts // s.num_expert_groups
    for place in [(i, j) for i in range(x.shape[0]) for j in range(x.shape[1])]:
        token = x[place].double()
        scores = (w["router.weight"] @ token).sigmoid()
        biased = (scores + w["router.bias"]).tolist()
        groups = [biased[g * per_group : (g + 1) * per_group] for g in range(s.num_expert_groups)]
        ranked = sorted(range(len(groups)), key=lambda g: -sum(sorted(groups[g])[-2:]))[: s.groups_per_token]
        allowed = [e for e in range(s.num_experts) if e // per_group in ranked]
        chosen = sorted(allowed, key=lambda e: -biased[e])[: s.experts_per_token]
        total = sum(float(scores[e]) for e in chosen) if s.normalise else 1.0
        for e in chosen:
            gate = w["experts.gate"][e] @ token if s.gated else None
            out[place] += s.routed_scale * float(scores[e]) / total * ffn(
                token, w["experts.up"][e], w["experts.down"][e], gate, s.activation
            )
        if s.shared_size:
            gate = w["shared.gate.weight"] @ token if s.gated else None
            out[place] += ffn(token, w["shared.up.weight"], w["shared.down.weight"], gate, s.activation)
    return out


def ffn(x, up, down, gate, activation):
    act = {"silu": F.silu, "relu2": lambda t: t.clamp(min=0) ** 2}[activation]
    return down @ (act(up @ x) if gate is None else act(gate) * (up @ x))


@pytest.mark.parametrize("spec", ROUTED.values(), ids=ROUTED)
def test_experts_are_chosen_and_weighted_as_described(spec):
    mixer, x = mixer_of(spec), draw(2, 9, 24)
    torch.testing.assert_close(mixer(x).double(), routed_slowly(mixer, x), atol=1e-5, rtol=1e-5)


def test_the_correction_bias_chooses_and_does_not_weigh():
    mixer, x = mixer_of(Experts(4, 4, 12)), draw(1, 5, 24)
    before = mixer(x)
    with torch.no_grad():
        mixer.router.bias += torch.tensor([9.0, -9.0, 3.0, 0.0])
    torch.testing.assert_close(mixer(x), before)  # all are chosen anyway


def test_gradients_reach_the_router_and_only_the_experts_in_use():
    mixer, x = mixer_of(Experts(6, 1, 12)), draw(1, 3, 24)
    mixer(x).square().sum().backward()
    used = mixer.experts.up.grad.abs().sum((1, 2)) > 0
    assert used.sum() == mixer.router(x[0])[1].unique().numel() < 6
    assert mixer.experts.down.grad.abs().sum((1, 2)).gt(0).equal(used)
    assert make_mixer(Experts(2, 2, 8), 24, 1e-5, torch.float32).router.bias.dtype == torch.float32
    free = mixer_of(Experts(6, 2, 12, normalise=False))
    free(x).square().sum().backward()
    assert free.router.weight.grad.any()


HYBRID = arch_of(
    MAMBA2, FeedForward(32, "relu2", False), Attention(2, 1, 12, rope=False), MAMBA1, Experts(4, 2, 8, shared_size=8)
)
FLOAT32 = ("A_log", "mixer.D", "dt_bias", "router.bias")


@pytest.mark.parametrize("how", ["made", "to", "bfloat16", "copied", "loaded"])
def test_what_must_stay_float32_does(how):
    model = initialise(Decoder(HYBRID, dtype=torch.bfloat16 if how == "made" else torch.float32))
    exact = {n: p.detach().clone() for n, p in model.named_parameters() if n.endswith(FLOAT32)}
    if how == "to":
        model = model.to(torch.bfloat16)
    elif how == "bfloat16":
        model = model.bfloat16()
    elif how == "copied":
        model = copy.deepcopy(model).to("cpu", torch.bfloat16)
    elif how == "loaded":
        source, model = model, Decoder(HYBRID, dtype=torch.bfloat16)
        model.load_state_dict(source.state_dict())
    assert len(exact) == 6
    for name, parameter in model.named_parameters():
        if name.endswith(FLOAT32):
            assert parameter.dtype == torch.float32 and torch.equal(parameter, exact[name]), name
        else:
            assert parameter.dtype == torch.bfloat16, name
    assert model(torch.randint(31, (1, 5))).dtype == torch.bfloat16


def test_gradients_survive_a_move():
    model = initialise(Decoder(HYBRID)).to(torch.bfloat16)
    model(torch.randint(31, (1, 5))).float().sum().backward()
    assert all(p.grad.dtype == p.dtype for p in model.parameters() if p.grad is not None)
    assert model.blocks[0].mixer.A_log.grad.any()


@pytest.mark.parametrize("seed", range(3))
@torch.no_grad()
def test_bfloat16_decodes_what_it_prefills(seed):
    """Of most tokens: where two experts are nearly as good, rounding may choose the other one."""
    torch.manual_seed(seed)
    model = initialise(Decoder(HYBRID, dtype=torch.bfloat16))
    ids, cache = torch.randint(31, (2, 40)), Cache(HYBRID, 2, 40, torch.bfloat16)
    assert cache.entries[0][0].dtype == torch.bfloat16 and cache.entries[0][1].dtype == torch.float32
    steps = torch.cat([model(part, cache) for part in ids.split(1, 1)], 1).float()
    whole = model(ids).float()
    assert ((steps - whole).norm(dim=-1) / whole.norm(dim=-1)).median() < 0.015


@pytest.mark.parametrize("blocks", [HYBRID.blocks, (MAMBA1,), (ROUTED["gated, shared"],)], ids=str)
def test_parameters_are_those_counted(blocks):
    arch = arch_of(*blocks)
    assert sum(p.numel() for p in Decoder(arch, device="meta").parameters()) == parameters(arch)


@pytest.mark.parametrize("name", ["nemotron-h-187m", "nemotron-h-56b", "nemotron-nano-2-9b", "llama-3.1-8b"])
def test_parameters_of_the_catalog_are_those_of_the_modules(name):
    arch = catalog.get(name)
    assert sum(p.numel() for p in Decoder(arch, device="meta").parameters()) == parameters(arch)


def test_fresh_weights_are_drawn_as_published():
    arch = arch_of(Mamba2(64, 8, 16, num_groups=2), FeedForward(256, "relu2", False), hidden_size=128)
    model = initialise(Decoder(arch))
    mixer, std = model.blocks[0].mixer, math.sqrt(0.8 / 128)
    for weight, wanted in [
        (model.embed.weight, std), (mixer.in_proj.weight, std), (mixer.out_proj.weight, std / math.sqrt(2)),
        (model.blocks[1].mixer.up.weight, std), (model.blocks[1].mixer.down.weight, std / math.sqrt(2)),
    ]:  # fmt: skip
        assert float(weight.detach().std()) == pytest.approx(wanted, rel=0.05)
    a = mixer.A_log.exp()
    assert a.min() >= 1 and a.max() <= 16 and float(a.detach().mean()) == pytest.approx(8.5, abs=2)
    steps = F.softplus(mixer.dt_bias)
    assert steps.min() >= 0.999e-3 and steps.max() <= 0.1001
    assert float(steps.detach().log().mean()) == pytest.approx(math.log(0.01), abs=0.5)  # log-uniform
    assert mixer.D.eq(1).all() and mixer.norm.weight.eq(1).all()
    assert 0.48 < mixer.conv.weight.abs().max() <= 0.5 and 0.4 < mixer.conv.bias.abs().max() <= 0.5
    assert float(mixer.conv.weight.detach().std()) == pytest.approx(0.5 / math.sqrt(3), rel=0.05)


def test_fresh_mamba1_weights_are_drawn_as_published():
    mixer = initialise(Decoder(arch_of(MAMBA1))).blocks[0].mixer
    torch.testing.assert_close(mixer.A_log.exp(), torch.arange(1.0, 9).expand(40, 8))
    steps = F.softplus(mixer.dt_proj.bias)
    assert steps.min() >= 0.999e-3 and steps.max() <= 0.1001
    assert mixer.dt_proj.weight.abs().max() <= 3**-0.5
    for matrix, inputs in ((mixer.in_proj, 24), (mixer.x_proj, 40), (mixer.out_proj, 40)):
        assert float(matrix.weight.detach().std()) == pytest.approx((3 * inputs) ** -0.5, rel=0.1)


def test_a_transformer_is_drawn_as_ever_and_a_given_std_is_kept():
    plain = initialise(Decoder(Architecture.transformer(2, Attention(4, 2, 8), FeedForward(64), hidden_size=64,
                                                        vocab_size=500)))  # fmt: skip
    for weight in (plain.embed.weight, plain.blocks[1].mixer.down.weight):
        assert float(weight.detach().std()) == pytest.approx(0.02, rel=0.05)
    mixer = initialise(Decoder(arch_of(MAMBA2, hidden_size=96)), std=0.3).blocks[0].mixer
    assert float(mixer.in_proj.weight.detach().std()) == pytest.approx(0.3, rel=0.05)
    assert float(mixer.out_proj.weight.detach().std()) == pytest.approx(0.3, rel=0.05)
    assert mixer.A_log.min() >= 0


def test_draws_depend_on_names_and_not_on_the_rest():
    long = initialise(Decoder(HYBRID), seed=3, std=0.1)
    short = dict(initialise(Decoder(arch_of(*HYBRID.blocks[:1])), seed=3, std=0.1).named_parameters())
    for name, parameter in long.named_parameters():
        if name.startswith("blocks.0."):
            assert torch.equal(parameter, short[name]), name
    other = initialise(Decoder(HYBRID), seed=4, std=0.1)
    assert not torch.equal(long.blocks[0].mixer.A_log, other.blocks[0].mixer.A_log)


def test_an_unknown_activation_is_a_sentence():
    with pytest.raises(Exception, match="activation 'swish' is not known"):
        ExpertsMixer(Experts(2, 1, 8, activation="swish"), 24, torch.float32)
