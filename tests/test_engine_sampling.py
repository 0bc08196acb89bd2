"""Sampling: the filters, the penalties, the seed, log-probabilities."""

import numpy as np
import pytest
import torch

from engine_toys import HYBRID, engine, prompt, tiny
from intarsia.base.errors import IntarsiaError
from intarsia.engine import Request, Sampling
from intarsia.engine.sampling import Counts, distribution, draw, token_logprob, uniform

LOGITS = np.log(np.array([0.4, 0.3, 0.2, 0.06, 0.04]))


@pytest.mark.parametrize(
    "sampling, expected",
    [
        (Sampling(temperature=1.0), [0.4, 0.3, 0.2, 0.06, 0.04]),
        (Sampling(temperature=0.5), np.array([0.16, 0.09, 0.04, 0.0036, 0.0016]) / 0.2952),
        (Sampling(temperature=1.0, top_k=2), [4 / 7, 3 / 7, 0, 0, 0]),
        (Sampling(temperature=1.0, top_p=0.75), [4 / 9, 3 / 9, 2 / 9, 0, 0]),
        (Sampling(temperature=1.0, top_p=1e-9), [1, 0, 0, 0, 0]),
        (Sampling(temperature=1.0, min_p=0.4), [4 / 9, 3 / 9, 2 / 9, 0, 0]),
        (Sampling(), [1, 0, 0, 0, 0]),
    ],
)
def test_filters(sampling, expected):
    np.testing.assert_allclose(distribution(LOGITS, sampling), expected, atol=1e-12)


def test_penalties():
    counts = Counts(5, [0])
    counts.add(1)
    counts.add(1)
    logits = np.array([2.0, -1.0, 0.5, 0.0, 0.0])
    way = Sampling(temperature=1.0, repetition=2.0, presence=0.5, frequency=0.25)
    expected = np.exp(np.array([1.0, -2.0 - 0.5 - 0.5, 0.5, 0.0, 0.0]))
    np.testing.assert_allclose(distribution(logits, way, counts), expected / expected.sum())


def test_a_draw_follows_the_probabilities():
    probs = distribution(LOGITS, Sampling(temperature=1.0))
    drawn = np.bincount([draw(probs, uniform(11, place)) for place in range(5000)], minlength=5) / 5000
    np.testing.assert_allclose(drawn, probs, atol=0.03)
    assert draw(np.array([0.0, 1.0, 0.0]), 0.0) == 1 and draw(np.array([0.5, 0.5, 0.0]), 0.9999999999) == 1
    assert uniform(1, 2) == uniform(1, 2) != uniform(1, 3) != uniform(2, 3)


def by_sorting(logits, sampling):
    """`distribution` as it is told: everything sorted."""
    order = np.argsort(-logits, kind="stable")
    probs = np.exp((logits[order] - logits.max()) / sampling.temperature)
    if sampling.top_k:
        probs[logits[order] < logits[order[sampling.top_k - 1]]] = 0
    probs /= probs.sum()
    if sampling.top_p < 1:  # the sum of all may be a rounding above 1
        probs[np.cumsum(probs) - probs >= sampling.top_p] = 0
    return probs[np.argsort(order)] / probs.sum()


@pytest.mark.parametrize("spread", [0.0, 0.01, 1.0, 5.0, 30.0])
@pytest.mark.parametrize(
    "top_k, top_p", [(0, 0.5), (0, 0.95), (0, 0.99999), (1, 1.0), (40, 1.0), (900, 0.9), (1000, 0.3)]
)
def test_filters_of_a_large_vocabulary_are_those_of_sorting_it(spread, top_k, top_p):
    logits = np.random.default_rng(0).normal(size=1000) * spread
    sampling = Sampling(temperature=0.7, top_k=top_k, top_p=top_p)
    found, wanted = distribution(logits, sampling), by_sorting(logits, sampling)
    np.testing.assert_array_equal(found > 0, wanted > 0)
    np.testing.assert_allclose(found, wanted, rtol=1e-9)
    sums = found.cumsum()
    for number in (0.0, 0.1, 0.5, 0.77, 1 - 2**-53):
        token = draw(found, number)
        assert found[token] > 0 and sums[token] - found[token] <= number + 1e-12 and number <= sums[token] + 1e-12


def test_logprobs_are_those_of_the_forward_pass():
    model = tiny(HYBRID)
    ids = prompt(40)
    request = Request(ids, 6, Sampling(temperature=1.5, top_k=3, seed=3), logprobs=4, prompt_logprobs=2)
    handle = engine(model).generate([request])[0]
    answer = handle.answers[0]
    with torch.no_grad():
        expected = model(torch.tensor([[*ids, *answer.tokens]]))[0].log_softmax(-1)
    assert handle.prompt_logprobs[0] is None and len(handle.prompt_logprobs) == 40
    for place, told in enumerate([*handle.prompt_logprobs[1:], *answer.logprobs]):
        row = expected[place]
        assert told.token == ([*ids, *answer.tokens])[place + 1]
        assert abs(told.logprob - row[told.token]) < 1e-4
        top = row.topk(len(told.top))
        assert [i for i, _ in told.top] == top.indices.tolist()
        np.testing.assert_allclose([p for _, p in told.top], top.values, atol=1e-4)
    assert len(answer.logprobs[0].top) == 4 and len(handle.prompt_logprobs[1].top) == 2


def test_reading_a_prompt_alone_generates_nothing():
    handle = engine(tiny(HYBRID)).generate([Request(prompt(20), 0, prompt_logprobs=0)])[0]
    assert handle.done and not handle.answers[0].tokens and len(handle.prompt_logprobs) == 20


def test_seeds_decide_and_an_unseeded_request_draws_one():
    model = tiny(HYBRID)

    def tokens(seed):
        request = Request(prompt(5), 12, Sampling(temperature=1.0, seed=seed))
        return engine(model).generate([request])[0].answers[0].tokens

    assert tokens(1) == tokens(1) != tokens(2)
    assert tokens(None) != tokens(None)


def test_token_logprob_of_everything():
    told = token_logprob(LOGITS, 3, 5)
    assert [i for i, _ in told.top] == [0, 1, 2, 3, 4] and abs(np.exp(told.logprob) - 0.06) < 1e-12


@pytest.mark.parametrize(
    "name, value",
    [("temperature", -1), ("temperature", float("nan")), ("top_p", 0), ("top_k", -1), ("min_p", 2), ("repetition", 0)],
)
def test_impossible_ways_to_sample_are_refused(name, value):
    with pytest.raises(IntarsiaError, match="not possible"):
        Sampling(**{name: value})
