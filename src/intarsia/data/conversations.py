"""Conversations and pairs of answers as rows of JSON, and what becomes of such a row as tokens.

    {"messages": [{"role": "user", "content": ...}, {"role": "assistant", "content": ...}, ...]}
    {"prompt": TEXT or messages, "chosen": TEXT or messages, "rejected": ..., "rewards": [of chosen, of rejected]}
"""

from __future__ import annotations

import json
import math
from typing import Any, NamedTuple

from intarsia.base.errors import IntarsiaError

Message = dict[str, Any]  # role, content, and whatever else a chat template reads

# Kinds of data, and the fields of a row that make a document of them.
FIELDS: dict[str, str | tuple[str, ...]] = {
    "text": "text", "conversations": ("messages",), "preferences": ("prompt", "chosen", "rejected", "rewards"),
}  # fmt: skip


class Encoded(NamedTuple):
    """A document as tokens; without any, it is left out.

    `mask` has a byte for every token, 1 where it counts in the loss (None: all do); `bytes` is the UTF-8 length of the
    text that counts. Of a pair, `tokens` hold the prompt with the chosen answer and the prompt with the rejected one,
    and `pair` the tokens of the first and the rewards of both (NaN where none is given).
    """

    tokens: list[int]
    mask: bytes | None = None
    bytes: int | None = None
    pair: tuple[int, float, float] | None = None


class Pair(NamedTuple):
    """Two answers to a prompt, and their rewards."""

    prompt: list[Message]
    chosen: list[Message]
    rejected: list[Message]
    rewards: tuple[float, float]


def read_messages(text: str) -> list[Message]:
    """The conversation of a row. Raises `IntarsiaError` for what is none, or where the assistant says nothing."""
    messages = _messages(json.loads(text).get("messages"), text)
    if not any(message["role"] == "assistant" for message in messages):
        raise IntarsiaError(f"the assistant says nothing in {_told(text)}: there is nothing to learn from it.")
    return messages


def read_pair(text: str) -> Pair:
    """The preference of a row; a text as prompt is the user's, a text as answer the assistant's."""
    row = json.loads(text)
    sides = []
    for name, role in (("prompt", "user"), ("chosen", "assistant"), ("rejected", "assistant")):
        given = row.get(name)
        sides.append(_messages([{"role": role, "content": given}] if isinstance(given, str) else given, text, name))
    rewards = row.get("rewards", (math.nan, math.nan))
    if len(rewards) != 2 or not all(isinstance(r, (int, float)) for r in rewards):
        raise IntarsiaError(f"the rewards of {_told(text)} are not two numbers, of the chosen and the rejected answer.")
    return Pair(*sides, (float(rewards[0]), float(rewards[1])))


def _messages(given: Any, text: str, name: str = "messages") -> list[Message]:
    rows = given if isinstance(given, list) else []
    if not rows or not all(isinstance(m, dict) and isinstance(m.get("role"), str) and isinstance(m.get("content"), str)
                           for m in rows):
        raise IntarsiaError(f"'{name}' of {_told(text)} is no conversation: it is a list of objects such as "
                            '{"role": "user", "content": "..."}.')
    return rows


def _told(text: str) -> str:
    return f"the row {text[:80]}{'...' if len(text) > 80 else ''}"
