"""nemotron_h and nemotron_h_puzzle: the published shape, logits of transformers, sentences for what cannot be."""

import dataclasses
import json
import math

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, NemotronHConfig
from transformers.models.nemotron_h.modeling_nemotron_h import NemotronHMamba2Mixer

from intarsia import formats
from intarsia.arch import Architecture, Attention, Experts, FeedForward, Mamba2
from intarsia.base.errors import IntarsiaError
from intarsia.formats import nemotron_h, nemotron_h_puzzle
from intarsia.model import Decoder, initialise

SMALL = {
    "vocab_size": 97, "hidden_size": 32, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16,
    "intermediate_size": 44, "mamba_num_heads": 6, "mamba_head_dim": 8, "ssm_state_size": 12, "n_groups": 2,
    "conv_kernel": 4, "chunk_size": 16, "max_position_embeddings": 256, "n_routed_experts": 8,
    "num_experts_per_tok": 3, "moe_intermediate_size": 20, "moe_shared_expert_intermediate_size": 28,
    "routed_scaling_factor": 2.5, "n_group": 4, "topk_group": 2,
}
CASES = {
    "M-M*-": {},
    "ME*E-": {},
    "M": {"n_groups": 1, "use_conv_bias": False, "use_bias": True},
    "*-M": {"mlp_bias": True, "mlp_hidden_act": "silu", "num_key_value_heads": 1},
    "MEM-": {"norm_topk_prob": False, "n_group": 1, "topk_group": 1, "conv_kernel": 3},
}


@pytest.fixture(autouse=True)
def time_steps_without_a_floor(monkeypatch):
    """transformers 5.14 to 5.23 hold every time step above `time_step_min` (0.001), a field of the initialisation,
    whatever `time_step_limit` says (transformers #48989). The config is right; the model is patched to follow it."""
    original = NemotronHMamba2Mixer.__init__

    def patched(self, config, *args, **options):
        original(self, config, *args, **options)
        self.time_step_limit = tuple(config.time_step_limit)

    monkeypatch.setattr(NemotronHMamba2Mixer, "__init__", patched)


def stock_model(pattern, fields):
    torch.manual_seed(0)
    config = NemotronHConfig(hybrid_override_pattern=pattern, **{**SMALL, **fields})
    model = AutoModelForCausalLM.from_config(config).eval()
    with torch.no_grad():
        for name, parameter in [*model.named_parameters(), *model.named_buffers()]:
            parameter.add_(torch.randn_like(parameter) * (2 if "dt_bias" in name else 0.2))
    return model


def logits(model, ids):
    """Without transformers' cache, which 5.14 cannot make for a pattern with `-` and 5.23 for one without `*`."""
    return model(ids) if isinstance(model, Decoder) else model(ids, use_cache=False).logits


@torch.no_grad()
def difference(one, other, length=40):
    ids = torch.randint(0, SMALL["vocab_size"], (2, length), generator=torch.Generator().manual_seed(1))
    a, b = (logits(model, ids) for model in (one, other))
    assert a.abs().max() > 0.5
    return float((a - b).abs().max())


@pytest.mark.parametrize("pattern", CASES)
def test_logits_equal_transformers_there_and_back(pattern, tmp_path):
    stock = stock_model(pattern, CASES[pattern])
    stock.save_pretrained(tmp_path / "stock")
    ours, _ = formats.load(tmp_path / "stock")
    assert ours.arch.family == "nemotron_h"
    assert difference(ours, stock) < 1e-4
    formats.save(ours, tmp_path / "ours", source=tmp_path / "stock")
    back = AutoModelForCausalLM.from_pretrained(tmp_path / "ours")
    assert type(back) is type(stock)
    assert difference(ours, back) < 1e-4
    again, _ = formats.load(tmp_path / "ours")
    assert again.arch == ours.arch


def gradient(model, ids):
    """Of the next tokens' mean -log p: every parameter's, float64."""
    loss = torch.nn.functional.cross_entropy(logits(model, ids[:, :-1]).flatten(0, 1).float(), ids[:, 1:].flatten())
    loss.backward()
    return {name: p.grad.double() for name, p in model.named_parameters()}


def apart(found, wanted):
    square = sum((found[name] - wanted[name]).square().sum() for name in wanted)
    return float((square / sum(g.square().sum() for g in wanted.values())).sqrt())


