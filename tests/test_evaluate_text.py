"""Likelihoods, bits per byte and distance from a parent, against plain definitions in float64."""

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from intarsia.arch import Architecture, Attention, FeedForward
from intarsia.base.errors import IntarsiaError
from intarsia.evaluate import bits_per_byte, compare, hidden_states, shorten
from intarsia.evaluate.likelihood import token_scores
from intarsia.evaluate.text import ratio
from intarsia.model import Decoder, initialise


def build(seed=0, vocab=83):
    arch = Architecture.transformer(
        2, Attention(4, 2, 8), FeedForward(48), hidden_size=32, vocab_size=vocab, tied_embeddings=True, max_positions=64
    )
    return initialise(Decoder(arch), seed=seed, std=0.3).eval()


@pytest.fixture(scope="module")
def model():
    return build()


@torch.no_grad()
def nll_of(model, ids):
    """-log p of ids[1:] in float64, from one unbatched pass."""
    return F.cross_entropy(model(torch.tensor([ids[:-1]]))[0].double(), torch.tensor(ids[1:]), reduction="none")


def random_ids(count, seed=0):
    return torch.randint(83, (count,), generator=torch.Generator().manual_seed(seed)).tolist()


def test_padding_and_batching_change_no_score(model):
    sequences = [random_ids(n, n) for n in (2, 30, 7, 7, 19, 50)]
    firsts, done = [1, 25, 3, 1, 18, 20], []
    for size in (1, 64, 4096):
        scores = token_scores(model, sequences, firsts, done.append, batch_tokens=size)
        for ids, first, (nll, hits) in zip(sequences, firsts, scores):
            torch.testing.assert_close(nll.double(), nll_of(model, ids)[first - 1 :], rtol=1e-4, atol=1e-4)
            best = model(torch.tensor([ids[:-1]]))[0].argmax(-1)
            assert torch.equal(hits, (best == torch.tensor(ids[1:]))[first - 1 :])
    assert sum(done) == 3 * len(sequences)


def test_bits_per_byte_cuts_windows_and_counts_every_token_once(model):
    long, short = np.array(random_ids(45)), np.array(random_ids(9, 1))
    found = bits_per_byte(model, {"a": [(long, 100), (short, 31)], "b": [(short, 20)]}, length=16)
    parts = [long[0:17], long[16:33], long[32:45]]
    bits = [sum(nll_of(model, p.tolist()).sum().item() for p in parts) / math.log(2)]
    bits.append(nll_of(model, short.tolist()).sum().item() / math.log(2))
    assert found["a"]["value"] == pytest.approx(sum(bits) / 131, rel=1e-4)
    assert found["b"] == {"value": pytest.approx(bits[1] / 20, rel=1e-4), "se": None, "n": 1}
    assert found["all"]["n"] == 3
    assert found["a"]["se"] == pytest.approx(
        ratio(np.array(bits), np.array([100.0, 31.0]))["se"], rel=1e-3
    )


def test_the_separator_stands_before_and_is_not_scored(model):
    ids = random_ids(12)
    found = bits_per_byte(model, {"a": [(np.array([*ids, 82]), 40)]}, separator=82)
    assert found["a"]["value"] == pytest.approx(nll_of(model, [82, *ids]).sum().item() / math.log(2) / 40, rel=1e-4)


def test_a_uniform_model_needs_log2_of_its_vocabulary(model):
    flat = build()
    with torch.no_grad():
        flat.norm.weight.zero_()
    found = bits_per_byte(flat, {"a": [(np.array(random_ids(33)), 32)] * 3})
    assert found["a"]["value"] == pytest.approx(math.log2(83), rel=1e-6)
    assert found["a"]["se"] == pytest.approx(0, abs=1e-6)


def test_the_error_of_a_ratio_matches_resampling():
    generator = np.random.default_rng(0)
    sizes = generator.uniform(50, 500, 400)
    bits = sizes * generator.normal(1.2, 0.3, 400)
    picks = generator.integers(0, 400, (2000, 400))
    assert ratio(bits, sizes)["se"] == pytest.approx((bits[picks].sum(1) / sizes[picks].sum(1)).std(), rel=0.1)


def test_shorten_counts_the_bytes_of_what_is_left():
    class Bytes:
        def decode(self, ids):
            return bytes(int(i) for i in ids).decode("utf-8", errors="replace")

    text = "naïve words".encode()
    ids, size = shorten((np.frombuffer(text, np.uint8), len(text)), 5, Bytes())
    assert (len(ids), size) == (5, 5)
    assert shorten((ids, 5), 10, Bytes())[0] is ids


@torch.no_grad()
def test_compare_matches_float64(model):
    child, tokens = build(seed=1), torch.tensor(random_ids(120)).view(6, 20)
    found = compare(model, child, tokens, batch_tokens=45)
    p, q = model(tokens).double().log_softmax(-1), child(tokens).double().log_softmax(-1)
    rows = (p.exp() * (p - q)).sum(-1).mean(1)
    same = (p.argmax(-1) == q.argmax(-1)).double().mean(1)
    assert found["kl"]["value"] == pytest.approx(rows.mean().item(), rel=1e-5)
    assert found["kl"]["se"] == pytest.approx(rows.std().item() / 6**0.5, rel=1e-4)
    assert found["top1"]["value"] == pytest.approx(same.mean().item())
    assert found["kl"]["n"] == 6
    known = compare(model, child, tokens, parent_hidden=hidden_states(model, tokens, 45))
    assert known["kl"]["value"] == pytest.approx(found["kl"]["value"], rel=1e-6)


def test_a_model_is_at_no_distance_from_itself_in_bfloat16(model):
    half = Decoder(model.arch, torch.bfloat16)
    half.load_state_dict(model.state_dict())
    found = compare(half, half, torch.tensor(random_ids(40)).view(2, 20))
    assert found["kl"]["value"] == pytest.approx(0, abs=1e-6)
    assert found["top1"]["value"] == 1


def test_bad_input_is_a_sentence(model):
    with pytest.raises(IntarsiaError, match="another tokenizer"):
        token_scores(model, [[1, 83]], [1])
    with pytest.raises(IntarsiaError, match="context of 64"):
        token_scores(model, [[1] * 70], [1])
    with pytest.raises(IntarsiaError, match="no held-out text"):
        bits_per_byte(model, {"a": [(np.array([3]), 4)]})
    with pytest.raises(IntarsiaError, match="cannot be compared"):
        compare(model, build(vocab=84), torch.zeros(1, 4, dtype=torch.int64))
