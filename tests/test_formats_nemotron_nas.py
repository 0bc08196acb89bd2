"""Per-layer widths as nemotron-nas: the reader's own formula, zero padding, and back."""

import json

import pytest
import torch
from safetensors.torch import load_file

from intarsia import formats
from intarsia.arch import Architecture, Attention, FeedForward, Linear
from intarsia.base.errors import IntarsiaError
from intarsia.formats.nemotron_nas import from_config, to_config
from intarsia.model import Decoder, initialise

CHILD = Architecture(
    hidden_size=48,
    vocab_size=64,
    blocks=(
        Attention(6, 3, 8), FeedForward(300), FeedForward(512), Attention(6, 1, 8), Linear(), Linear(), FeedForward(64),
        Attention(6, 6, 8),
    ),
    tied_embeddings=True,
)


def reader_width(mult, hidden):
    """TensorRT-LLM and vLLM: _ffn_mult_to_intermediate_size."""
    n = int(2 * mult * hidden / 3)
    return n if n % 256 == 0 else n + 256 - n % 256


@torch.no_grad()
def test_written_and_read_back(tmp_path):
    model = initialise(Decoder(CHILD), std=0.2)
    formats.save(model, tmp_path / "nas", family="nemotron-nas")
    config = json.loads((tmp_path / "nas" / "config.json").read_text())
    assert (config["model_type"], config["architectures"]) == ("nemotron-nas", ["DeciLMForCausalLM"])
    attention = [b["attention"] for b in config["block_configs"]]
    ffn = [b["ffn"] for b in config["block_configs"]]
    assert [a["n_heads_in_group"] for a in attention] == [2, None, 6, None, 1]
    assert [a["no_op"] for a in attention] == [False, True, False, False, False]
    assert [a["replace_with_linear"] for a in attention] == [False, False, False, True, False]
    assert [f["replace_with_linear"] for f in ffn] == [False, False, True, False, False]
    assert [f["no_op"] for f in ffn] == [False, False, False, False, True]
    widths = [f["ffn_mult"] and reader_width(f["ffn_mult"], 48) for f in ffn]
    assert widths == [512, 512, None, 256, None]
    tensors = load_file(tmp_path / "nas" / "model.safetensors")
    assert tensors["model.layers.0.mlp.gate_proj.weight"].shape == (512, 48)
    assert "model.layers.3.self_attn.linear_attn.weight" in tensors
    assert "model.layers.2.mlp.linear_mlp.weight" in tensors
    back, _ = formats.load(tmp_path / "nas")
    ids = torch.arange(20)[None]
    torch.testing.assert_close(back(ids), model(ids), atol=1e-5, rtol=0)


@pytest.mark.parametrize("hidden", [48, 576, 1536, 4096, 5000])
def test_every_multiple_of_256_survives_the_formula(hidden):
    for width in range(256, 16384 + 1, 256):
        arch = Architecture(hidden_size=hidden, vocab_size=8, blocks=(FeedForward(width),))
        config = to_config(arch)
        assert reader_width(config["block_configs"][0]["ffn"]["ffn_mult"], hidden) == width
        assert from_config(config) == arch


def test_what_it_cannot_express_is_a_sentence(tmp_path):
    fewer = CHILD.replace(blocks=(*CHILD.blocks, Attention(3, 3, 8)))
    with pytest.raises(IntarsiaError, match=r"query heads \(3, 6\)"):
        formats.save(Decoder(fewer), tmp_path / "x", family="nemotron-nas")


def test_export(tmp_path):
    formats.save(initialise(Decoder(CHILD), std=0.2), tmp_path / "child")
    assert json.loads((tmp_path / "child" / "config.json").read_text())["model_type"] == "intarsia"
    formats.export(tmp_path / "child", tmp_path / "nas", to="nemotron-nas")
    assert formats.load(tmp_path / "nas")[0].arch.blocks[1] == FeedForward(512)
    with pytest.raises(IntarsiaError, match="cannot be written as llama: its blocks are not an alternation"):
        formats.export(tmp_path / "child", tmp_path / "hf")
    with pytest.raises(IntarsiaError, match="'onnx' is not known"):
        formats.export(tmp_path / "child", tmp_path / "hf", to="onnx")
    uniform = CHILD.replace(blocks=(Attention(6, 2, 8), FeedForward(40)) * 2)
    formats.save(initialise(Decoder(uniform)), tmp_path / "u", family="intarsia")
    formats.export(tmp_path / "u", tmp_path / "hf")
    assert json.loads((tmp_path / "hf" / "config.json").read_text())["model_type"] == "llama"
