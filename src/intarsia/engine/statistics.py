"""What the engine counts: enough to see its queue, its batch, its caches and its speed."""

from __future__ import annotations

import bisect
import time
from dataclasses import dataclass, field

from intarsia.engine.batch import Piece
from intarsia.engine.request import Delta
from intarsia.engine.sequence import Sequence

FIRST_TOKEN_BOUNDS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0)  # seconds


@dataclass
class Histogram:
    """Counts of values up to each bound, and beyond the last, with their sum."""

    bounds: tuple[float, ...]
    counts: list[int] = field(init=False)
    sum: float = 0.0

    def __post_init__(self) -> None:
        self.counts = [0] * (len(self.bounds) + 1)

    def add(self, value: float) -> None:
        self.counts[bisect.bisect_left(self.bounds, value)] += 1
        self.sum += value


@dataclass
class Statistics:
    """Counters since the engine was made."""

    requests: int = 0
    answers: int = 0  # that have ended
    prompt_tokens: int = 0
    read_tokens: int = 0  # of prompts, computed
    cached_tokens: int = 0  # of prompts, found in the tree of prefixes
    generated_tokens: int = 0
    drafted_tokens: int = 0
    accepted_tokens: int = 0
    steps: int = 0
    passes: int = 0
    busy_seconds: float = 0.0
    first_token: Histogram = field(default_factory=lambda: Histogram(FIRST_TOKEN_BOUNDS))

    def step(self, planned: list[tuple[Sequence, Piece]], passes: int, seconds: float) -> None:
        self.steps += 1
        self.passes += passes
        self.busy_seconds += seconds
        self.read_tokens += sum(len(piece.tokens) for _, piece in planned if not piece.steps)

    def told(self, sequence: Sequence, delta: Delta) -> None:
        self.generated_tokens += len(delta.tokens)
        self.answers += bool(delta.finish)
        if delta.tokens and sequence.generated == 1:
            self.first_token.add(time.perf_counter() - sequence.born)
            if sequence.index == 0:
                self.cached_tokens += sequence.handle.cached_tokens

    def as_dict(self) -> dict[str, float]:
        return {name: value for name, value in vars(self).items() if isinstance(value, int | float)}
