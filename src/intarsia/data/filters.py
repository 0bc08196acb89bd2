"""Simple quality filters: rules that a document must pass. All are off unless asked for.

The rules and the values of `GOPHER` are those of Rae et al., "Scaling Language Models: Methods, Analysis & Insights
from Training Gopher" (2021), section A.1.1, for English web text; the share of repeated lines is from the same section.
Words are what stands between blanks: for scripts without blanks, and for code, set only rules that make sense there.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Iterable
from dataclasses import dataclass

from intarsia.base.errors import IntarsiaError, did_you_mean

STOP_WORDS = frozenset(("the", "be", "to", "of", "and", "that", "have", "with"))


@dataclass(frozen=True)
class Filters:
    """Bounds that a document must keep; None is no bound. Their order is the order in which they are tried."""

    min_words: int | None = None
    max_words: int | None = None
    min_word_length: float | None = None  # mean characters of a word
    max_word_length: float | None = None
    max_symbols: float | None = None  # `#` and ellipses for each word
    max_bullets: float | None = None  # share of lines that begin with a bullet
    max_ellipses: float | None = None  # share of lines that end in an ellipsis
    min_letters: float | None = None  # share of words with at least one letter
    min_stop_words: int | None = None  # how many of STOP_WORDS occur
    max_repeated_lines: float | None = None  # share of lines that stood before in the document

    @functools.cached_property
    def bounds(self) -> dict[str, float]:
        """The rules that are on."""
        return {name: bound for name, bound in dataclasses.asdict(self).items() if bound is not None}

    def broken(self, text: str) -> str | None:
        """The first rule that `text` breaks, or None."""
        if not self.bounds:
            return None
        words, lines = text.split(), [line.strip() for line in text.splitlines() if line.strip()]
        for rule, bound in self.bounds.items():
            value = MEASURES[rule[4:]](words, lines)
            if value < bound if rule.startswith("min_") else value > bound:
                return rule
        return None


def _share(hits: Iterable[bool], total: int) -> float:
    return sum(hits) / max(total, 1)


MEASURES = {  # by the rule's name without min_ or max_
    "words": lambda words, lines: len(words),
    "word_length": lambda words, lines: sum(map(len, words)) / max(len(words), 1),
    "symbols": lambda words, lines: sum(w.count("#") + w.count("...") + w.count("…") for w in words)
    / max(len(words), 1),
    "bullets": lambda words, lines: _share((line[0] in "-*•‣" for line in lines), len(lines)),
    "ellipses": lambda words, lines: _share((line.endswith(("...", "…")) for line in lines), len(lines)),
    "letters": lambda words, lines: _share((any(map(str.isalpha, word)) for word in words), len(words)),
    "stop_words": lambda words, lines: len(STOP_WORDS.intersection(map(str.lower, words))),
    "repeated_lines": lambda words, lines: 1 - len(set(lines)) / max(len(lines), 1),
}

RULES = tuple(field.name for field in dataclasses.fields(Filters))
GOPHER = Filters(
    min_words=50, max_words=100_000, min_word_length=3, max_word_length=10, max_symbols=0.1, max_bullets=0.9,
    max_ellipses=0.3, min_letters=0.8, min_stop_words=2, max_repeated_lines=0.3,
)


def parse_filters(settings: Iterable[str]) -> Filters:
    """`gopher` for all of `GOPHER`, and `rule=value` over it. Raises `IntarsiaError` for an unknown rule or no number.
    """
    chosen = Filters()
    for setting in settings:
        rule, equals, value = setting.partition("=")
        if setting == "gopher":
            chosen = GOPHER
        elif not equals or rule not in RULES:
            raise IntarsiaError(f"'{setting}' is no filter: it is gopher, or one of {', '.join(RULES)} as rule=value."
                                f"{did_you_mean(rule, (*RULES, 'gopher'))}")
        else:
            try:
                chosen = dataclasses.replace(chosen, **{rule: float(value)})
            except ValueError as error:
                raise IntarsiaError(f"the filter {rule} needs a number, not '{value}'.") from error
    return chosen
