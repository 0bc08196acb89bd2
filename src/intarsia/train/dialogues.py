"""Conversations and pairs of answers as tokens with the loss on what the assistant says."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

from intarsia.base.errors import IntarsiaError
from intarsia.base.files import fingerprint
from intarsia.data.conversations import Encoded, Message, Pair, read_messages, read_pair
from intarsia.formats import Tokenizer
from intarsia.formats.chat import chat_pieces, with_template


class Dialogues:
    """A tokenizer of rows of JSON as `data.build` asks one, by a chat template.

    `kind` is "conversations" or "preferences"; of these, a pair that is longer than `length` tokens together is left
    out. The template writes how a conversation ends, so that no separator follows it.
    """

    eos_id = None

    def __init__(self, tokenizer: Tokenizer, kind: str, template: str | None = None, length: int = 0):
        self.tokenizer = with_template(tokenizer, None if template is None else _read(template))
        self.kind, self.length = kind, length
        self.vocab_size, self.fingerprint = tokenizer.vocab_size, tokenizer.fingerprint
        self.manner = fingerprint(kind, self.tokenizer.chat_template, length if kind == "preferences" else 0)

    def save(self, folder: str | os.PathLike) -> None:
        (Path(folder) / "tokenizer_config.json").unlink(missing_ok=True)  # it may be of another template
        self.tokenizer.save(folder)

    def encode_documents(self, texts: Sequence[str]) -> list[Encoded]:
        """Rows of JSON -> documents."""
        if self.kind == "conversations":
            return self._encoded([chat_pieces(self.tokenizer, read_messages(text)) for text in texts])
        pairs = [read_pair(text) for text in texts]
        both = self._encoded([chat_pieces(self.tokenizer, pair.prompt + answer, len(pair.prompt)) for pair in pairs
                              for answer in (pair.chosen, pair.rejected)])  # fmt: skip
        return [self._pair(*each) for each in zip(pairs, both[::2], both[1::2])]

    def count(self, messages: list[Message]) -> int:
        """Tokens of a conversation."""
        pieces = [text for text, _ in chat_pieces(self.tokenizer, messages)]
        return sum(map(len, self.tokenizer.encode_batch(pieces)))

    def _encoded(self, conversations: list[list[tuple[str, bool]]]) -> list[Encoded]:
        flat = iter(self.tokenizer.encode_batch([text for pieces in conversations for text, _ in pieces]))
        made = []
        for pieces in conversations:
            tokens, mask, size = [], b"", 0
            for (text, said), ids in zip(pieces, flat):  # the shorter stands first: nothing of `flat` is lost
                tokens += ids
                mask += bytes([said]) * len(ids)
                size += len(text.encode()) * said
            made.append(Encoded(tokens, mask, size))
        return made

    def _pair(self, pair: Pair, chosen: Encoded, rejected: Encoded) -> Encoded:
        if len(chosen.tokens) + len(rejected.tokens) > self.length or not (any(chosen.mask) and any(rejected.mask)):
            return Encoded([], b"", 0, (0, *pair.rewards))
        return Encoded(chosen.tokens + rejected.tokens, chosen.mask + rejected.mask, chosen.bytes + rejected.bytes,
                       (len(chosen.tokens), *pair.rewards))  # fmt: skip


def _read(template: str) -> str:
    path = Path(template).expanduser()
    if not path.is_file():
        raise IntarsiaError(f"there is no chat template {path} (data.template): name a file in Jinja.")
    return path.read_text(encoding="utf-8")
