"""Blends: how much of which text, phase by phase, as a recipe that scales to any budget of tokens.

A blend names categories; `sources` says which categories of the data stand for each. Weights count in proportion, and
a phase ends where `until` says: at a fraction of the budget (0.6), at a count of tokens ("9T"), where so many are left
("last 380B"), or at the "end".
"""

from __future__ import annotations

import math
import os
import re
from collections.abc import Iterable, Mapping
from fractions import Fraction
from importlib import resources
from pathlib import Path

from pydantic import Field, field_validator

from intarsia.base.errors import IntarsiaError, did_you_mean
from intarsia.base.recipe import Strict, load_recipe

EVERYTHING = "*"  # a category that stands for all that there are, by their tokens
UNITS = {"": 1, "K": 10**3, "M": 10**6, "B": 10**9, "T": 10**12}


def tokens_of(text: str | int | float) -> int:
    """`380B`, `20M`, `1.5T`, `20_000_000` or a number -> tokens. Raises `IntarsiaError` for anything else."""
    found = re.fullmatch(r"\s*([\d_]*\.?\d+(?:e\d+)?)\s*([KMBT]?)\s*", str(text), re.IGNORECASE)
    if not found:
        raise IntarsiaError(f"'{text}' is no count of tokens: write a number like 20M, 380B or 15T.")
    return int(Fraction(found[1].replace("_", "")) * UNITS[found[2].upper()])


class Phase(Strict):
    """A stretch of the training with weights of its own."""

    weights: dict[str, float]  # by category, in any unit
    until: float | str = "end"
    name: str = ""

    @field_validator("weights")
    @classmethod
    def _weights(cls, weights: dict[str, float]) -> dict[str, float]:
        if wrong := [name for name, weight in weights.items() if not 0 <= weight < math.inf]:
            raise ValueError(f"the weight of {wrong[0]} must be finite and not negative")
        if not any(weights.values()):
            raise ValueError("at least one category needs a positive weight")
        return weights

    @field_validator("until")
    @classmethod
    def _until(cls, until: float | str) -> float | str:
        if isinstance(until, str):
            if until != "end":
                tokens_of(until.removeprefix("last "))
        elif not 0 < until <= 1:
            raise ValueError("a phase ends at a fraction over 0 and up to 1, at '9T', 'last 380B' or 'end'")
        return until

    def end(self, budget: int, scale: Fraction) -> Fraction:
        """Tokens of the whole training at the end of this phase."""
        if self.until == "end":
            return Fraction(budget)
        if not isinstance(self.until, str):
            return Fraction(str(self.until)) * budget
        last = self.until.startswith("last ")
        tokens = tokens_of(self.until.removeprefix("last ")) * scale
        return budget - tokens if last else tokens


