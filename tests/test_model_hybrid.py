"""A hybrid of all block kinds: a cache, padding and packing change no logit of a real token."""

import pytest
import torch

from intarsia.arch import Architecture, Attention, Experts, FeedForward, Linear, Mamba1, Mamba2, Rope, block_cache_bytes
from intarsia.base.errors import IntarsiaError
from intarsia.model import Cache, Decoder, initialise

BLOCKS = (
    Mamba2(4, 8, 16, num_groups=2, chunk_size=8), FeedForward(40, activation="relu2", gated=False),
    Attention(4, 2, 8, rope=False), Experts(6, 2, 24, shared_size=16, num_expert_groups=3, groups_per_token=2),
    Mamba1(48, state_size=8, time_step_rank=4), Attention(4, 1, 8, sliding_window=5), Linear(),
    Mamba2(6, 8, 8, conv_kernel=3, conv_bias=False, proj_bias=True, norm_groups=1, dt_max=0.5),
    Attention(2, 2, 16, qkv_bias=True, qk_norm=True), FeedForward(24),
)  # fmt: skip
HYBRID = Architecture(hidden_size=32, vocab_size=61, blocks=BLOCKS, rope=Rope(), max_positions=64, family="intarsia")
TOLERANCE = {"atol": 1e-5, "rtol": 0}
PADDINGS = {
    "left": ["...xxxxxxxxxx", "xxxxxxxxxxxxx", "..........xxx"],
    "right": ["xxxxxxxxxx...", "xxxxxxxxxxxxx", "x............"],
    "between": ["xx..xxxx.xxxx", "x.x.x.x.x.x.x", "..xxx......x."],
}


@pytest.fixture(scope="module")
def model():
    return initialise(Decoder(HYBRID), seed=1, std=0.2).eval()


def draw(rows, length, seed=3):
    return torch.randint(0, 61, (rows, length), generator=torch.Generator().manual_seed(seed))


def pattern(texts):
    return torch.tensor([[letter == "x" for letter in text] for text in texts])


def fresh_cache(batch, length):
    """A cache whose memory holds NaN where nothing may be read before it is written."""
    cache = Cache(HYBRID, batch, length)
    for block, pair in zip(BLOCKS, cache.entries):
        for tensor in pair if isinstance(block, Attention) else ():
            tensor.fill_(torch.nan)
    return cache


@torch.no_grad()
def alone(model, ids):
    """Logits of one text without anything around it."""
    return model(ids[None])[0]


@pytest.mark.parametrize("chunks", [(13, *[1] * 10), (6, 11, 1, 5), (1, 22), (2, 2, 2, 2, 15), (1,) * 23])
@torch.no_grad()
def test_prefill_and_decoding_equal_one_pass(model, chunks):
    ids, cache = draw(2, 23), fresh_cache(2, 23)
    pieces = [model(part, cache) for part in ids.split(chunks, dim=1)]
    torch.testing.assert_close(torch.cat(pieces, 1), model(ids), **TOLERANCE)


@pytest.mark.parametrize("texts", PADDINGS.values(), ids=PADDINGS)
@torch.no_grad()
def test_padding_changes_no_real_logit(model, texts):
    ids, keep = draw(3, 13), pattern(texts)
    out = model(ids, keep=keep)
    assert out.isfinite().all()
    for row in range(3):
        torch.testing.assert_close(out[row, keep[row]], alone(model, ids[row, keep[row]]), **TOLERANCE)


@pytest.mark.parametrize("texts", PADDINGS.values(), ids=PADDINGS)
@pytest.mark.parametrize("chunks", [(13,), (5, 8), (2, 1, 9, 1), (1,) * 13])
@pytest.mark.parametrize("through", ["argument", "cache"])
@torch.no_grad()
def test_padding_is_gone_from_the_cache_too(model, texts, chunks, through):
    """Padded prompts in one call or several, then real tokens one at a time: each row is what it is alone."""
    ids, keep = draw(3, 20), torch.cat([pattern(texts), torch.ones(3, 7, dtype=torch.bool)], 1)
    cache = fresh_cache(3, 20)
    if through == "cache":
        cache.keep = keep[:, :16]  # what comes after is real
    out, start = [], 0
    for size in (*chunks, *[1] * 7):
        part = slice(start, start + size)
        out.append(model(ids[:, part], cache, keep=keep[:, part] if through == "argument" else None))
        start += size
    out = torch.cat(out, 1)
    for row in range(3):
        torch.testing.assert_close(out[row, keep[row]], alone(model, ids[row, keep[row]]), **TOLERANCE)


DOCUMENTS = [(7, 1, 9, 3), (20,), (1, 1, 18), (9, 11)]


def segments_of(lengths):
    return torch.cat([torch.full((n,), number, dtype=torch.int32) for number, n in enumerate(lengths)])


