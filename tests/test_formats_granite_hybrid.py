"""granitemoehybrid: the stock home of a Llama whose attention was partly replaced by Mamba-2."""

import json

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModelForCausalLM

from intarsia import formats
from intarsia.arch import Architecture, Attention, FeedForward, Mamba2, Rope
from intarsia.base.errors import IntarsiaError
from intarsia.formats.granite_hybrid import from_config
from intarsia.model import Decoder, initialise

SMALL = {
    "vocab_size": 97, "hidden_size": 32, "intermediate_size": 44, "shared_intermediate_size": 44,
    "num_hidden_layers": 4, "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 256,
    "layer_types": ["mamba", "attention", "mamba", "attention"], "num_local_experts": 0, "num_experts_per_tok": 0,
    "attention_multiplier": 8**-0.5, "position_embedding_type": "rope", "mamba_n_heads": 8, "mamba_d_head": 8,
    "mamba_d_state": 12, "mamba_n_groups": 1, "mamba_chunk_size": 16,
}
LLAMA3 = {
    "rope_type": "llama3", "rope_theta": 500_000.0, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}
CASES = {
    "rope": {},
    "tied, grouped": {"tie_word_embeddings": True, "mamba_n_groups": 2, "mamba_d_head": "auto"},
    "no positions, biased": {
        "position_embedding_type": "nope", "attention_bias": True, "mamba_proj_bias": True, "mamba_conv_bias": False,
    },
    "llama3 scaling, one KV head, bounds": {
        "rope_parameters": LLAMA3, "num_key_value_heads": 1, "time_step_limit": (0.3, 0.8), "mamba_d_conv": 3,
    },
    "Mamba-2 alone": {"layer_types": ["mamba"] * 4, "mamba_expand": 1, "mamba_n_heads": 4},
}
ATTENTION, MAMBA, FFN = Attention(4, 2, 8), Mamba2(4, 8, 16), FeedForward(44)
CHILD = Architecture(
    hidden_size=32, vocab_size=97, blocks=(MAMBA, FFN, ATTENTION, FFN, MAMBA, FFN), rope=Rope(100_000.0),
    tied_embeddings=True, family="llama",
)  # fmt: skip


@torch.no_grad()
def difference(one, other, length=40):
    ids = torch.randint(0, 97, (2, length), generator=torch.Generator().manual_seed(1))
    a, b = (m(ids) if isinstance(m, Decoder) else m(ids, use_cache=False).logits for m in (one, other))
    assert a.abs().max() > 0.5
    return float((a - b).abs().max())


@pytest.mark.parametrize("name", CASES)
def test_logits_equal_transformers_there_and_back(name, tmp_path):
    torch.manual_seed(0)
    config = AutoConfig.for_model("granitemoehybrid", **{**SMALL, **CASES[name]})
    stock = AutoModelForCausalLM.from_config(config).eval()
    with torch.no_grad():
        for parameter in stock.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.2)
    stock.save_pretrained(tmp_path / "stock")
    ours, _ = formats.load(tmp_path / "stock")
    assert difference(ours, stock) < 1e-4
    formats.save(ours, tmp_path / "ours", source=tmp_path / "stock")
    back = AutoModelForCausalLM.from_pretrained(tmp_path / "ours")
    assert type(back) is type(stock)
    assert difference(ours, back) < 1e-4
    again, _ = formats.load(tmp_path / "ours")
    assert again.arch == ours.arch


@pytest.mark.parametrize("seed", range(3))
def test_a_llama_with_replaced_attention_is_at_home_there(seed, tmp_path):
    ours = initialise(Decoder(CHILD), seed=seed, std=0.3).eval()
    formats.save(ours, tmp_path / "child")
    config = json.loads((tmp_path / "child" / "config.json").read_text())
    assert (config["model_type"], config["architectures"]) == ("granitemoehybrid", ["GraniteMoeHybridForCausalLM"])
    assert config["layer_types"] == ["mamba", "attention", "mamba"]
    stock = AutoModelForCausalLM.from_pretrained(tmp_path / "child")
    assert type(stock).__name__ == "GraniteMoeHybridForCausalLM"
    assert difference(ours, stock) < 1e-4
    back, _ = formats.load(tmp_path / "child")
    assert back.arch == CHILD.replace(family="granitemoehybrid")
    assert difference(ours, back) == 0


