"""What is asked of the engine and what it answers."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field

from intarsia.base.errors import IntarsiaError


@dataclass(frozen=True)
class Sampling:
    """How the next token is drawn.

    `temperature` 0 takes the likeliest. Else, in this order: penalties, temperature, the `top_k` likeliest (0: all), of
    those the likeliest that together hold `top_p`, of those the ones at least `min_p` times as likely as the
    likeliest. `repetition` divides (or multiplies) the logit of every token that the text has (CTRL, arXiv
    1909.05858); `presence` and `frequency` are subtracted from those of generated tokens, once and for each time.
    `seed` None draws one.
    """

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition: float = 1.0
    presence: float = 0.0
    frequency: float = 0.0
    seed: int | None = None

    def __post_init__(self) -> None:
        bounds = {
            "temperature": (0, math.inf), "top_k": (0, math.inf), "min_p": (0, 1), "presence": (-math.inf, math.inf),
            "frequency": (-math.inf, math.inf),
        }  # fmt: skip
        for name, (least, most) in bounds.items():
            value = getattr(self, name)
            if not least <= value <= most or math.isinf(value):
                limits = f"at least {least}" if most == math.inf else f"between {least} and {most}"
                raise IntarsiaError(f"{name} {value} is not possible: a number {limits} is needed.")
        if not 0 < self.top_p <= 1:
            raise IntarsiaError(f"top_p {self.top_p} is not possible: a number above 0 and at most 1 is needed.")
        if not 0 < self.repetition < math.inf:
            raise IntarsiaError(f"a repetition penalty of {self.repetition} is not possible: above 0 is; 1 is none.")

    @property
    def penalises(self) -> bool:
        return self.repetition != 1 or self.presence != 0 or self.frequency != 0


@dataclass(frozen=True)
class Request:
    """Continue `prompt` in `n` ways.

    An answer ends with one of `stop_ids` (kept among its ids, not in its text), before one of the `stop` strings, or
    after `max_new_tokens`. `logprobs` asks for that many likeliest tokens beside each chosen one, `prompt_logprobs`
    for the same of the prompt's tokens (the first has none); None asks for nothing. With `max_new_tokens` 0 only the
    prompt is read.
    """

    prompt: tuple[int, ...]
    max_new_tokens: int = 16
    sampling: Sampling = field(default_factory=Sampling)
    n: int = 1
    stop: tuple[str, ...] = ()
    stop_ids: tuple[int, ...] = ()
    logprobs: int | None = None
    prompt_logprobs: int | None = None


@dataclass(frozen=True)
class TokenLogprob:
    """log p of a token under the model as it is (before temperature, penalties and filters), and the likeliest ones."""

    token: int
    logprob: float
    top: tuple[tuple[int, float], ...] = ()


@dataclass
class Delta:
    """What one step added to answer `index`: text that is final, ids, and why it ended ("" while it goes on).

    Reasons: "stop" (a stop id or string), "length" (max_new_tokens), "cancelled".
    """

    index: int
    text: str = ""
    tokens: list[int] = field(default_factory=list)
    logprobs: list[TokenLogprob] = field(default_factory=list)
    finish: str = ""


@dataclass
class Answer:
    """One way to continue: everything that its deltas said."""

    text: str = ""
    tokens: list[int] = field(default_factory=list)
    logprobs: list[TokenLogprob] = field(default_factory=list)
    finish: str = ""

    def add(self, delta: Delta) -> None:
        self.text += delta.text
        self.tokens += delta.tokens
        self.logprobs += delta.logprobs
        self.finish = delta.finish or self.finish


class Handle:
    """A request on its way: its answers so far. `on_delta` is called from the engine's thread."""

    def __init__(self, request: Request, on_delta: Callable[[Delta], None] | None = None):
        self.request, self.on_delta = request, on_delta
        self.answers = [Answer() for _ in range(request.n)]
        self.prompt_logprobs: list[TokenLogprob | None] = []
        self.error: Exception | None = None
        self.cached_tokens = 0  # of the prompt, that did not have to be computed

    @property
    def done(self) -> bool:
        return all(a.finish for a in self.answers)

    def put(self, delta: Delta) -> None:
        self.answers[delta.index].add(delta)
        if self.on_delta:
            self.on_delta(delta)
