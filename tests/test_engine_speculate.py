"""Speculative decoding: the same tokens at temperature 0, the same distribution above it, whoever guesses."""

import itertools

import numpy as np
import pytest
import torch
from scipy.stats import chisquare

from engine_toys import EVERYTHING, HYBRID, LLAMA, engine, mixed_requests, prompt, results, tiny
from intarsia.arch import Architecture, Attention, Mamba2
from intarsia.base.errors import IntarsiaError
from intarsia.engine import Engine, Request, Sampling
from intarsia.engine.request import Handle
from intarsia.engine.sampling import draw
from intarsia.engine.sequence import Sequence
from intarsia.engine.speculate import Draft, LookupDrafter, verified
from intarsia.model import Decoder, initialise

MODELS = {"llama": LLAMA, "hybrid": HYBRID, "everything": EVERYTHING}


@pytest.fixture(scope="module", params=MODELS)
def model(request):
    return tiny(MODELS[request.param])


class Oracle:
    """Guesses from answers that are known; every fourth guess is wrong."""

    def __init__(self, handles):
        self.texts = {h.request: [*h.request.prompt, *h.answers[0].tokens] for h in handles}

    def propose(self, sequences, most):
        drafts = []
        for sequence, count in zip(sequences, most):
            place = len(sequence.tokens)
            known = self.texts[sequence.request][place : place + count]
            guesses = [(t + 1) % 256 if (place + i) % 4 == 0 else t for i, t in enumerate(known)]
            drafts.append(Draft(guesses, [None] * len(guesses)))
        return drafts


def test_greedy_answers_stay_bit_for_bit_the_same(model):
    requests = [Request(prompt(5 + 9 * i, i), 24, logprobs=1) for i in range(4)]
    plain = engine(model).generate(requests)
    drafters = {
        "lookup": LookupDrafter(2, 1), "another model": tiny(LLAMA, seed=9), "a hybrid": tiny(EVERYTHING, seed=9),
        "itself": model, "oracle": Oracle(plain),
    }  # fmt: skip
    for name, draft in drafters.items():
        running = engine(model, draft=draft, draft_tokens=4)
        assert [results(h) for h in running.generate(requests)] == [results(h) for h in plain], name
        counts = running.statistics
        assert counts.drafted_tokens > 0
        if name == "itself":
            assert counts.accepted_tokens > 0.9 * counts.drafted_tokens
            assert counts.steps < 20
        if name == "oracle":
            assert 0.5 < counts.accepted_tokens / counts.drafted_tokens < 1


def test_every_way_to_sample_runs_with_guesses_and_gives_its_memory_back(model):
    requests = mixed_requests()
    running = engine(model, draft=tiny(HYBRID, seed=1), draft_tokens=3, prefix_bytes=0, max_batch=4)
    handles = running.generate(requests)
    assert [len(h.answers[0].tokens) for h in handles] == [r.max_new_tokens for r in requests]
    assert [h.prompt_logprobs for h in handles] == [h.prompt_logprobs for h in engine(model).generate(requests)]
    running._drafter.propose([], [])
    assert running.storage.bytes == running._drafter.storage.bytes == {"pages": 0, "slots": 0}


def test_guesses_survive_preemption():
    model = tiny(HYBRID)
    requests = [Request(prompt(20 + i, i), 40) for i in range(6)]
    page, slot = sum(engine(model).storage.page_bytes.values()), engine(model).storage.slot_bytes
    small = engine(model, snapshots=0, budget_bytes=slot * 6 + 14 * page, draft=model)
    handles = small.generate(requests)
    assert small.stats()["preemptions"] > 0
    assert [results(h) for h in handles] == [results(h) for h in engine(model).generate(requests)]


def test_the_distribution_is_the_models_own():
    """Pairs of tokens of a vocabulary of 5, against the product of the model's own probabilities."""

    def small(seed):
        blocks = (Mamba2(2, 8, 8), Attention(2, 1, 8))
        arch = Architecture(hidden_size=16, vocab_size=5, blocks=blocks, tied_embeddings=False, max_positions=64)
        return initialise(Decoder(arch), seed=seed, std=0.2).eval()

    model, draft, count = small(0), small(1), 1200
    sampling = [Sampling(temperature=0.9, top_k=4, seed=s) for s in range(count)]
    running = Engine(model, max_batch=16, chunk=16, page=8, budget_bytes=1 << 20, draft=draft, draft_tokens=2)
    handles = running.generate([Request((1, 2, 3), 4, s) for s in sampling])
    assert 0.2 < running.statistics.accepted_tokens / running.statistics.drafted_tokens < 0.9

    def probabilities(text):
        with torch.no_grad():
            logits = model(torch.tensor([text]))[0, -1].double() / 0.9
        least = logits.topk(4).values[-1]
        return logits.masked_fill(logits < least, -torch.inf).softmax(-1).numpy()

    # The second and third token of each answer: guessed ones, for the first comes from the prompt.
    expected = np.zeros((5, 5))
    for first, second in itertools.product(range(5), range(5)):
        chance = probabilities([1, 2, 3])[first] * probabilities([1, 2, 3, first])[second]
        expected[second] += chance * probabilities([1, 2, 3, first, second])
    seen = np.zeros((5, 5))
    for handle in handles:
        seen[tuple(handle.answers[0].tokens[1:3])] += 1
    possible = expected * count > 1
    assert not seen[expected == 0].any()
    assert chisquare(seen[possible], expected[possible] / expected[possible].sum() * seen[possible].sum()).pvalue > 0.01


def test_rejection_sampling_alone():
    """One place, many seeds: a bad guess distribution leaves p as it is; so does a guess that was not drawn."""
    p, q = np.array([0.5, 0.3, 0.15, 0.05]), np.array([0.05, 0.15, 0.3, 0.5])
    for given in (q, None):
        seen = np.zeros(4)
        for seed in range(4000):
            handle = Handle(Request((0,), 2, Sampling(temperature=1.0)))
            sequence = Sequence(handle, 0, seed, 4)
            guess = 2 if given is None else draw(q, sequence.number(3))
            seen[verified(sequence, np.log(p), guess, given)] += 1
        assert chisquare(seen, 4000 * p).pvalue > 0.01


def test_lookup_finds_how_the_text_went_on():
    look = LookupDrafter(3, 2)
    assert look._continuation([1, 2, 3, 4, 5, 1, 2, 3], 2) == [4, 5]
    assert look._continuation([7, 2, 3, 9, 2, 3, 8, 2, 3], 5) == [8, 2, 3]  # the latest
    assert look._continuation([1, 2, 3, 4], 5) == [] and look._continuation([1], 5) == []


def test_a_draft_model_must_speak_the_language(model):
    with pytest.raises(IntarsiaError, match="the vocabulary must be the same"):
        arch = Architecture(hidden_size=16, vocab_size=9, blocks=(), tied_embeddings=True, max_positions=512)
        engine(model, draft=Decoder(arch))
    with pytest.raises(IntarsiaError, match="choose 1 to 15"):
        engine(model, draft_tokens=16)