@pytest.mark.parametrize("std", [None, 0.2])
def test_a_gradient_in_bfloat16_is_as_near_to_float32s_as_transformers_own(std, tmp_path):
    """Random blocks one on the other enlarge what rounding does: in float32, rounding the weights alone moves the
    gradient almost as far. No op can mend that: who computes in bfloat16 is to be as far off as others are."""
    blocks = (Mamba2(8, 16, 32, 2), FeedForward(96, activation="relu2", gated=False), Mamba2(8, 16, 32, 2)) * 4
    arch = Architecture(64, 97, blocks, rope=None, max_positions=256, family="nemotron_h")
    formats.save(initialise(Decoder(arch), seed=1, std=std), tmp_path)
    ids = torch.randint(0, 97, (2, 65), generator=torch.Generator().manual_seed(3))
    ours, theirs = (
        apart(gradient(read(tmp_path, dtype=torch.bfloat16), ids), gradient(read(tmp_path, dtype=torch.float32), ids))
        for read in (lambda *a, **k: formats.load(*a, **k)[0], AutoModelForCausalLM.from_pretrained)
    )
    assert ours < 1.2 * theirs < 0.2


def test_the_floor_that_is_patched_away_is_there(monkeypatch, tmp_path):
    """The patch is needed: without it the same file gives other logits. When this fails, transformers is repaired."""
    stock = stock_model("M-M*-", {"time_step_min": 0.05})
    stock.save_pretrained(tmp_path / "stock")
    ours, _ = formats.load(tmp_path / "stock")
    assert difference(ours, stock) < 1e-4
    monkeypatch.undo()
    assert difference(ours, AutoModelForCausalLM.from_pretrained(tmp_path / "stock")) > 1e-3


def test_time_step_limit_is_read_and_written(tmp_path):
    stock = stock_model("M-M-", {"time_step_limit": (0.02, 0.7)})
    stock.save_pretrained(tmp_path / "stock")
    ours, _ = formats.load(tmp_path / "stock")
    assert (ours.arch.blocks[0].dt_min, ours.arch.blocks[0].dt_max) == (0.02, 0.7)
    assert difference(ours, stock) < 1e-4
    formats.save(ours, tmp_path / "ours")
    assert formats.load(tmp_path / "ours")[0].arch == ours.arch
    for spelling in ([0.02, math.inf], [0.02, {"__float__": "Infinity"}]):
        arch = nemotron_h.from_config({**SMALL, "hybrid_override_pattern": "M", "time_step_limit": spelling})
        assert (arch.blocks[0].dt_min, arch.blocks[0].dt_max) == (0.02, None)


def test_the_published_shape(tmp_path):
    ours, _ = formats.load(saved(stock_model("M-*E", {}), tmp_path / "stock"))
    formats.save(ours, tmp_path / "ours")
    text = (tmp_path / "ours" / "config.json").read_text()
    config = json.loads(text, parse_constant=lambda name: pytest.fail(f"{name} is no JSON"))
    assert (config["model_type"], config["architectures"]) == ("nemotron_h", ["NemotronHForCausalLM"])
    assert config["hybrid_override_pattern"] == "M-*E" and config["num_hidden_layers"] == 4
    assert not {"layers_block_type", "layer_types", "block_configs"} & set(config)
    shapes = {name: tuple(t.shape) for name, t in load_file(tmp_path / "ours" / "model.safetensors").items()}
    mamba, attention, experts = (f"backbone.layers.{i}.mixer." for i in (0, 2, 3))
    expected = {
        "backbone.embeddings.weight": (97, 32), "backbone.norm_f.weight": (32,), "lm_head.weight": (97, 32),
        "backbone.layers.0.norm.weight": (32,), f"{mamba}in_proj.weight": (48 + 48 + 2 * 2 * 12 + 6, 32),
        f"{mamba}conv1d.weight": (96, 1, 4), f"{mamba}conv1d.bias": (96,), f"{mamba}A_log": (6,), f"{mamba}D": (6,),
        f"{mamba}dt_bias": (6,), f"{mamba}norm.weight": (48,), f"{mamba}out_proj.weight": (32, 48),
        f"{attention}q_proj.weight": (64, 32), f"{attention}k_proj.weight": (32, 32),
        f"{attention}o_proj.weight": (32, 64), "backbone.layers.1.mixer.down_proj.weight": (32, 44),
        f"{experts}gate.weight": (8, 32), f"{experts}gate.e_score_correction_bias": (8,),
        f"{experts}experts.7.up_proj.weight": (20, 32), f"{experts}shared_experts.down_proj.weight": (32, 28),
    }
    assert expected.items() <= shapes.items()


