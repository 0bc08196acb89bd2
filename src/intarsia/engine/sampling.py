"""From logits to a token. What is drawn depends on the text, the seed and the place in the text, on nothing beside it.

Shape letter: V vocabulary.
"""

from __future__ import annotations

import numpy as np

from intarsia.engine.request import Sampling, TokenLogprob


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
        least = np.partition(logits, -sampling.top_k)[-sampling.top_k]
        logits = np.where(logits < least, -np.inf, logits)
    probs = np.exp(logits)
    probs /= probs.sum()
    if sampling.top_p < 1:
        order = np.argsort(-probs, kind="stable")
        ordered = probs[order]
        # A token stays when those before it hold less than top_p, so the likeliest always does.
        probs[order[np.cumsum(ordered) - ordered >= sampling.top_p]] = 0
    if sampling.min_p > 0:
        probs[probs < sampling.min_p * probs.max()] = 0
    return probs / probs.sum()


def draw(probs: np.ndarray, number: float) -> int:
    """The token at which the running sum of probabilities (V,) passes a number in [0, 1)."""
    sums = np.cumsum(probs)
    return int(np.searchsorted(sums, number * sums[-1], side="right"))


def token_logprob(logits: np.ndarray, token: int, top: int) -> TokenLogprob:
    """The model's own log p of a token, and its `top` likeliest."""
    logits = logits.astype(np.float64)
    most = logits.max()
    total = most + np.log(np.exp(logits - most).sum())
    best = np.argpartition(-logits, min(top, len(logits) - 1))[:top] if top else np.array([], np.int64)
    best = best[np.argsort(-logits[best], kind="stable")]
    return TokenLogprob(token, float(logits[token] - total), tuple((int(i), float(logits[i] - total)) for i in best))
