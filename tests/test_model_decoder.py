"""The decoder: a cache changes nothing, absent and unequal blocks are ordinary."""

import pytest
import torch

from intarsia.arch import Architecture, Attention, FeedForward, Linear, Rope, parameters
from intarsia.base.errors import IntarsiaError
from intarsia.model import Cache, Decoder, initialise

YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16}
MIXED = Architecture(
    hidden_size=32,
    vocab_size=61,
    blocks=(
        FeedForward(24), Attention(4, 2, 8), Linear(bias=True), Attention(4, 1, 8, sliding_window=5),
        FeedForward(40, activation="relu2", gated=False, bias=True), Attention(2, 2, 16, qkv_bias=True, qk_norm=True),
    ),
    rope=Rope(10_000.0, YARN),
    max_positions=64,
)
UNIFORM = Architecture.transformer(
    2, Attention(4, 2, 8), FeedForward(48), hidden_size=32, vocab_size=61, tied_embeddings=True
)


def build(arch, seed=0):
    return initialise(Decoder(arch), seed=seed, std=0.2).eval()


@pytest.mark.parametrize("arch", [UNIFORM, MIXED], ids=["uniform", "mixed"])
@pytest.mark.parametrize("chunks", [(7, 1, 1, 1, 1, 1, 1), (3, 6, 4), (13,)])
@torch.no_grad()
def test_prefill_and_decoding_equal_one_pass(arch, chunks):
    model = build(arch)
    ids = torch.randint(0, 61, (2, 13), generator=torch.Generator().manual_seed(3))
    cache = Cache(arch, batch=2, max_length=13)
    pieces = [model(part, cache) for part in ids.split(chunks, dim=1)]
    assert cache.length == 13
    torch.testing.assert_close(torch.cat(pieces, 1), model(ids), atol=1e-5, rtol=0)


@torch.no_grad()
def test_the_stream_may_be_cut_anywhere():
    model = build(MIXED)
    ids = torch.randint(0, 61, (1, 9))
    x = model.run(model.embed_tokens(ids), 0, 3)
    torch.testing.assert_close(model.head_logits(model.run(x, 3)), model(ids), atol=0, rtol=0)


@pytest.mark.parametrize("arch", [UNIFORM, MIXED], ids=["uniform", "mixed"])
def test_parameters_are_those_counted(arch):
    assert sum(p.numel() for p in Decoder(arch, device="meta").parameters()) == parameters(arch)


def test_a_full_cache_is_a_sentence():
    model, cache = build(UNIFORM), Cache(UNIFORM, 1, 4)
    with pytest.raises(IntarsiaError, match="holds 4 tokens and was asked for 5"):
        model(torch.zeros(1, 5, dtype=torch.long), cache)


def test_fresh_weights_depend_on_the_seed_and_not_on_the_blocks_around():
    names = dict(build(MIXED).named_parameters())
    shorter = dict(build(MIXED.replace(blocks=MIXED.blocks[:2])).named_parameters())
    assert torch.equal(names["blocks.1.mixer.q.weight"], shorter["blocks.1.mixer.q.weight"])
    other = dict(build(MIXED, seed=1).named_parameters())
    assert not torch.equal(names["blocks.1.mixer.q.weight"], other["blocks.1.mixer.q.weight"])
