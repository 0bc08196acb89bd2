"""Running a model: the engine, generation, and timing of a scenario."""

from intarsia.engine.engine import Engine
from intarsia.engine.generate import generate
from intarsia.engine.request import Answer, Delta, Handle, Request, Sampling, TokenLogprob
from intarsia.engine.scenario import Scenario, Timing, compare_speed, run_scenario

__all__ = [
    "Answer", "Delta", "Engine", "Handle", "Request", "Sampling", "Scenario", "Timing", "TokenLogprob", "compare_speed",
    "generate", "run_scenario",
]  # fmt: skip
