"""Running a model: generation, and timing of a scenario."""

from intarsia.engine.generate import generate
from intarsia.engine.scenario import Scenario, Timing, compare_speed, run_scenario

__all__ = ["Scenario", "Timing", "compare_speed", "generate", "run_scenario"]
