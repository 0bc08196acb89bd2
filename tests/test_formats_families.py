"""Hugging Face families: our logits are those of transformers, there and back."""

import json
import subprocess
import sys

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoConfig, AutoModelForCausalLM

from intarsia import formats
from intarsia.arch import Architecture, Attention, FeedForward, Rope
from intarsia.base.errors import IntarsiaError
from intarsia.formats.families import architecture_from_config, config_from_architecture
from intarsia.model import Decoder, initialise

SMALL = {
    "vocab_size": 97, "hidden_size": 32, "intermediate_size": 44, "num_hidden_layers": 3, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 256,
}
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16, "beta_fast": 8.0}
LLAMA3 = {
    "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}
CASES = {
    "llama": ("llama", {}),
    "llama tied, biased, one KV head": (
        "llama", {"tie_word_embeddings": True, "attention_bias": True, "mlp_bias": True, "num_key_value_heads": 1},
    ),
    "llama explicit head_dim": ("llama", {"head_dim": 16, "hidden_act": "gelu_pytorch_tanh"}),
    "llama3 scaling": ("llama", {"rope_parameters": {**LLAMA3, "rope_theta": 500_000.0}}),
    "linear scaling": ("llama", {"rope_parameters": {"rope_type": "linear", "factor": 3.0, "rope_theta": 10_000.0}}),
    "yarn scaling": ("qwen2", {"rope_parameters": {**YARN, "rope_theta": 1_000_000.0}}),
    "mistral with a window": ("mistral", {"sliding_window": 7}),
    "mistral without": ("mistral", {"sliding_window": None, "head_dim": 12}),
    "qwen2": ("qwen2", {}),
    "qwen2 tied, windows above layer 1": (
        "qwen2", {"tie_word_embeddings": True, "use_sliding_window": True, "sliding_window": 5, "max_window_layers": 1},
    ),
    "qwen3": ("qwen3", {"head_dim": 16}),
    "qwen3 biased, windows by layer": (
        "qwen3",
        {
            "head_dim": 8, "attention_bias": True, "use_sliding_window": True, "sliding_window": 6,
            "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
        },
    ),
}


def stock_model(family, fields):
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(family, **{**SMALL, **fields})).eval()
    with torch.no_grad():
        for parameter in model.parameters():  # norms and biases too: ones and zeros would hide mistakes
            parameter.add_(torch.randn_like(parameter) * 0.2)
    return model


@torch.no_grad()
def difference(one, other, length=40):
    ids = torch.randint(0, SMALL["vocab_size"], (2, length), generator=torch.Generator().manual_seed(1))
    a, b = ((m.logits if hasattr(m, "logits") else m) for m in (one(ids), other(ids)))
    assert a.abs().max() > 0.5
    return float((a - b).abs().max())


@pytest.mark.parametrize("name", CASES)
def test_logits_equal_transformers_there_and_back(name, tmp_path):
    stock = stock_model(*CASES[name])
    stock.save_pretrained(tmp_path / "stock")
    ours, tokenizer = formats.load(tmp_path / "stock")
    assert tokenizer is None and ours.dtype == torch.float32 and not ours.training
    assert difference(ours, stock) < 1e-4
    formats.save(ours, tmp_path / "ours", source=tmp_path / "stock")
    assert json.loads((tmp_path / "ours" / "config.json").read_text())["model_type"] == CASES[name][0]
    back = AutoModelForCausalLM.from_pretrained(tmp_path / "ours")
    assert difference(ours, back) < 1e-4
    again, _ = formats.load(tmp_path / "ours")
    assert again.arch == ours.arch


@pytest.mark.parametrize("scaling", [LLAMA3, YARN, {"type": "linear", "factor": 3.0}, None], ids=str)
def test_old_and_new_spelling_of_rope_mean_the_same(scaling):
    old = {**SMALL, "model_type": "llama", "rope_theta": 77_000.0, "rope_scaling": scaling}
    new = {**SMALL, "model_type": "llama", "rope_parameters": {**(scaling or {}), "rope_theta": 77_000.0}}
    assert architecture_from_config(old) == architecture_from_config(new)
    assert architecture_from_config(old).rope.theta == 77_000.0