def saved(model, path):
    model.save_pretrained(path)
    return path


@pytest.mark.parametrize("prefix", ["backbone", "model"])
@pytest.mark.parametrize("embedding", ["embedding", "embeddings"])
def test_four_spellings_of_names(prefix, embedding, tmp_path):
    ours = initialise(Decoder(nemotron_h.from_config({**SMALL, "hybrid_override_pattern": "M-"})))
    formats.save(ours, tmp_path / "a")
    tensors = load_file(tmp_path / "a" / "model.safetensors")
    renamed = {"mtp.layers.0.norm.weight": torch.ones(3)}
    for name, tensor in tensors.items():
        renamed[name.replace("backbone.", f"{prefix}.").replace(".embeddings.", f".{embedding}.")] = tensor
    save_file(renamed, tmp_path / "a" / "model.safetensors")
    back, _ = formats.load(tmp_path / "a")
    assert all(torch.equal(p, q) for p, q in zip(ours.parameters(), back.parameters()))


def test_scan_parameters_stay_float32(tmp_path):
    arch = nemotron_h.from_config({**SMALL, "hybrid_override_pattern": "ME"})
    formats.save(initialise(Decoder(arch, torch.bfloat16)), tmp_path / "a")
    tensors = load_file(tmp_path / "a" / "model.safetensors")
    wide = {name.rpartition(".")[2] for name, t in tensors.items() if t.dtype == torch.float32}
    assert wide == {"A_log", "D", "dt_bias", "e_score_correction_bias"}
    assert formats.load(tmp_path / "a")[0].dtype == torch.bfloat16


def random_puzzle(seed):
    """Layers of every kind, unequal in everything that block_configs can say."""
    draw = torch.Generator().manual_seed(seed)

    def pick(*choices):
        return choices[int(torch.randint(len(choices), (), generator=draw))]

    def block():
        return pick(
            Mamba2(pick(2, 4, 6), pick(4, 8), pick(8, 12), pick(1, 2), dt_min=pick(0.0, 0.01), dt_max=pick(None, 0.5)),
            Attention(pick(2, 4), pick(1, 2), 8, rope=False, sliding_window=pick(None, 5)),
            FeedForward(pick(20, 24, 44), "relu2", gated=False),
            Experts(pick(4, 8), pick(1, 2), pick(8, 12), shared_size=pick(8, 16), routed_scale=pick(1.0, 2.5)),
        )

    return Architecture(32, 97, tuple(block() for _ in range(12)), rope=None, family="nemotron_h_puzzle")


@pytest.mark.parametrize("seed", range(4))
def test_puzzle_round_trip(seed, tmp_path):
    ours = initialise(Decoder(random_puzzle(seed)), std=0.3)
    formats.save(ours, tmp_path / "child")
    config = json.loads((tmp_path / "child" / "config.json").read_text())
    assert (config["model_type"], config["architectures"]) == ("nemotron_h_puzzle", ["NemotronHPuzzleForCausalLM"])
    assert len(config["block_configs"]) == 12
    names = {"M": "mamba", "*": "attention", "-": "mlp", "E": "moe"}
    assert [names[c] for c in config["hybrid_override_pattern"]] == [b["block_type"] for b in config["block_configs"]]
    back, _ = formats.load(tmp_path / "child")
    assert back.arch == ours.arch
    assert difference(ours, back) == 0


def test_puzzle_says_only_what_differs():
    mamba, wide, narrow = Mamba2(4, 8, 8), FeedForward(40, "relu2", False), FeedForward(24, "relu2", False)
    arch = Architecture(32, 97, (mamba, wide, mamba, narrow, Attention(4, 2, 8, rope=False)), rope=None)
    assert nemotron_h_puzzle.to_config(arch)["block_configs"] == [
        {"block_type": "mamba"}, {"block_type": "mlp", "intermediate_size": 40}, {"block_type": "mamba"},
        {"block_type": "mlp", "intermediate_size": 24}, {"block_type": "attention"},
    ]


