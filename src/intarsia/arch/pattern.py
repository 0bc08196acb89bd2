"""A model as a string, one letter a block: the pattern language of Megatron's and Nemotron's hybrids."""

from __future__ import annotations

from collections.abc import Mapping

from intarsia.arch.architecture import Architecture
from intarsia.arch.blocks import Block, kind
from intarsia.base.errors import IntarsiaError

# M, -, * and E are Megatron's letters. S (for S6) and L are ours, where Megatron has none.
LETTERS = {"mamba2": "M", "ffn": "-", "attention": "*", "experts": "E", "mamba1": "S", "linear": "L"}
_ELSEWHERE = {
    "|": "it cuts a model into pipeline stages, which a machine's recipe decides and not the architecture",
    "/": "what follows it describes heads that predict several tokens, which Intarsia does not have",
    "G": "it is a gated delta net, which Intarsia does not have",
}


def parse_pattern(text: str, blocks: Mapping[str, Block]) -> tuple[Block, ...]:
    """`parse_pattern("M-M*-", {"M": Mamba2(...), "-": FeedForward(...), "*": Attention(...)})` -> the blocks in order.

    Raises `IntarsiaError` for an empty pattern and for a letter without a block.
    """
    if not text:
        raise IntarsiaError("a pattern needs at least one letter, such as M-M*-.")
    for letter in text:
        if letter not in blocks:
            reason = _ELSEWHERE.get(letter, f"known here: {' '.join(blocks)}")
            raise IntarsiaError(f"the letter {letter!r} of the pattern {_shortened(text)!r} has no block: {reason}.")
    return tuple(blocks[letter] for letter in text)


def pattern_of(arch: Architecture) -> str:
    """The letters of a model's blocks, in order."""
    return "".join(LETTERS[kind(block)] for block in arch.blocks)


def _shortened(text: str, longest: int = 60) -> str:
    return text if len(text) <= longest else f"{text[: longest - 3]}..."
