"""One answer on its way: its tokens, how far the model has read them, and what it may tell already."""

from __future__ import annotations

import time

import numpy as np

from intarsia.engine.memory import Held
from intarsia.engine.prefix import Node
from intarsia.engine.request import Delta, Handle
from intarsia.engine.sampling import Counts, distribution, draw, token_logprob, uniform
from intarsia.engine.text import Decodes, Stops, TextStream


class Sequence:
    """Answer `index` of a request. `tokens` are prompt and answer; the first `computed` are in the memory `held`."""

    def __init__(self, handle: Handle, index: int, seed: int, vocab_size: int, tokenizer: Decodes | None = None):
        self.handle, self.request, self.index, self.seed = handle, handle.request, index, seed
        self.born = time.perf_counter()
        self.tokens = list(self.request.prompt)
        self.prompt_length = len(self.tokens)
        self.computed = 0
        self.held = Held()
        self.followers: list[Sequence] = []  # further answers, which go on from this one's memory of the prompt
        self.drafted: list[int] = []  # guesses at the next tokens, to be verified
        self.node: Node | None = None  # where its prompt stands in the tree of prefixes
        self.snapshots_at: set[int] = set()  # lengths at which its state is worth keeping
        self.finish = ""
        self.sampling = self.request.sampling
        self.counts = Counts(vocab_size, self.tokens) if self.sampling.penalises else None
        self._stream = None if tokenizer is None else TextStream(tokenizer, self.tokens)
        self._stops = Stops(self.request.stop)

    @property
    def reading(self) -> bool:
        """Is part of the prompt still to be read?"""
        return self.computed < self.prompt_length

    @property
    def greedy(self) -> bool:
        """Is the likeliest token of the model the next one, whatever its probability?"""
        return self.sampling.temperature == 0 and not self.sampling.penalises

    @property
    def generated(self) -> int:
        return len(self.tokens) - self.prompt_length

    def probabilities(self, logits: np.ndarray) -> np.ndarray:
        """What the next token is drawn from, (V,) float64."""
        return distribution(logits, self.sampling, self.counts)

    def choose(self, logits: np.ndarray) -> int:
        """The next token."""
        probs = self.probabilities(logits)
        return draw(probs, self.number())

    def number(self, purpose: int = 0) -> float:
        """The random number in [0, 1) that belongs to the next place of this answer."""
        return uniform(self.seed, len(self.tokens), self.index << 8 | purpose)

    def append(self, token: int, logits: np.ndarray | None) -> Delta:
        """Add a token that was drawn from these logits (None: no logprobs are wanted); what is to be told of it."""
        self.tokens.append(token)
        if self.counts:
            self.counts.add(token)
        delta = Delta(self.index, tokens=[token])
        if logits is not None and self.request.logprobs is not None:
            delta.logprobs.append(token_logprob(logits, token, self.request.logprobs))
        if token in self.request.stop_ids:
            self.finish = "stop"
        elif self._stream is not None:
            delta.text, stopped = self._stops.add(self._stream.add(token))
            self.finish = "stop" if stopped else ""
            if stopped:
                delta.finish = self.finish
                return delta
        if not self.finish and self.generated >= self.request.max_new_tokens:
            self.finish = "length"
        if self.finish:
            delta.text += self._last_text()
        delta.finish = self.finish
        return delta

    def _last_text(self) -> str:
        if self._stream is None:
            return ""
        text, stopped = self._stops.add(self._stream.end())
        if stopped:
            self.finish = "stop"
            return text
        return text + self._stops.end()

    def end(self, reason: str) -> Delta:
        """Stop here; what is left to be told."""
        self.finish = reason
        text = self._last_text()
        self.finish = reason
        return Delta(self.index, text=text, finish=reason)