def test_each_model_goes_where_readers_are(tmp_path):
    mamba, ffn = Mamba2(4, 8, 8), FeedForward(40, "relu2", gated=False)
    uniform = Architecture(32, 97, (mamba, ffn) * 2, rope=None, family="intarsia")
    other = uniform.replace(blocks=(*uniform.blocks, dataclasses.replace(ffn, intermediate_size=24)))
    gated = uniform.replace(blocks=(mamba, FeedForward(40), ffn))
    for arch, family in ((uniform, "nemotron_h"), (other, "nemotron_h_puzzle"), (gated, "intarsia")):
        formats.save(initialise(Decoder(arch)), tmp_path / family)
        assert json.loads((tmp_path / family / "config.json").read_text())["model_type"] == family
    formats.save(initialise(Decoder(other)), tmp_path / "own", family="intarsia")
    assert formats.load(tmp_path / "own")[0].arch == other


def test_intermediate_size_as_a_list():
    config = {**SMALL, "hybrid_override_pattern": "M-M-", "intermediate_size": [12, 34]}
    assert [f.intermediate_size for f in nemotron_h.from_config(config).feed_forwards] == [12, 34]
    with pytest.raises(IntarsiaError, match="lists 2 widths and the pattern has 1"):
        nemotron_h.from_config({**config, "hybrid_override_pattern": "M-"})


def test_absent_fields_mean_what_transformers_takes_them_for():
    theirs = NemotronHConfig(hybrid_override_pattern="M*-E", hidden_size=64)
    arch = nemotron_h.from_config({"model_type": "nemotron_h", "hybrid_override_pattern": "M*-E", "hidden_size": 64})
    mamba, attention, ffn, experts = arch.blocks
    assert (mamba.num_heads, mamba.head_dim, mamba.state_size) == (128, 64, theirs.ssm_state_size)
    assert (mamba.num_groups, mamba.conv_kernel, mamba.chunk_size) == (8, theirs.conv_kernel, theirs.chunk_size)
    assert (mamba.conv_bias, mamba.proj_bias, mamba.dt_min) == (theirs.use_conv_bias, theirs.use_bias, 0.0)
    assert (attention.num_kv_heads, attention.head_dim) == (theirs.num_key_value_heads, theirs.head_dim)
    assert (ffn.intermediate_size, ffn.activation) == (theirs.intermediate_size, theirs.mlp_hidden_act)
    assert (experts.num_experts, experts.shared_size) == (8, theirs.moe_shared_expert_intermediate_size)
    assert (arch.vocab_size, arch.max_positions) == (theirs.vocab_size, theirs.max_position_embeddings)
    older = {"hidden_size": 64, "hybrid_override_pattern": "M*", "mamba_d_conv": 3, "mamba_n_groups": 4,
             "attention_head_dim": 32}  # fmt: skip
    mamba, attention = nemotron_h.from_config(older).blocks
    assert (mamba.conv_kernel, mamba.num_groups, attention.head_dim) == (3, 4, 32)


@pytest.mark.parametrize(
    "fields, words",
    [
        ({"hybrid_override_pattern": "M-X-"}, "the letter 'X' at place 2"),
        ({"hybrid_override_pattern": "M-|M-"}, "cuts pipeline stages"),
        ({"hybrid_override_pattern": "M-M-/*E"}, "multi-token prediction"),
        ({"hybrid_override_pattern": None}, "lacks 'hybrid_override_pattern'"),
        ({"num_hidden_layers": 5}, "num_hidden_layers is 5 and the pattern has 4"),
        ({"layers_block_type": ["mamba"] * 4}, "tell different layers"),
        ({"layers_block_type": ["mamba", "gated_deltanet"], "hybrid_override_pattern": None}, "'gated_deltanet'"),
        ({"n_groups": 5}, "Mamba-2 with 6 heads of width 8"),
        ({"num_key_value_heads": 3}, "4 heads over 3 KV heads"),
        ({"moe_latent_size": 8, "hybrid_override_pattern": "ME"}, "moe_latent_size"),
        ({"n_shared_experts": 2, "hybrid_override_pattern": "ME"}, "n_shared_experts 2"),
        ({"mamba_hidden_act": "gelu"}, "mamba_hidden_act 'gelu'"),
        ({"mlp_hidden_act": "mish"}, "mlp_hidden_act 'mish'"),
        ({"time_step_limit": 0.5}, "time_step_limit must be two numbers"),
        ({"time_step_limit": [1.0, 0.5]}, "0 <= lower <= upper"),
        ({"hidden_size": None}, "lacks 'hidden_size'"),
    ],
)
def test_contradictions_are_told(fields, words):
    config = {**SMALL, "model_type": "nemotron_h", "hybrid_override_pattern": "M-M*", **fields}
    with pytest.raises(IntarsiaError) as caught:
        nemotron_h.from_config(config)
    assert words in str(caught.value)


