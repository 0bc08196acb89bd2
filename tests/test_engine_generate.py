"""Generation against the plain forward pass, and what it refuses."""

import copy
import sys

import pytest
import torch

from intarsia.arch import Architecture, Attention, FeedForward, Linear
from intarsia.base.errors import IntarsiaError
from intarsia.engine import generate
from intarsia.model import Cache, Decoder, initialise


@pytest.fixture(scope="module")
def model():
    blocks = (Attention(4, 2, 8), FeedForward(48), Linear(), Attention(4, 1, 8), FeedForward(32))
    arch = Architecture(hidden_size=32, vocab_size=97, blocks=blocks, tied_embeddings=True, max_positions=400)
    return initialise(Decoder(arch), std=0.3).eval()


@torch.no_grad()
def greedy_without_cache(model, ids, count):
    ids = list(ids)
    for _ in range(count):
        ids.append(model(torch.tensor([ids]))[0, -1].argmax().item())
    return ids[-count:]


def test_greedy_equals_the_forward_pass_without_cache(model):
    prompt = [3, 14, 15, 92, 65]
    expected = greedy_without_cache(model, prompt, 290)  # past the first 256 kept positions
    assert len(set(expected)) > 3
    assert generate(model, prompt, 290) == expected


def test_a_batch_is_its_rows(model):
    prompts = [[1, 2, 3], [9, 8, 7], [50, 60, 70]]
    together = generate(model, prompts, 12)
    assert together == [generate(model, p, 12) for p in prompts]
    assert generate(model, torch.tensor(prompts), 12) == together


def test_rows_end_with_their_stop_token(model):
    whole = generate(model, [[1, 2, 3], [9, 8, 7]], 30)
    stop = whole[0][4]
    cut = generate(model, [[1, 2, 3], [9, 8, 7]], 30, stop_ids=(stop,))
    for row, full in zip(cut, whole):
        assert row == (full[: full.index(stop) + 1] if stop in full else full)


def test_sampling_follows_seed_and_filters(model):
    prompt, seen = [5, 6, 7], []
    draws = [generate(model, prompt, 20, temperature=1.5, seed=s) for s in (0, 0, 1)]
    assert draws[0] == draws[1] != draws[2]
    greedy = generate(model, prompt, 20, on_token=seen.append)
    assert [row[0] for row in seen] == greedy
    assert generate(model, prompt, 20, temperature=2.0, top_k=1) == greedy
    assert generate(model, prompt, 20, temperature=2.0, top_p=1e-6) == greedy


def test_sampled_frequencies_match_the_softmax(model):
    prompt = torch.tensor([[5, 6, 7]]).expand(4000, -1)
    drawn = torch.tensor(generate(model, prompt, 1, temperature=1.3, top_k=5)).flatten()
    with torch.no_grad():
        top = (model(prompt[:1])[0, -1] / 1.3).topk(5)
    assert set(drawn.tolist()) <= set(top.indices.tolist())
    for token, share in zip(top.indices, top.values.softmax(-1)):
        assert abs((drawn == token).float().mean() - share) < 4 * (share * (1 - share) / 4000).sqrt() + 1e-6


def test_training_still_works_after_generation():
    """Kept rope tables made by generation must not be inference tensors."""
    arch = Architecture(hidden_size=16, vocab_size=20, blocks=(Attention(2, 1, 8),), tied_embeddings=True)
    model = initialise(Decoder(arch))
    generate(model, [1, 2], 2)
    model(torch.tensor([[1, 2, 3]])).sum().backward()
    assert model.blocks[0].mixer.q.weight.grad.abs().sum() > 0


@pytest.mark.parametrize(
    "ids, settings, sentence",
    [
        ([], {}, "no tokens"),
        ([1, 97], {}, "0 to 96"),
        ([[1, 2], [3]], {}, "one length"),
        ([1] * 390, {}, "context is 400"),
        ([1], {"top_p": 0.0}, "top_p"),
        ([1], {"temperature": -1}, "temperature"),
    ],
)
def test_bad_requests_are_sentences(model, ids, settings, sentence):
    with pytest.raises(IntarsiaError, match=sentence):
        generate(model, ids, 20, **settings)


def test_bfloat16_decodes_what_it_reads(model):
    """Single-token steps take another product than the prompt; they must agree to rounding."""
    half = Decoder(model.arch, torch.bfloat16)
    half.load_state_dict(model.state_dict())
    ids = torch.randint(97, (1, 40), generator=torch.Generator().manual_seed(1))
    from intarsia.model import Cache

    with torch.inference_mode():
        cache = Cache(half.arch, 1, 40, torch.bfloat16)
        steps = torch.cat([half(ids[:, i : i + 1], cache) for i in range(40)], 1).float()
        truth = model(ids)
    error = (steps - truth).abs().mean() / truth.abs().mean()
    assert error < 0.05


def test_a_prompt_read_in_pieces(model, monkeypatch):
    half = copy.deepcopy(model).to(torch.bfloat16)
    module = sys.modules["intarsia.engine.generate"]
    if not module._reads_pieces(half):
        pytest.skip("no native attention here")
    prompt = torch.randint(97, (2, 150), generator=torch.Generator().manual_seed(0))
    found, seen = [], []
    attend = Cache.attend
    monkeypatch.setattr(Cache, "attend", lambda self, i, q, *rest: seen.append(q.shape[2]) or attend(self, i, q, *rest))
    for piece in (1000, 64):
        monkeypatch.setattr(module, "PIECE", piece)
        found.append(module.next_logits(half, prompt, Cache(half.arch, 2, 150, torch.bfloat16)).float())
    assert seen == [150, 150, 64, 64, 64, 64, 22, 22]
    assert (found[0] - found[1]).abs().max() < 0.03 * found[0].abs().max()
