"""The families mamba and mamba2: our logits are those of transformers, there and back."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM

from intarsia import formats
from intarsia.arch import Architecture, FeedForward, Mamba1, Mamba2
from intarsia.base.errors import IntarsiaError
from intarsia.formats.mamba_families import from_config
from intarsia.model import Decoder, initialise

MAMBA = {"vocab_size": 97, "hidden_size": 32, "num_hidden_layers": 3, "state_size": 8}
MAMBA2 = {**MAMBA, "num_heads": 8, "head_dim": 8, "n_groups": 2, "chunk_size": 16}
CASES = {
    "mamba": ("mamba", MAMBA),
    "mamba untied, biased": (
        "mamba",
        {**MAMBA, "tie_word_embeddings": False, "use_bias": True, "use_conv_bias": False, "time_step_rank": 5},
    ),
    "mamba wide": ("mamba", {**MAMBA, "expand": 3, "conv_kernel": 2}),
    "mamba2": ("mamba2", MAMBA2),
    "mamba2 tied, biased, one group": (
        "mamba2",
        {**MAMBA2, "tie_word_embeddings": True, "use_bias": True, "use_conv_bias": False, "n_groups": 1},
    ),
    "mamba2 with bounds": ("mamba2", {**MAMBA2, "time_step_limit": (0.05, 0.6), "num_heads": 16, "head_dim": 4}),
}


def stock_model(family, fields):
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(family, **fields)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.2)
    return model


@torch.no_grad()
def difference(one, other, length=40):
    ids = torch.randint(0, 97, (2, length), generator=torch.Generator().manual_seed(1))
    a, b = (m(ids) if isinstance(m, Decoder) else m(ids, use_cache=False).logits for m in (one, other))
    assert a.abs().max() > 0.5
    return float((a - b).abs().max())


@pytest.mark.parametrize("name", CASES)
def test_logits_equal_transformers_there_and_back(name, tmp_path):
    family, fields = CASES[name]
    stock = stock_model(family, fields)
    stock.save_pretrained(tmp_path / "stock")
    ours, _ = formats.load(tmp_path / "stock")
    assert difference(ours, stock) < 1e-4
    formats.save(ours, tmp_path / "ours", source=tmp_path / "stock")
    config = json.loads((tmp_path / "ours" / "config.json").read_text())
    assert config["model_type"] == family
    back = AutoModelForCausalLM.from_pretrained(tmp_path / "ours")
    assert difference(ours, back) < 1e-4
    again, _ = formats.load(tmp_path / "ours")
    assert again.arch == ours.arch
    names = set(load_file(tmp_path / "ours" / "model.safetensors"))
    assert {"backbone.embeddings.weight", "backbone.layers.2.mixer.conv1d.weight", "backbone.norm_f.weight"} <= names
    assert ("lm_head.weight" in names) != config["tie_word_embeddings"]


def test_the_older_name_of_the_embedding(tmp_path):
    ours = initialise(Decoder(from_config({**MAMBA, "model_type": "mamba"})))
    formats.save(ours, tmp_path / "a")
    tensors = load_file(tmp_path / "a" / "model.safetensors")
    tensors["backbone.embedding.weight"] = tensors.pop("backbone.embeddings.weight")
    save_file({**tensors, "lm_head.weight": torch.zeros(97, 32)}, tmp_path / "a" / "model.safetensors")  # a stale copy
    back, _ = formats.load(tmp_path / "a")
    assert torch.equal(back.embed.weight, ours.embed.weight)


def test_absent_fields_mean_what_transformers_takes_them_for():
    least = {"hidden_size": 64, "num_hidden_layers": 2, "vocab_size": 9}
    theirs = AutoConfig.for_model("mamba", **least)
    arch = from_config({**least, "model_type": "mamba"})
    block = arch.blocks[0]
    assert (block.inner_size, block.state_size) == (theirs.intermediate_size, theirs.state_size)
    assert (block.time_step_rank, block.conv_kernel) == (theirs.time_step_rank, theirs.conv_kernel)
    assert (arch.tied_embeddings, arch.norm_eps) == (theirs.tie_word_embeddings, theirs.layer_norm_epsilon)
    theirs = AutoConfig.for_model("mamba2", **{**least, "hidden_size": 4096})
    arch = from_config({**least, "hidden_size": 4096, "model_type": "mamba2"})
    block = arch.blocks[0]
    assert (block.num_heads, block.head_dim, block.num_groups) == (theirs.num_heads, theirs.head_dim, theirs.n_groups)
    assert (block.state_size, block.chunk_size) == (theirs.state_size, theirs.chunk_size)
    assert arch.tied_embeddings == theirs.tie_word_embeddings


@pytest.mark.parametrize(
    "config, words",
    [
        ({**MAMBA2, "model_type": "mamba2", "num_heads": 7}, "7 x 8 = 56 contradicts expand x hidden_size = 2 x 32"),
        ({**MAMBA, "model_type": "mamba", "intermediate_size": 60}, "intermediate_size 60 contradicts"),
        ({**MAMBA, "model_type": "mamba", "hidden_act": "relu"}, "hidden_act 'relu'"),
        ({"model_type": "mamba", "hidden_size": 8}, "lacks 'num_hidden_layers'"),
    ],
)
def test_contradictions_are_told(config, words):
    with pytest.raises(IntarsiaError) as caught:
        from_config(config)
    assert words in str(caught.value)


@pytest.mark.parametrize(
    "family, blocks, words",
    [
        ("mamba", (Mamba2(8, 8, 8),), "other than Mamba-1"),
        ("mamba2", (Mamba2(8, 8, 8), FeedForward(8)), "other than Mamba-2"),
        ("mamba2", (Mamba2(8, 8, 8), Mamba2(4, 8, 8)), "differ in width"),
        ("mamba2", (Mamba2(9, 8, 8),), "72 inner channels are no multiple of the stream (32)"),
        ("mamba2", (Mamba2(8, 8, 8, num_groups=2, norm_groups=1),), "1 groups of channels and B and C on 2"),
        ("mamba", (Mamba1(40, time_step_rank=2),), "40 inner channels"),
    ],
)
def test_what_cannot_be_written_is_told(family, blocks, words, tmp_path):
    model = initialise(Decoder(Architecture(32, 9, blocks, rope=None)))
    with pytest.raises(IntarsiaError, match=f"cannot be written as {family}: ") as caught:
        formats.save(model, tmp_path / "a", family=family)
    assert words in str(caught.value)