class Blend(Strict):
    """Phases in order, and where their categories come from.

    `sources`: for a category that is not called so in the data, the names that stand for it. A list shares its weight
    by tokens, a table by the weights in it, and an empty list leaves the category out: its weight goes to the others
    in proportion. The category `*` stands for all that the data have, by their tokens. `full_scale`: counts of tokens
    in `until` hold for budgets from here on, and shrink in proportion below. `max_epochs`: no source may be read more
    often. `base`: a blend whose phases are taken where none are given.
    """

    phases: tuple[Phase, ...] = ()
    sources: dict[str, list[str] | dict[str, float]] = Field(default_factory=dict)
    full_scale: int | str | None = None
    max_epochs: float = Field(default=4.0, gt=0)
    about: str = ""
    base: str | None = None

    @field_validator("full_scale")
    @classmethod
    def _full_scale(cls, value: int | str | None) -> int | str | None:
        if value is not None:
            tokens_of(value)
        return value

    @property
    def categories(self) -> list[str]:
        """Every category that has a weight in some phase."""
        return list(dict.fromkeys(c for phase in self.phases for c, weight in phase.weights.items() if weight))

    def ends(self, budget: int) -> list[int]:
        """Where each phase ends, in tokens of a training of `budget` tokens; the last is the budget.

        Raises `IntarsiaError` where they do not follow each other.
        """
        full = tokens_of(self.full_scale) if self.full_scale is not None else 0
        scale = min(Fraction(1), Fraction(budget, full)) if full else Fraction(1)
        ends = [phase.end(budget, scale) for phase in self.phases]
        if ends[-1] != budget:
            raise IntarsiaError(f"the last phase ends after {float(ends[-1]):,.0f} of {budget:,} tokens: let it end at "
                                "the 'end'.")
        for number, (before, after) in enumerate(zip([Fraction(0), *ends], ends)):
            if after <= before:
                raise IntarsiaError(
                    f"phase {self.phases[number].name or number + 1} would end ({self.phases[number].until}) before it "
                    f"begins, at {float(before):,.0f} of {budget:,} tokens: give more tokens, another boundary, or "
                    "full_scale, from which on counts of tokens hold."
                )
        return [round(end) for end in ends]

    def weights(self, tokens: Mapping[str, int]) -> list[dict[str, Fraction]]:
        """Per phase, the share of every source: `tokens` are those that each category of the data has.

        Raises `IntarsiaError` for a category that has neither text nor a word in `sources` about it.
        """
        if unknown := [name for name in self.sources if name not in self.categories]:
            raise IntarsiaError(f"sources names {unknown[0]}, which no phase has: {', '.join(self.categories)}."
                                f"{did_you_mean(unknown[0], self.categories)}")
        return [self._shares(phase, tokens) for phase in self.phases]

    def _shares(self, phase: Phase, tokens: Mapping[str, int]) -> dict[str, Fraction]:
        shares: dict[str, Fraction] = {}
        for category, weight in phase.weights.items():
            within = self._within(category, tokens) if weight else {}
            for name, part in within.items():
                shares[name] = shares.get(name, Fraction(0)) + Fraction(str(weight)) * part / sum(within.values())
        total = sum(shares.values())
        if not total:
            raise IntarsiaError(f"phase {phase.name or '?'} has no text left: every one of its categories "
                                f"({', '.join(phase.weights)}) is left out by sources.")
        return {name: share / total for name, share in shares.items() if share}

    def _within(self, category: str, tokens: Mapping[str, int]) -> dict[str, Fraction]:
        """The sources that stand for a category, each with its weight within it."""
        given = self.sources.get(category)
        if category == EVERYTHING and given is None:
            given = [name for name, count in tokens.items() if count]
        if given is None:
            if category not in tokens:
                raise IntarsiaError(
                    f"the blend has {category}, and the data have no category of that name: {', '.join(tokens)}. Say "
                    f"in sources which of them stands for it ({category} = [\"name\"]), or leave it out "
                    f"({category} = [])."
                )
            given = [category]
        for name in given:
            if name not in tokens:
                raise IntarsiaError(f"sources takes {name} for {category}, and the data have no category of that name: "
                                    f"{', '.join(tokens)}.{did_you_mean(name, tokens)}")
            if not tokens[name]:
                raise IntarsiaError(f"{name} has no tokens to train on, and the blend takes it for {category}: give it "
                                    f"text, or leave it out.")
        if isinstance(given, dict):
            return {name: Fraction(str(weight)) for name, weight in given.items() if weight > 0}
        return {name: Fraction(tokens[name]) for name in given}


def blend_names() -> list[str]:
    """The blends that come with the package."""
    return sorted(f.name.removesuffix(".toml") for f in _shipped().iterdir() if f.name.endswith(".toml"))


def load_blend(source: str | os.PathLike, overrides: Iterable[str] = ()) -> Blend:
    """A blend that comes with the package, by name, or one from a TOML file, with `a.b=c` laid over it.

    Raises `IntarsiaError` for a name, file, key or value that is not possible.
    """
    name = os.fspath(source)
    if name in blend_names():
        with resources.as_file(_shipped() / f"{name}.toml") as path:
            blend = load_recipe(Blend, path, overrides)
    elif name.endswith(".toml") or os.sep in name:
        blend = load_recipe(Blend, Path(name), overrides)
    else:
        raise IntarsiaError(f"there is no blend '{name}': there are {', '.join(blend_names())}, or a file of your own "
                            f"that ends in .toml.{did_you_mean(name, blend_names())}")
    if blend.base is not None:
        below = load_blend(blend.base)
        given = {key: getattr(blend, key) for key in blend.model_fields_set}
        blend = below.model_copy(update=given | {"base": None})
    if not blend.phases:
        raise IntarsiaError(f"the blend {name} has no phases: give [[phases]] with weights, or a base that has some.")
    return blend


def _shipped():
    return resources.files("intarsia") / "data" / "blends"
