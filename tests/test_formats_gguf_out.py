"""GGUF out: read back by our own reader with equal logits, and by the gguf package; tokenizers; refusals."""

import gguf
import numpy as np
import pytest
import tokenizers
import torch
from tokenizers import decoders, models, normalizers, pre_tokenizers

from intarsia import formats
from intarsia.arch import Architecture, Attention, Experts, FeedForward, Linear, Mamba1, Mamba2, Rope
from intarsia.base.errors import IntarsiaError
from intarsia.commands.export import TARGETS
from intarsia.formats import writer
from intarsia.formats.gguf_tokenizer import PRE_TOKENIZERS, pre_tokenizer
from intarsia.model import Decoder, initialise

LLAMA3 = {
    "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64, "beta_fast": 8.0}
ATTENTION, SWIGLU, PLAIN = Attention(4, 2, 16), FeedForward(96), FeedForward(96, "relu2", gated=False)
GROUPED, SINGLE, WIDE = (Mamba2(8, size, 16, num_groups=n) for size, n in ((8, 2), (16, 1), (16, 2)))
NOPE = Attention(4, 2, 32, rope=False)
MODELS = {
    "llama": ((ATTENTION, SWIGLU) * 2, {"rope": Rope(50_000.0)}),
    "llama, llama3 scaling, tied": (
        (ATTENTION, SWIGLU) * 2, {"rope": Rope(500_000.0, LLAMA3), "tied_embeddings": True, "max_positions": 65536},
    ),
    "llama, linear scaling": ((ATTENTION, SWIGLU), {"rope": Rope(10_000.0, {"rope_type": "linear", "factor": 3.0})}),
    "llama, yarn scaling": ((ATTENTION, SWIGLU), {"rope": Rope(10_000.0, YARN)}),
    "qwen2": ((Attention(4, 2, 16, qkv_bias=True), SWIGLU) * 2, {"family": "qwen2"}),
    "qwen3": ((Attention(4, 2, 32, qk_norm=True), SWIGLU) * 2, {"family": "qwen3"}),
    "nemotron_h": ((GROUPED, PLAIN, GROUPED, NOPE, PLAIN), {"rope": None, "family": "nemotron_h"}),
    "granitehybrid": (
        (SINGLE, SWIGLU, ATTENTION, SWIGLU, SINGLE, SWIGLU),
        {"rope": Rope(77_000.0), "tied_embeddings": True, "family": "granitemoehybrid"},
    ),
    "granitehybrid, no positions": (
        (Attention(4, 4, 16, rope=False), SWIGLU, WIDE, SWIGLU), {"rope": None, "family": "granitemoehybrid"},
    ),
}


def drawn(blocks, fields, vocab_size=97):
    model = initialise(Decoder(Architecture(64, vocab_size, blocks, **fields)), std=0.2).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 1:
                parameter.add_(torch.randn_like(parameter) * 0.1)
    return model


@torch.no_grad()
def difference(one, other):
    ids = torch.randint(0, one.arch.vocab_size, (2, 40), generator=torch.Generator().manual_seed(1))
    a, b = one(ids).float(), other(ids).float()
    assert a.abs().max() > 0.5
    return float((a - b).abs().max())


@pytest.mark.parametrize("name", MODELS)
def test_read_back_with_equal_logits(name, tmp_path):
    ours = drawn(*MODELS[name])
    path = formats.save_gguf(ours, tmp_path / "m.gguf", quantisation="f32")
    back, _ = formats.load(path)
    assert back.dtype == torch.float32 and back.arch == ours.arch
    assert difference(ours, back) < 1e-5
    reader = gguf.GGUFReader(path)
    assert reader.fields["general.architecture"].contents() == name.split(",")[0]


@pytest.mark.parametrize("mamba", [Mamba2(4, 16, 16, num_groups=4, conv_bias=False), Mamba2(8, 8, 16, num_groups=4)])
def test_narrow_blocks_are_filled_up_to_what_llama_cpp_loads(mamba, tmp_path):
    ours = drawn((mamba, SWIGLU, ATTENTION, SWIGLU), {"rope": Rope(77_000.0), "family": "granitemoehybrid"})
    back, _ = formats.load(formats.save_gguf(ours, tmp_path / "m.gguf", quantisation="f32"))
    made = back.arch.blocks[0]
    assert (made.inner_size, made.conv_bias, made.groups_of_norm) == (128, True, made.num_groups)
    assert made.num_heads // made.num_groups == mamba.num_heads // mamba.num_groups
    assert difference(ours, back) < 1e-5


@pytest.mark.parametrize("quantisation, near", [("bf16", 2e-2), ("q8_0", 5e-2)])
@pytest.mark.parametrize("name", ["llama", "nemotron_h", "granitehybrid"])
def test_quantisations(name, quantisation, near, tmp_path):
    ours = drawn(*MODELS[name])
    path = formats.save_gguf(ours, tmp_path / "m.gguf", quantisation=quantisation)
    back, _ = formats.load(path, dtype="float32")
    kinds = {t.name: t.tensor_type.name for t in gguf.GGUFReader(path).tensors}
    assert kinds["token_embd.weight"] == quantisation.upper()
    kept = [k for n, k in kinds.items() if "norm" in n or n.endswith(("ssm_a", "ssm_d", "conv1d.weight", ".bias"))]
    assert set(kept) == {"F32"}
    stored = dict(back.named_parameters())
    for parameter_name, parameter in ours.named_parameters():
        off = (stored[parameter_name] - parameter).abs().max() / parameter.abs().max().clamp(min=1e-6)
        assert off < near / 4, parameter_name
    with torch.no_grad():
        ids = torch.arange(40)[None] % 97
        p, q = (m(ids).log_softmax(-1) for m in (ours, back))
    assert float((p.exp() * (p - q)).sum(-1).mean()) < near


def test_rows_too_short_for_blocks(tmp_path):
    model = drawn((ATTENTION, FeedForward(40)), {})
    path = formats.save_gguf(model, tmp_path / "m.gguf", quantisation="q8_0")
    kinds = {t.name: t.tensor_type.name for t in gguf.GGUFReader(path).tensors}
    assert (kinds["blk.0.ffn_down.weight"], kinds["blk.0.ffn_up.weight"]) == ("BF16", "Q8_0")


def test_what_llama_cpp_asks_for(tmp_path):
    """Fields and shapes of llama.cpp's loader: heads in the time-step rank, 0 for layers without the part, A itself."""
    ours = drawn(*MODELS["nemotron_h"])
    reader = gguf.GGUFReader(formats.save_gguf(ours, tmp_path / "m.gguf"))
    field = {k.removeprefix("nemotron_h."): f.contents() for k, f in reader.fields.items()}
    assert field["attention.head_count_kv"] == [0, 0, 0, 2, 0]
    assert field["feed_forward_length"] == [0, 96, 0, 0, 96]
    assert (field["ssm.time_step_rank"], field["ssm.inner_size"], field["ssm.group_count"]) == (8, 64, 2)
    tensors = {t.name: t for t in reader.tensors}
    shapes = {name: tuple(int(n) for n in t.shape) for name, t in tensors.items()}  # ggml's order: columns first
    assert shapes["blk.0.ssm_in.weight"] == (64, 64 + 64 + 64 + 8)
    assert shapes["blk.0.ssm_conv1d.weight"] == (4, 128)
    assert shapes["blk.0.ssm_a"] == shapes["blk.0.ssm_d"] == (1, 8)
    assert shapes["blk.0.ssm_dt.bias"] == (8,) and shapes["blk.0.ssm_norm.weight"] == (32, 2)
    wanted = -ours.blocks[0].mixer.A_log.detach().exp().numpy()
    np.testing.assert_allclose(tensors["blk.0.ssm_a"].data.ravel(), wanted, rtol=1e-6)
    assert {"blk.1.attn_norm.weight", "blk.1.ffn_up.weight", "blk.3.attn_q.weight"} <= set(shapes)
    hybrid = drawn(*MODELS["granitehybrid"])
    reader = gguf.GGUFReader(formats.save_gguf(hybrid, tmp_path / "g.gguf", quantisation="f32"))
    assert reader.fields["granitehybrid.rope.scaling.finetuned"].contents() is True
    stored = next(t for t in reader.tensors if t.name == "blk.1.attn_q.weight").data
    halves = hybrid.blocks[2].mixer.q.weight.detach().numpy().reshape(4, 2, 8, 64)  # heads, halves, pairs, D
    assert np.array_equal(stored.reshape(4, 8, 2, 64), halves.swapaxes(1, 2))


def byte_level(name):
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    merges = [("h", "e"), ("l", "l"), ("he", "ll"), ("Ġ", "w"), ("hell", "o"), ("1", "2")]
    tokens = ["<|end|>", *alphabet, *("".join(m) for m in merges)]
    model = models.BPE({t: i for i, t in enumerate(tokens)}, merges, ignore_merges=name == "llama-bpe")
    backend = tokenizers.Tokenizer(model)
    backend.pre_tokenizer, backend.decoder = pre_tokenizer(None, name), decoders.ByteLevel()
    backend.add_special_tokens(["<|end|>"])
    backend.add_tokens(["<user>"])
    return formats.Tokenizer(backend, {"eos_token": "<|end|>", "chat_template": "{{ x }}"})


TEXT = "hello world's 123 hello,\n\n  été 12.5% <user> 你好 <|end|>"


@pytest.mark.parametrize("name", PRE_TOKENIZERS)
def test_byte_level_tokenizers_come_back(name, tmp_path):
    tokenizer = byte_level(name)
    model = drawn((ATTENTION, SWIGLU), {}, vocab_size=tokenizer.vocab_size + 5)
    path = formats.save_gguf(model, tmp_path / "m.gguf", tokenizer)
    assert gguf.GGUFReader(path).fields["tokenizer.ggml.pre"].contents() == name
    _, back = formats.load(path)
    assert back.encode(TEXT) == tokenizer.encode(TEXT) and back.decode(back.encode(TEXT)) == TEXT
    assert (back.eos_id, back.chat_template) == (tokenizer.eos_id, "{{ x }}")


def test_sentencepiece_tokenizers_come_back(tmp_path):
    merges = [("▁", "h"), ("l", "o"), ("l", "lo"), ("▁h", "e"), ("▁he", "llo")]
    base = ["<unk>", "<s>", "</s>", *(f"<0x{b:02X}>" for b in range(256)), *"▁helowrd1'"]
    tokens = [*base, *("".join(m) for m in merges)]
    backend = tokenizers.Tokenizer(
        models.BPE({t: i for i, t in enumerate(tokens)}, merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True)
    )
    backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    backend.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", left=1)]
    )
    backend.add_special_tokens(["<unk>", "<s>", "</s>"])
    tokenizer = formats.Tokenizer(backend, {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"})
    model = drawn((ATTENTION, SWIGLU), {}, vocab_size=tokenizer.vocab_size)
    _, back = formats.load(formats.save_gguf(model, tmp_path / "m.gguf", tokenizer))
    for text in ("hello world", "hello hello 1 é", "lo  hello'"):
        assert back.encode(text) == tokenizer.encode(text)
        assert back.decode(back.encode(text)) == text
    assert (back.bos_id, back.eos_id) == (1, 2)


def test_unknown_rules_are_refused(tmp_path):
    tokenizer = byte_level("gpt-2")
    tokenizer.backend.pre_tokenizer = pre_tokenizers.Whitespace()
    model = drawn((ATTENTION, SWIGLU), {}, vocab_size=tokenizer.vocab_size)
    with pytest.raises(IntarsiaError, match="cuts words by a rule that has no name"):
        formats.save_gguf(model, tmp_path / "m.gguf", tokenizer)
    words = formats.Tokenizer(tokenizers.Tokenizer(models.WordLevel({"a": 0}, unk_token="a")))
    with pytest.raises(IntarsiaError, match="of the kind WordLevel"):
        formats.save_gguf(model, tmp_path / "m.gguf", words)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "blocks, fields, words",
    [
        ((ATTENTION, SWIGLU, ATTENTION, FeedForward(8)), {}, "differ in width"),
        ((ATTENTION, Linear()), {}, "not an alternation"),
        ((Attention(4, 2, 16, sliding_window=5), SWIGLU), {}, "sliding windows"),
        ((ATTENTION, FeedForward(96, "gelu")), {}, "not SwiGLU"),
        ((GROUPED, PLAIN, Mamba2(4, 8, 8)), {"rope": None}, "no kind for this hybrid"),
        ((ATTENTION, SWIGLU, Mamba2(8, 24, 16), SWIGLU), {}, "cannot be filled up to 128"),
        ((ATTENTION, SWIGLU, Mamba2(8, 16, 16, num_groups=2, norm_groups=1), SWIGLU), {}, "1 groups of channels"),
        ((GROUPED, Experts(4, 1, 8, shared_size=8)), {"rope": None}, "experts are not written"),
        ((GROUPED, FeedForward(96, "gelu", gated=False)), {"rope": None}, "not squared ReLU"),
        ((Mamba2(8, 8, 16, dt_min=0.1), PLAIN), {"rope": None}, "no bounds of its time steps"),
        ((Mamba1(64, time_step_rank=4),), {"rope": None}, "no kind for this model"),
    ],
)
def test_what_llama_cpp_cannot_read_is_refused(blocks, fields, words, tmp_path):
    with pytest.raises(IntarsiaError) as caught:
        formats.save_gguf(drawn(blocks, fields), tmp_path / "m.gguf")
    assert words in str(caught.value)


def test_export(tmp_path):
    ours = drawn(*MODELS["granitehybrid"])
    folder = formats.save(ours, tmp_path / "child")
    formats.export(folder, tmp_path / "m.gguf", to="gguf", quantisation="f32")
    assert difference(ours, formats.load(tmp_path / "m.gguf")[0]) < 1e-5
    formats.export(tmp_path / "m.gguf", tmp_path / "back")
    assert difference(ours, formats.load(tmp_path / "back")[0]) < 1e-5
    for out, options, words in (
        ("x", {}, "ends in .gguf"), ("x.gguf", {"quantisation": "q2_k"}, "f32, bf16, q8_0"),
    ):  # fmt: skip
        with pytest.raises(IntarsiaError, match=words):
            formats.export(folder, tmp_path / out, to="gguf", **options)
    with pytest.raises(IntarsiaError, match="only gguf"):
        formats.export(folder, tmp_path / "x", to="hf", quantisation="q8_0")
    assert TARGETS == writer.TARGETS
