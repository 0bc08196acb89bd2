"""GGUF: every quantisation, the row permutation, scalings, tokenizers; the real parent where it has been fetched."""

import gguf
import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType as Q

from intarsia import formats
from intarsia.arch import Architecture, Attention, FeedForward, Rope
from intarsia.base.errors import IntarsiaError
from intarsia.formats.gguf_model import unpermute
from intarsia.formats.names import llama_names
from intarsia.model import Decoder, initialise
from intarsia.ops.rope import frequencies

WIDE = Architecture.transformer(
    1, Attention(4, 2, 64), FeedForward(256), hidden_size=256, vocab_size=64, tied_embeddings=True, norm_eps=1e-5
)
SMALL = Architecture.transformer(2, Attention(4, 2, 8), FeedForward(64), hidden_size=32, vocab_size=64, family="qwen2")
OUTER = {"embed.weight": "token_embd.weight", "norm.weight": "output_norm.weight", "head.weight": "output.weight"}
PARTS = {
    "self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k", "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output", "self_attn.q_norm": "attn_q_norm", "self_attn.k_norm": "attn_k_norm",
    "mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up", "mlp.down_proj": "ffn_down",
    "input_layernorm": "attn_norm", "post_attention_layernorm": "ffn_norm",
}
# Kinds that the gguf package can write from float32; the K-quants it only reads.
WRITABLE = [Q.F32, Q.F16, Q.BF16, Q.Q4_0, Q.Q4_1, Q.Q5_0, Q.Q5_1, Q.Q8_0]