def test_puzzle_contradictions_are_told():
    config = {**SMALL, "block_configs": [{"block_type": "mamba"}, {"block_type": "mlp"}]}
    assert len(nemotron_h_puzzle.from_config(config).blocks) == 2
    for fields, words in (
        ({"hybrid_override_pattern": "M-M"}, "tell different layers"),
        ({"num_hidden_layers": 3}, "3; block_configs has 2"),
        ({"block_configs": [{"block_type": "lstm"}]}, "'lstm' is not known"),
        ({"block_configs": None}, "lacks 'block_configs'"),
    ):
        with pytest.raises(IntarsiaError) as caught:
            nemotron_h_puzzle.from_config({**config, **fields})
        assert words in str(caught.value)


def test_missing_and_misshapen_tensors_are_told(tmp_path):
    arch = nemotron_h.from_config({**SMALL, "hybrid_override_pattern": "ME"})
    folder = formats.save(initialise(Decoder(arch)), tmp_path / "a")
    whole = load_file(folder / "model.safetensors")

    def told(words, change):
        tensors = dict(whole)
        change(tensors)
        save_file(tensors, folder / "model.safetensors")
        with pytest.raises(IntarsiaError) as caught:
            formats.load(folder)
        assert words in str(caught.value)

    told("lacks 1 tensor: blocks.0.mixer.A_log", lambda t: t.pop("backbone.layers.0.mixer.A_log"))
    expert = "backbone.layers.1.mixer.experts.2.up_proj.weight"
    told("7 of 8 parts of blocks.1.mixer.experts.up (part 2", lambda t: t.pop(expert))
    in_proj = "backbone.layers.0.mixer.in_proj.weight"
    told("has the shape (149, 32); the model needs (150, 32)", lambda t: t.update({in_proj: t[in_proj][:149].clone()}))
    told("no place for", lambda t: t.update({"backbone.layers.9.norm.weight": torch.ones(32)}))
    told("twice", lambda t: t.update({"model.embedding.weight": torch.ones(97, 32)}))


@pytest.mark.parametrize(
    "changes, words",
    [
        ({"tied_embeddings": True}, "tied"),
        ({"blocks": (FeedForward(8),)}, "gated"),
        ({"blocks": (Attention(4, 2, 8, qk_norm=True),)}, "q/k norms"),
        ({"blocks": (Attention(4, 2, 8, qkv_bias=True, out_bias=True),)}, "biases"),
        ({"blocks": (Mamba2(4, 8, 8, num_groups=2, norm_groups=1),)}, "1 groups of channels and B and C on 2"),
        ({"blocks": (Mamba2(4, 8, 8), Mamba2(2, 8, 8))}, "nemotron_h_puzzle can say that"),
        ({"blocks": (Experts(4, 1, 8),)}, "no shared one"),
    ],
)
def test_what_cannot_be_written_is_told(changes, words, tmp_path):
    arch = Architecture(**{"hidden_size": 32, "vocab_size": 9, "blocks": (Mamba2(4, 8, 8),), "rope": None, **changes})
    with pytest.raises(IntarsiaError, match="cannot be written as nemotron_h: ") as caught:
        formats.save(initialise(Decoder(arch)), tmp_path / "a", family="nemotron_h")
    assert words in str(caught.value)


def test_rotary_attention_is_refused(tmp_path):
    arch = Architecture(32, 9, (Mamba2(4, 8, 8), Attention(4, 2, 8)))
    with pytest.raises(IntarsiaError, match="rotary positions"):
        formats.save(initialise(Decoder(arch)), tmp_path / "a", family="nemotron_h")