@torch.no_grad()
def test_packed_documents_are_as_if_alone(model):
    ids, segments = draw(4, 20), torch.stack([segments_of(row) for row in DOCUMENTS])
    out = model(ids, segments=segments)
    for row, lengths in enumerate(DOCUMENTS):
        wanted = torch.cat([alone(model, part) for part in ids[row].split(lengths)])
        torch.testing.assert_close(out[row], wanted, **TOLERANCE)


@torch.no_grad()
def test_packing_and_padding_together(model):
    ids, segments = draw(4, 20), torch.stack([segments_of(row) for row in DOCUMENTS])
    keep = pattern(["..xxxxx.xxxxxxxx.x.x", "x" * 17 + "...", ".xxxxx.xxxxxxxxxxxxx", "xxxxx" * 3 + "....."])
    out = model(ids, segments=segments, keep=keep)
    for row in range(4):
        for number in segments[row].unique():
            here = (segments[row] == number) & keep[row]
            if here.any():
                torch.testing.assert_close(out[row, here], alone(model, ids[row, here]), **TOLERANCE)


def test_gradients_of_packed_and_padded_rows_are_those_of_the_texts(model):
    ids, keep = draw(1, 20), pattern(["..xxxxx.xxxxxxxx.xxx"])
    segments = segments_of((10, 10))[None]
    weigh = torch.randn(61, generator=torch.Generator().manual_seed(5))

    def gradients(loss):
        return torch.autograd.grad(loss, list(model.parameters()), allow_unused=True)

    packed = gradients((model(ids, segments=segments, keep=keep) @ weigh)[keep].square().sum())
    texts = [ids[:, :10][keep[:, :10]][None], ids[:, 10:][keep[:, 10:]][None]]
    apart = gradients(sum((model(text) @ weigh).square().sum() for text in texts))
    for (name, _), a, b in zip(model.named_parameters(), packed, apart):
        if b is None:
            assert a is None or not a.any(), name
        else:
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5 * float(b.abs().max()), msg=name)


@torch.no_grad()
def test_the_stream_may_be_cut_anywhere(model):
    ids, cache = draw(2, 9), fresh_cache(2, 12)
    x = model.embed_tokens(ids)
    for start, stop in [(0, 1), (1, 5), (5, len(BLOCKS))]:
        assert cache.length == 0
        x = model.run(x, start, stop, cache)
    assert cache.length == 9
    torch.testing.assert_close(model.head_logits(x), model(ids), **TOLERANCE)
    ids, keep = draw(2, 9), pattern(["..xxxxxxx", "xxx.xxx.x"])
    rows = model.rows(ids, keep=keep)
    x = model.run(model.run(model.embed_tokens(ids), 0, 4, rows=rows), 4, rows=rows)
    torch.testing.assert_close(model.head_logits(x)[keep], model(ids, keep=keep)[keep], **TOLERANCE)


@torch.no_grad()
def test_attention_without_positions_does_not_see_them():
    blocks = (Attention(4, 2, 8, rope=False),)
    model = initialise(Decoder(HYBRID.replace(blocks=blocks)), std=0.3)
    none = initialise(Decoder(HYBRID.replace(blocks=blocks, rope=None)), std=0.3)
    turned = initialise(Decoder(HYBRID.replace(blocks=(Attention(4, 2, 8),))), std=0.3)
    ids = draw(1, 9)
    assert torch.equal(model(ids), none(ids))
    assert not torch.allclose(model(ids), turned(ids), atol=1e-3)
    swapped = ids[:, [3, 1, 2, 0, 4, 5, 6, 7, 8]]  # a set of tokens before the last one
    torch.testing.assert_close(model(ids)[:, -1], model(swapped)[:, -1], **TOLERANCE)


@pytest.mark.parametrize("dtype, size", [(torch.float32, 4), (torch.bfloat16, 2)])
@pytest.mark.parametrize("length", [3, 64])
def test_a_cache_takes_the_bytes_that_are_counted(dtype, size, length):
    cache = Cache(HYBRID, batch=3, max_length=length, dtype=dtype)
    assert cache.bytes == sum(block_cache_bytes(b, length, 3, size) for b in BLOCKS)


def test_segments_with_a_cache_and_wrong_shapes_are_sentences(model):
    ids = draw(1, 4)
    with pytest.raises(IntarsiaError, match="packed documents without a cache"):
        model(ids, Cache(HYBRID, 1, 4), segments=torch.zeros(1, 4, dtype=torch.int32))
    with pytest.raises(IntarsiaError, match="must not decrease"):
        model(ids, segments=torch.tensor([[0, 1, 0, 0]]))
    with pytest.raises(IntarsiaError, match="do not fit tokens of shape"):
        model(ids, keep=torch.ones(1, 3, dtype=torch.bool))