def permute(weight, heads):
    """As llama.cpp's converter does (its LlamaModel.permute)."""
    pairs = weight.reshape(heads, 2, weight.shape[0] // heads // 2, *weight.shape[1:])
    return pairs.swapaxes(1, 2).reshape(weight.shape)


def write(path, model, kind="llama", quantisation=Q.F32, extra=(), metadata=None, raw=None):
    """A GGUF file as llama.cpp's converter writes it."""
    arch, attention = model.arch, model.arch.attentions[0]
    writer = gguf.GGUFWriter(path, kind)
    writer.add_block_count(len(arch.blocks) // 2)
    writer.add_context_length(arch.max_positions)
    writer.add_embedding_length(arch.hidden_size)
    writer.add_feed_forward_length(arch.feed_forwards[0].intermediate_size)
    writer.add_head_count(attention.num_heads)
    writer.add_head_count_kv(attention.num_kv_heads)
    writer.add_key_length(attention.head_dim)
    writer.add_layer_norm_rms_eps(arch.norm_eps)
    writer.add_rope_freq_base(arch.rope.theta)
    for add in metadata or ():
        add(writer)
    theirs = llama_names(arch)
    for name, parameter in model.named_parameters():
        data = parameter.detach().float().numpy()
        foreign = OUTER.get(name)
        if foreign is None:
            _, _, layer, *middle, leaf = theirs[name].split(".")
            part = PARTS[".".join(middle)]
            foreign = f"blk.{layer}.{part}.{leaf}"
            if kind == "llama" and part in ("attn_q", "attn_k"):
                data = permute(data, attention.num_heads if part == "attn_q" else attention.num_kv_heads)
        if foreign in (raw or {}):
            writer.add_tensor(foreign, raw[foreign][0], raw_dtype=raw[foreign][1])
            continue
        used = quantisation if data.ndim == 2 else Q.F32
        writer.add_tensor(foreign, gguf.quants.quantize(np.ascontiguousarray(data), used), raw_dtype=used)
    for name, data in extra:
        writer.add_tensor(name, data)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def same(model, loaded, quantisation=Q.F32):
    """Quantisation works along rows, so it commutes with the permutation of rows: what is loaded is known exactly."""
    found = dict(loaded.named_parameters())
    for name, parameter in model.named_parameters():
        wanted = parameter.detach().float().numpy()
        if wanted.ndim == 2:
            wanted = gguf.quants.dequantize(gguf.quants.quantize(wanted, quantisation), quantisation)
        assert np.array_equal(found[name].detach().float().numpy(), wanted), name


def test_unpermute_inverts_llama_cpp():
    weight = np.random.default_rng(0).normal(size=(24, 5)).astype(np.float32)
    assert np.array_equal(unpermute(torch.from_numpy(permute(weight, 3)), 8).numpy(), weight)


@pytest.mark.parametrize("kind", WRITABLE, ids=lambda k: k.name)
def test_quantisations(kind, tmp_path):
    model = initialise(Decoder(WIDE))
    path = write(tmp_path / "m.gguf", model, quantisation=kind)
    loaded, tokenizer = formats.load(tmp_path, dtype="float32")
    assert loaded.arch == WIDE.replace(family="llama") and tokenizer is None
    same(model, loaded, kind)
    stored = {Q.F32: torch.float32, Q.F16: torch.float16, Q.BF16: torch.bfloat16}
    fast = torch.bfloat16 if formats.native_bfloat16() else torch.float32
    assert formats.load(path)[0].dtype == stored.get(kind, fast)


@pytest.mark.parametrize("kind", [Q.Q2_K, Q.Q3_K, Q.Q4_K, Q.Q5_K, Q.Q6_K, Q.IQ4_XS, Q.IQ4_NL], ids=lambda k: k.name)
def test_k_quants_are_read_block_by_block(kind, tmp_path):
    """The package cannot write these; blocks of random codes with moderate scales are as good for reading."""
    block, block_bytes = gguf.constants.GGML_QUANT_SIZES[kind]
    raw = np.random.default_rng(0).integers(0, 256, (256, 256 // block * block_bytes), dtype=np.uint8)
    blocks = raw.reshape(256, -1, block_bytes)
    half = np.frombuffer(np.float16(0.01).tobytes(), np.uint8)
    for offset in {Q.Q2_K: (80, 82), Q.Q3_K: (108,), Q.Q4_K: (0, 2), Q.Q5_K: (0, 2), Q.Q6_K: (208,)}.get(kind, (0,)):
        blocks[..., offset : offset + 2] = half
    model = initialise(Decoder(WIDE))
    path = tmp_path / "m.gguf"
    write(path, model, raw={"blk.0.ffn_down.weight": (raw, kind), "blk.0.attn_q.weight": (raw, kind)})
    loaded, _ = formats.load(path, dtype="float32")
    wanted = gguf.quants.dequantize(raw, kind)
    assert wanted.std() > 0 and np.isfinite(wanted).all()
    assert np.array_equal(loaded.blocks[1].mixer.down.weight.detach().numpy(), wanted)
    q = loaded.blocks[0].mixer.q.weight.detach().numpy()
    assert np.array_equal(permute(q, 4), wanted)


@pytest.mark.parametrize("kind", ["llama", "qwen2", "qwen3"])
def test_kinds(kind, tmp_path):
    attention = Attention(4, 2, 8, qkv_bias=kind == "qwen2", qk_norm=kind == "qwen3")
    arch = Architecture.transformer(
        2, attention, FeedForward(64), hidden_size=32, vocab_size=64, family=kind, rope=Rope(1e6), max_positions=512
    )
    model = initialise(Decoder(arch))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    loaded, _ = formats.load(write(tmp_path / "m.gguf", model, kind))
    assert loaded.arch == arch
    same(model, loaded)


def test_rope_scalings(tmp_path):
    arch = WIDE.replace(max_positions=131072, rope=Rope(500_000.0))
    inverse, _ = frequencies(arch.rope, 64, 1)
    llama3 = {
        "rope_type": "llama3", "factor": 32.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    }
    model = initialise(Decoder(arch))
    factors = (inverse / frequencies(Rope(500_000.0, llama3), 64, 1)[0]).numpy()
    loaded, _ = formats.load(write(tmp_path / "a.gguf", model, extra=[("rope_freqs.weight", factors)]))
    assert loaded.arch.rope == Rope(500_000.0, llama3)
    odd = np.linspace(1, 7, 32, dtype=np.float32)
    loaded, _ = formats.load(write(tmp_path / "b.gguf", model, extra=[("rope_freqs.weight", odd)]))
    found, factor = frequencies(loaded.arch.rope, 64, 1)
    torch.testing.assert_close(found, inverse / torch.from_numpy(odd))
    assert factor == 1.0

    def yarn(writer):
        writer.add_rope_scaling_type(gguf.RopeScalingType.YARN)
        writer.add_rope_scaling_factor(4.0)
        writer.add_rope_scaling_orig_ctx_len(32768)

    loaded, _ = formats.load(write(tmp_path / "c.gguf", model, metadata=[yarn]))
    assert loaded.arch.rope.scaling == {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32768}


def test_bad_files(tmp_path):
    path = write(tmp_path / "m.gguf", initialise(Decoder(WIDE)))
    data = path.read_bytes()
    for size, words in ((len(data) - 64, "cut short"), (200, "cut short"), (3, "not a GGUF")):
        path.write_bytes(data[:size])
        with pytest.raises(IntarsiaError, match=words):
            formats.load(path)
    path.write_bytes(data)
    (tmp_path / "n.gguf").write_bytes(data)
    with pytest.raises(IntarsiaError, match="2 GGUF files"):
        formats.load(tmp_path)
    write(path, initialise(Decoder(SMALL)), kind="gemma7")
    with pytest.raises(IntarsiaError, match="'gemma7'; kinds that are read: llama"):
        formats.load(path)
    poisoned = initialise(Decoder(WIDE))
    poisoned.blocks[1].mixer.up.weight.data[0, 0] = float("nan")
    with pytest.raises(IntarsiaError, match=r"blk\.0\.ffn_up\.weight"):
        formats.load(write(path, poisoned))
