"""Text as its tokens come: characters that are whole, and nothing that may turn out to be a stop string."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

UNFINISHED = "\ufffd"  # what decoders write for bytes that are not yet a character
_AHEAD = 8  # tokens decoded again with each new one; a character is spread over fewer


class Decodes(Protocol):
    def decode(self, ids: list[int], skip_special_tokens: bool = False) -> str: ...


class TextStream:
    """Turns ids into text a token at a time, in time linear in their number.

    `before` are the ids in front of the first, told already: some tokenizers drop the space at the front of a text.
    """

    def __init__(self, tokenizer: Decodes, before: Sequence[int] = ()):
        self._tokenizer = tokenizer
        self._ids = list(before[-_AHEAD:])  # the latest ones
        self._told = self._decode()  # what the text of `_ids` gave already
        if self._told.endswith(UNFINISHED):
            self._ids, self._told = [], ""

    def add(self, token: int) -> str:
        """The text that this token makes certain."""
        self._ids.append(token)
        whole = self._decode()
        if whole.endswith(UNFINISHED):
            return ""
        new, self._told = whole[len(self._told) :], whole
        if len(self._ids) > 2 * _AHEAD:
            self._ids = self._ids[-_AHEAD:]
            self._told = self._decode()
        return new

    def end(self) -> str:
        """What was held back, unfinished characters and all."""
        whole = self._decode()
        new, self._told = whole[len(self._told) :], whole
        return new

    def _decode(self) -> str:
        return self._tokenizer.decode(self._ids, skip_special_tokens=True)


class Stops:
    """Cuts a text before the first stop string, and holds back its end while that could begin one."""

    def __init__(self, stop: Sequence[str]):
        self._stop = tuple(s for s in stop if s)
        self._waiting = ""

    def add(self, text: str) -> tuple[str, bool]:
        """What is certain to stand before any stop string, and whether one has come."""
        self._waiting += text
        found = [at for at in (self._waiting.find(s) for s in self._stop) if at >= 0]
        if found:
            return self._waiting[: min(found)], True
        keep = self._could_begin()
        certain, self._waiting = self._waiting[: len(self._waiting) - keep], self._waiting[len(self._waiting) - keep :]
        return certain, False

    def end(self) -> str:
        """What waits, now that nothing comes after it."""
        text, self._waiting = self._waiting, ""
        return text

    def _could_begin(self) -> int:
        """The length of the longest end of the text with which a stop string begins."""
        longest = max((len(s) for s in self._stop), default=1) - 1
        for size in range(min(longest, len(self._waiting)), 0, -1):
            if any(s.startswith(self._waiting[-size:]) for s in self._stop):
                return size
        return 0
