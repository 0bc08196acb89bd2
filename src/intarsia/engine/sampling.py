"""From logits to a token. What is drawn depends on the text, the seed and the place in the text, on nothing beside it.

Shape letter: V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from intarsia.engine.request import Sampling, TokenLogprob

BLOCK = 256  # tokens whose probabilities are summed before the running sum is looked at one by one


class Counts:
    """How often each token stands in a text: in all of it, and in what was generated. Kept only for penalties."""

    def __init__(self, vocab_size: int, prompt: list[int]):
        self.seen = np.bincount(np.asarray(prompt, np.int64), minlength=vocab_size) > 0
        self.generated = np.zeros(vocab_size, np.int64)

    def add(self, token: int) -> None:
        self.seen[token] = True
        self.generated[token] += 1


def uniform(seed: int, place: int, purpose: int = 0) -> float:
    """A number in [0, 1) for a place in a text, the same whenever it is asked for."""
    key = np.array([seed & (2**64 - 1), purpose], np.uint64)
    return np.random.Generator(np.random.Philox(key=key, counter=[place, 0, 0, 0])).random()


def penalise(logits: np.ndarray, sampling: Sampling, counts: Counts | None) -> np.ndarray:
    """(V,) -> (V,) float64 with the penalties of `Sampling`."""
    logits = logits.astype(np.float64)
    if counts is None or not sampling.penalises:
        return logits
    scaled = np.where(logits > 0, logits / sampling.repetition, logits * sampling.repetition)
    logits = np.where(counts.seen, scaled, logits)
    return logits - sampling.presence * (counts.generated > 0) - sampling.frequency * counts.generated


def distribution(logits: np.ndarray, sampling: Sampling, counts: Counts | None = None) -> np.ndarray:
    """The probabilities (V,) float64 from which `sampling` draws; at temperature 0 all of it on one token."""
    logits = penalise(logits, sampling, counts)
    if sampling.temperature == 0:
        probs = np.zeros_like(logits)
        probs[logits.argmax()] = 1
        return probs
    logits = (logits - logits.max()) / sampling.temperature
    if 0 < sampling.top_k < len(logits):
        high = _likely(logits, lambda some: len(some) >= sampling.top_k)
        least = np.partition(logits[high], -sampling.top_k)[-sampling.top_k]
        logits = np.where(logits < least, -np.inf, logits)
    probs = np.exp(logits)
    probs /= probs.sum()
    if sampling.top_p < 1:
        probs = _nucleus(probs, logits, sampling.top_p)
    if sampling.min_p > 0:
        probs[probs < sampling.min_p * probs.max()] = 0
    return probs / probs.sum()


def _nucleus(probs: np.ndarray, logits: np.ndarray, mass: float) -> np.ndarray:
    """(V,) with only the likeliest that together hold `mass`. To sort all of them would take as long as a model."""
    high = _likely(logits, lambda some: probs[some].sum() > mass)
    order = high[np.argsort(-probs[high], kind="stable")]
    ordered = probs[order]
    # A token stays when those before it hold less than `mass`, so the likeliest always does.
    kept = order[np.cumsum(ordered) - ordered < mass]
    left = np.zeros_like(probs)
    left[kept] = probs[kept]
    return left


def _likely(logits: np.ndarray, enough: Callable[[np.ndarray], bool]) -> np.ndarray:
    """The tokens, in order, whose logits (V,), at most 0, are above a cut that is lowered until they are `enough`."""
    for cut in (-2, -4, -6, -8, -11, -16):
        some = np.flatnonzero(logits > cut)
        if enough(some):
            return some
    return np.arange(len(logits))


def draw(probs: np.ndarray, number: float) -> int:
    """The token at which the running sum of probabilities (V,) passes a number in [0, 1)."""
    sums = np.add.reduceat(probs, np.arange(0, len(probs), BLOCK)).cumsum()
    wanted = number * sums[-1]
    block = int(np.searchsorted(sums, wanted, side="right"))
    part = probs[block * BLOCK : (block + 1) * BLOCK]
    within = part.cumsum() + (sums[block - 1] if block else 0.0)
    # Added up in another order, a block may end a rounding below its sum: then its last possible token is meant.
    place = min(np.searchsorted(within, wanted, side="right"), np.flatnonzero(part)[-1])
    return block * BLOCK + int(place)


def token_logprob(logits: np.ndarray, token: int, top: int) -> TokenLogprob:
    """The model's own log p of a token, and its `top` likeliest."""
    logits = logits.astype(np.float64)
    most = logits.max()
    total = most + np.log(np.exp(logits - most).sum())
    best = np.argpartition(-logits, min(top, len(logits) - 1))[:top] if top else np.array([], np.int64)
    best = best[np.argsort(-logits[best], kind="stable")]
    return TokenLogprob(token, float(logits[token] - total), tuple((int(i), float(logits[i] - total)) for i in best))
