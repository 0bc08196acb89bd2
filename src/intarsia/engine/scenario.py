"""What is timed: a scenario is a batch of prompts that is read, and a number of tokens that each then generates."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch

from intarsia.arch import Architecture
from intarsia.base.errors import IntarsiaError
from intarsia.engine.generate import next_logits
from intarsia.model import Cache, Decoder

BURST = 4  # steps in a row, of which the first finds its weights pushed out of the cache by the other models


@dataclass(frozen=True)
class Scenario:
    """`batch` prompts of `prompt` tokens, each followed by `generated` tokens."""

    batch: int = 1
    prompt: int = 512
    generated: int = 64

    def __post_init__(self) -> None:
        if self.batch < 1 or self.prompt < 1 or self.generated < 0:
            raise IntarsiaError(
                f"the scenario {self} is not possible: batch and prompt are at least 1, generated at least 0."
            )

    @classmethod
    def parse(cls, text: str) -> Scenario:
        """`1,512,64` -> batch 1, prompt 512, generated 64."""
        try:
            batch, prompt, generated = (int(part) for part in text.split(","))
        except ValueError as error:
            raise IntarsiaError(
                f"{text!r} is no scenario: give three whole numbers, batch,prompt,generated, such as 1,512,64."
            ) from error
        return cls(batch, prompt, generated)

    def check(self, arch: Architecture) -> Scenario:
        """Itself; raises `IntarsiaError` when a sequence would not fit the model's context."""
        if self.length > arch.max_positions:
            raise IntarsiaError(
                f"the scenario {self} takes {self.length} tokens a sequence, but the model's context is "
                f"{arch.max_positions}: use a shorter prompt or generate less."
            )
        return self

    @property
    def length(self) -> int:
        """Tokens a sequence."""
        return self.prompt + self.generated

    def __str__(self) -> str:
        return f"{self.batch},{self.prompt},{self.generated}"


@dataclass(frozen=True)
class Timing:
    """Wall seconds: until the first new token is known (prefill), and for the `generated` steps after it."""

    prefill_seconds: float
    decode_seconds: float

    @property
    def total(self) -> float:
        return self.prefill_seconds + self.decode_seconds


class Run:
    """A scenario under way with one model, its time so far."""

    @torch.inference_mode()
    def __init__(self, model: Decoder, scenario: Scenario, ids: torch.Tensor | None = None):
        """Read the prompts `ids` (batch, prompt); by default they are drawn, always the same for a vocabulary."""
        scenario.check(model.arch)
        ids = prompts(model, scenario) if ids is None else ids.to(model.device)
        self.model, self.decode_seconds = model, 0.0
        self.cache = Cache(model.arch, scenario.batch, scenario.length, model.dtype, model.device)
        began = clock(model)
        self.token = next_logits(model, ids, self.cache).argmax(-1, keepdim=True)
        self.prefill_seconds = clock(model) - began

    @torch.inference_mode()
    def generate(self, steps: int) -> None:
        """That many greedy steps of one token."""
        began = clock(self.model)
        for _ in range(steps):
            self.token = next_logits(self.model, self.token, self.cache).argmax(-1, keepdim=True)
        self.decode_seconds += clock(self.model) - began

    @property
    def timing(self) -> Timing:
        return Timing(self.prefill_seconds, self.decode_seconds)


def run_scenario(model: Decoder, scenario: Scenario, ids: torch.Tensor | None = None) -> Timing:
    """Time one prefill with cache and `generated` greedy steps of one token."""
    run = Run(model, scenario, ids)
    run.generate(scenario.generated)
    return run.timing


def side_by_side(
    models: Mapping[str, Decoder], scenario: Scenario, ids: torch.Tensor | None = None
) -> dict[str, Timing]:
    """The same for several models, `BURST` steps of each in turn: what is slow for a second is slow for all."""
    runs = {name: Run(model, scenario, ids) for name, model in models.items()}
    for done in range(0, scenario.generated, BURST):
        for run in runs.values():
            run.generate(min(BURST, scenario.generated - done))
    return {name: run.timing for name, run in runs.items()}


def prompts(model: Decoder, scenario: Scenario) -> torch.Tensor:
    """Random prompts (batch, prompt): what the tokens are does not change what they cost."""
    generator = torch.Generator().manual_seed(0)
    shape = (scenario.batch, scenario.prompt)
    return torch.randint(model.arch.vocab_size, shape, generator=generator).to(model.device)


def clock(model: Decoder) -> float:
    if model.device.type == "cuda":
        torch.cuda.synchronize(model.device)
    return time.perf_counter()


def compare_speed(
    models: Mapping[str, Decoder],
    scenario: Scenario,
    repeats: int = 5,
    ids: torch.Tensor | None = None,
    advance: Callable[[], None] = lambda: None,
) -> dict[str, dict]:
    """Time several models side by side, `repeats` times after once to warm up.

    For each name: `prefill_seconds`, `decode_seconds`, `total_seconds` and `speedup` (total time of the first model
    over its own, run by run within a turn), each as {median, iqr, low, high}, low and high being the quartiles; and
    `runs`, the totals as measured. `advance` is called for every run, (repeats + 1) * len(models) times.
    """
    if repeats < 1 or not models:
        raise IntarsiaError("timing needs at least one model and one repeat.")
    timings: dict[str, list[Timing]] = {name: [] for name in models}
    for turn in range(-1, repeats):
        for name, timing in side_by_side(models, scenario, ids).items():
            if turn >= 0:
                timings[name].append(timing)
            advance()
    first = [t.total for t in next(iter(timings.values()))]
    return {
        name: {
            "prefill_seconds": spread([t.prefill_seconds for t in runs]),
            "decode_seconds": spread([t.decode_seconds for t in runs]),
            "total_seconds": spread([t.total for t in runs]),
            "speedup": spread([base / t.total for base, t in zip(first, runs)]),
            "runs": [t.total for t in runs],
        }
        for name, runs in timings.items()
    }


def spread(values: list[float]) -> dict[str, float]:
    """Median, lower and upper quartile, and their distance."""
    if len(values) == 1:
        low = high = values[0]
    else:
        low, _, high = statistics.quantiles(values, n=4, method="inclusive")
    return {"median": statistics.median(values), "iqr": high - low, "low": low, "high": high}