def test_absent_fields_mean_what_transformers_takes_them_for():
    minimal = {k: SMALL[k] for k in ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers")}
    for family, heads in (("llama", 4), ("mistral", 8), ("qwen2", 32), ("qwen3", 32)):
        config = {**minimal, "model_type": family, "num_attention_heads": heads}
        theirs = AutoConfig.for_model(**config)
        arch = architecture_from_config(config)
        attention = arch.attentions[0]
        assert attention.num_kv_heads == theirs.num_key_value_heads
        assert attention.head_dim == (getattr(theirs, "head_dim", None) or 32 // heads)
        assert attention.sliding_window == (theirs.sliding_window if family != "llama" else None)
        assert (arch.max_positions, arch.norm_eps) == (theirs.max_position_embeddings, theirs.rms_norm_eps)
        assert arch.rope == Rope(theirs.rope_parameters["rope_theta"])
        assert arch.tied_embeddings == theirs.tie_word_embeddings


@pytest.mark.parametrize("writer", ["transformers", "ours"])
def test_shards(writer, tmp_path):
    stock = stock_model("llama", {})
    stock.save_pretrained(tmp_path / "a", max_shard_size="20KB")
    folder = tmp_path / "a"
    if writer == "ours":
        model, _ = formats.load(folder)
        formats.save(model, tmp_path / "b", shard_bytes=20_000)
        folder = tmp_path / "b"
    assert len(list(folder.glob("*.safetensors"))) > 3
    ours, _ = formats.load(folder)
    assert difference(ours, stock) < 1e-4
    assert difference(ours, AutoModelForCausalLM.from_pretrained(folder)) < 1e-4


def test_dtypes_as_stored_and_as_asked(tmp_path):
    stock_model("llama", {}).to(torch.bfloat16).save_pretrained(tmp_path)
    stored, _ = formats.load(tmp_path)
    asked, _ = formats.load(tmp_path, dtype="float32")
    assert (stored.dtype, asked.dtype) == (torch.bfloat16, torch.float32)
    assert torch.equal(stored.embed.weight.float(), asked.embed.weight)
    names = dict(formats.open_checkpoint(tmp_path).tensors())
    assert torch.equal(names["blocks.3.mixer.up.weight"], stored.blocks[3].mixer.up.weight)
    with pytest.raises(IntarsiaError, match="dtype 'int8'"):
        formats.load(tmp_path, dtype="int8")


def test_a_uniform_child_loads_without_us(tmp_path):
    arch = Architecture.transformer(
        2, Attention(6, 2, 8), FeedForward(40), hidden_size=48, vocab_size=97, tied_embeddings=True, family="llama"
    )
    model = initialise(Decoder(arch), std=0.2)
    formats.save(model, tmp_path / "child")
    ids = torch.arange(20)[None]
    with torch.no_grad():
        torch.save(model(ids), tmp_path / "logits.pt")
    code = """
import sys, torch, transformers
model = transformers.AutoModelForCausalLM.from_pretrained(sys.argv[1] + "/child")
wanted = torch.load(sys.argv[1] + "/logits.pt")
with torch.no_grad():
    print(float((model(torch.arange(20)[None]).logits - wanted).abs().max()))
assert "intarsia" not in sys.modules
"""
    done = subprocess.run([sys.executable, "-c", code, str(tmp_path)], capture_output=True, text=True, check=True)
    assert float(done.stdout) < 1e-4


@st.composite
def architectures(draw):
    family = draw(st.sampled_from(["llama", "mistral", "qwen2", "qwen3"]))
    kv, head_dim = draw(st.integers(1, 4)), draw(st.sampled_from([4, 8]))
    heads = kv * draw(st.integers(1, 3))
    bias = draw(st.booleans()) and family in ("llama", "qwen3")
    windows = {"llama": st.none(), "mistral": st.sampled_from([None, 9])}.get(family, st.sampled_from([None, 9]))
    layers = draw(st.integers(1, 4))
    given_windows = [draw(windows)] * layers if family == "mistral" else [draw(windows) for _ in range(layers)]
    scaling = draw(st.sampled_from([None, LLAMA3, YARN, {"rope_type": "linear", "factor": 2.0}]))
    ffn = FeedForward(draw(st.integers(1, 99)), bias=family == "llama" and draw(st.booleans()))
    blocks = []
    for window in given_windows:
        blocks.append(Attention(heads, kv, head_dim, bias or family == "qwen2", bias, family == "qwen3", window))
        blocks.append(ffn)
    return Architecture(
        hidden_size=heads * draw(st.integers(1, 9)), vocab_size=draw(st.integers(1, 999)), blocks=tuple(blocks),
        norm_eps=draw(st.sampled_from([1e-5, 1e-6])), rope=Rope(draw(st.floats(10, 1e7)), scaling),
        tied_embeddings=draw(st.booleans()), max_positions=draw(st.integers(16, 9999)), family=family,
    )


@given(architectures())
@settings(max_examples=60, deadline=None)
def test_config_round_trip(arch):
    config = json.loads(json.dumps(config_from_architecture(arch, arch.family)))
    assert architecture_from_config(config) == arch


def test_what_a_family_cannot_express_is_a_sentence(tmp_path):
    base = Architecture.transformer(2, Attention(4, 2, 8), FeedForward(40), hidden_size=32, vocab_size=97)
    unequal = base.replace(blocks=(*base.blocks[:3], FeedForward(24)))
    with pytest.raises(IntarsiaError, match="cannot be written as llama: its layers differ in width"):
        formats.save(Decoder(unequal), tmp_path / "x", family="llama")
    with pytest.raises(IntarsiaError, match="qwen3: it has no q/k norms"):
        formats.save(Decoder(base), tmp_path / "x", family="qwen3")
    with pytest.raises(IntarsiaError, match="'gpt2' is not known; known: llama"):
        formats.save(Decoder(base), tmp_path / "x", family="gpt2")
    with pytest.raises(IntarsiaError, match=r"width \(33\) that its 4 heads divide"):
        formats.save(Decoder(base.replace(hidden_size=33)), tmp_path / "x", family="llama")
    assert not (tmp_path / "x").exists()


@pytest.mark.parametrize("first", [0, 1, 3])
def test_windows_begin_at_max_window_layers(first):
    """Old folders have no layer_types, which transformers now always writes."""
    fields = {**SMALL, "use_sliding_window": True, "sliding_window": 5, "max_window_layers": first}
    theirs = AutoConfig.for_model("qwen2", **fields).layer_types
    arch = architecture_from_config({**fields, "model_type": "qwen2"})
    assert [b.sliding_window for b in arch.attentions] == [5 if t == "sliding_attention" else None for t in theirs]