@torch.no_grad()
def test_stock_generation_is_ours(tmp_path):
    ours = initialise(Decoder(CHILD), std=0.3).eval()
    stock = AutoModelForCausalLM.from_pretrained(formats.save(ours, tmp_path / "child"))
    ids = torch.randint(0, 97, (1, 9), generator=torch.Generator().manual_seed(2))
    out = stock.generate(ids, max_new_tokens=12, do_sample=False, eos_token_id=None, pad_token_id=0)
    for _ in range(12):
        ids = torch.cat([ids, ours(ids)[:, -1:].argmax(-1)], 1)
    assert torch.equal(out, ids)


def test_gate_and_up_stand_in_one_tensor(tmp_path):
    ours = initialise(Decoder(CHILD, torch.bfloat16))
    tensors = load_file(formats.save(ours, tmp_path / "child") / "model.safetensors")
    both = tensors["model.layers.1.shared_mlp.input_linear.weight"]
    assert both.shape == (88, 32) and both.dtype == torch.bfloat16
    mlp = ours.blocks[3].mixer
    assert torch.equal(both, torch.cat([mlp.gate.weight, mlp.up.weight]))
    assert tensors["model.layers.0.mamba.conv1d.weight"].shape == (32 + 2 * 16, 1, 4)
    back, _ = formats.load(tmp_path / "child")
    assert all(torch.equal(p, q) for p, q in zip(ours.parameters(), back.parameters()))


@pytest.mark.parametrize(
    "fields, words",
    [
        ({"num_local_experts": 4}, "with 4 experts is not supported"),
        ({"residual_multiplier": 0.22}, "residual_multiplier 0.22 is not supported; supported: 1"),
        ({"attention_multiplier": 1.0}, "supported: 0.353553"),
        ({"layer_types": ["mamba"] * 3}, "mamba or attention for each of 4 layers"),
        ({"layer_types": ["mamba", "mamba", "conv", "attention"]}, "mamba or attention"),
        ({"mamba_d_head": 9}, "8 x 9 contradicts mamba_expand x hidden_size = 64"),
        ({"num_attention_heads": None}, "lacks 'num_attention_heads'"),
        ({"hidden_act": "gelu"}, "hidden_act 'gelu'"),
    ],
)
def test_contradictions_are_told(fields, words):
    with pytest.raises(IntarsiaError) as caught:
        from_config({**SMALL, "model_type": "granitemoehybrid", **fields})
    assert words in str(caught.value)


@pytest.mark.parametrize(
    "blocks, words",
    [
        ((ATTENTION, FFN), "no Mamba-2 block"),
        ((MAMBA, FFN, FFN), "no alternation"),
        ((MAMBA, FFN, ATTENTION, FeedForward(40)), "differ in width"),
        ((MAMBA, FeedForward(44, gated=False)), "no SwiGLU"),
        ((Mamba2(5, 8, 8), FFN), "40 channels of its Mamba-2 are no multiple of the stream (32)"),
        ((Mamba2(4, 8, 8, 2, norm_groups=1), FFN), "1 groups of channels and B and C on 2"),
        ((MAMBA, FFN, Attention(4, 2, 16), FFN), "do not span the stream"),
        ((MAMBA, FFN, Attention(4, 2, 8, qk_norm=True), FFN), "q/k norms"),
    ],
)
def test_what_cannot_be_written_is_told(blocks, words, tmp_path):
    model = initialise(Decoder(CHILD.replace(blocks=blocks)))
    with pytest.raises(IntarsiaError, match="cannot be written as granitemoehybrid") as caught:
        formats.save(model, tmp_path / "a", family="granitemoehybrid")
    assert words.replace("no alternation", "not an alternation") in str(caught.value)


def test_bamba_is_refused_with_its_reason(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "bamba"}))
    with pytest.raises(IntarsiaError, match=r"rotates half of every attention head.*granitemoehybrid"):
        formats.open_checkpoint(tmp_path)


def test_export_says_what_is_possible(tmp_path):
    uneven = CHILD.replace(blocks=(*CHILD.blocks, FeedForward(8)))
    folder = formats.save(initialise(Decoder(uneven)), tmp_path / "child")
    assert json.loads((folder / "config.json").read_text())["model_type"] == "intarsia"
    with pytest.raises(IntarsiaError, match=r"cannot be written as .*Keep it as intarsia"):
        formats.export(folder, tmp_path / "out")
    even = formats.save(initialise(Decoder(CHILD)), tmp_path / "even", family="intarsia")
    formats.export(even, tmp_path / "stock")
    assert json.loads((tmp_path / "stock" / "config.json").read_text())["model_type"] == "granitemoehybrid"
