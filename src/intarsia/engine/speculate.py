"""Speculative decoding: guess the next tokens cheaply, verify all guesses in one pass of the model.

A guess g drawn from q is accepted with probability min(1, p(g) / q(g)); on the first rejection the token is drawn from
max(p - q, 0) instead. So answers have the distribution of the model alone, whatever guesses (Leviathan et al., arXiv
2211.17192, section 2.3), and at temperature 0 they are the same tokens.

Mamba blocks keep one state a sequence, that before the guesses, and the inputs of the pass; those of the accepted
tokens are replayed in the next pass (`batch.Piece.tentative`; Mamba in the Llama, arXiv 2408.15237, algorithm 2).
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Protocol

import numpy as np

from intarsia.base.errors import IntarsiaError
from intarsia.engine.batch import TILE, Piece, run_pieces
from intarsia.engine.memory import Held, Storage
from intarsia.engine.sampling import draw
from intarsia.engine.sequence import Sequence
from intarsia.model import Decoder

MOST = TILE - 1  # guesses that are verified at once, beside the token before them


@dataclass
class Draft:
    """Guesses at the next tokens, and for each what it was drawn from, (V,); None where it was not drawn."""

    tokens: list[int] = field(default_factory=list)
    probs: list[np.ndarray | None] = field(default_factory=list)


class Drafter(Protocol):
    def propose(self, sequences: list[Sequence], most: list[int]) -> list[Draft]:
        """For each of the sequences that generate now, at most so many guesses."""
        ...


def verified(sequence: Sequence, logits: np.ndarray, guess: int, q: np.ndarray | None) -> int:
    """The next token, drawn from what the model says, (V,); often it is the guess."""
    p = sequence.probabilities(logits)
    likely = 1.0 if q is None else q[guess]
    if sequence.number(1) * likely < p[guess]:
        return guess
    rest = p.copy()
    if q is None:
        rest[guess] = 0
    else:
        rest = np.maximum(p - q, 0)
    return draw(rest, sequence.number(2))


class LookupDrafter:
    """Guesses that a text goes on as it did when its last few tokens stood in it before (prompt lookup).

    The longest of `longest` to `shortest` last tokens that is found decides, and its latest occurrence.
    """

    def __init__(self, longest: int = 3, shortest: int = 2):
        self.longest, self.shortest = longest, shortest

    def propose(self, sequences: list[Sequence], most: list[int]) -> list[Draft]:
        found = [self._continuation(s.tokens, count) for s, count in zip(sequences, most)]
        return [Draft(tokens, [None] * len(tokens)) for tokens in found]

    def _continuation(self, tokens: list[int], most: int) -> list[int]:
        text = np.asarray(tokens)
        for size in range(min(self.longest, len(text) - 1), self.shortest - 1, -1):
            places = np.lib.stride_tricks.sliding_window_view(text[:-1], size)
            same = np.flatnonzero((places == text[-size:]).all(1))
            if len(same):
                start = int(same[-1]) + size
                return tokens[start : start + most]
        return []


@dataclass
class _Own:
    """What the draft model remembers of a sequence: its memory over the text, and a slot to guess in."""

    held: Held
    guessing: Held
    computed: int = 0


class ModelDrafter:
    """A smaller model of the same vocabulary guesses. Its memory is its own, beside the engine's budget; a sequence for
    which there is no room in it goes on without guesses."""

    def __init__(self, model: Decoder, tokens: int, max_batch: int, page: int = 32, chunk: int = 256):
        """Memory for texts of `tokens` tokens in all, and for `max_batch` of them at once."""
        self.model, self.chunk = model, chunk
        self.storage = Storage(
            model.arch, tokens, 2 * max_batch, page, model.dtype, model.device, max_batch, max(chunk, TILE)
        )
        self._own: dict[Sequence, _Own] = {}

    def propose(self, sequences: list[Sequence], most: list[int]) -> list[Draft]:
        self._release(set(sequences))
        drafts = [Draft() for _ in sequences]
        running = []
        for sequence, count, draft in zip(sequences, most, drafts):
            if count > 0 and self._room(sequence, len(sequence.tokens) + count):
                running.append((sequence, count, draft))
        logits = self._catch_up([sequence for sequence, _, _ in running])
        for ahead in range(max((count for _, count, _ in running), default=0)):
            pieces = []
            for sequence, count, draft in running:
                if ahead < count:
                    token, probs = self._guess(sequence, logits[sequence], ahead)
                    draft.tokens.append(token)
                    draft.probs.append(probs)
                if ahead + 1 < count:
                    held, place = self._own[sequence].guessing, len(sequence.tokens) + ahead
                    pieces.append((sequence, Piece(held, place, [token], steps=True, want=1)))
            run_pieces(self.model, self.storage, [piece for _, piece in pieces])
            logits = {sequence: piece.logits[-1].float().cpu().numpy() for sequence, piece in pieces}
        return drafts

    @staticmethod
    def _guess(sequence: Sequence, logits: np.ndarray, ahead: int) -> tuple[int, np.ndarray | None]:
        probs = sequence.probabilities(logits)
        if sequence.sampling.temperature == 0:
            return int(probs.argmax()), probs
        return draw(probs, sequence.number(3, ahead)), probs

    def _catch_up(self, sequences: list[Sequence]) -> dict[Sequence, np.ndarray]:
        """Read what is new in the texts; what the draft model says of the token after each. Guessing starts there."""
        logits = {}
        while True:
            pieces = []
            for sequence in sequences:
                own, length = self._own[sequence], len(sequence.tokens)
                if own.computed < length:
                    steps = length - own.computed <= TILE
                    tokens = sequence.tokens[own.computed : own.computed + self.chunk]
                    want = int(own.computed + len(tokens) == length)
                    pieces.append((sequence, Piece(own.held, own.computed, tokens, steps, want=want)))
            if not pieces:
                break
            run_pieces(self.model, self.storage, [piece for _, piece in pieces])
            for sequence, piece in pieces:
                own = self._own[sequence]
                own.computed += len(piece.tokens)
                self.storage.leave_behind(own.held, own.computed)
                if piece.want:
                    logits[sequence] = piece.logits[-1].float().cpu().numpy()
                    self.storage.copy_slot(own.held.slot, own.guessing.slot)
        return logits

    def _room(self, sequence: Sequence, length: int) -> bool:
        """Slots, and pages for `length` tokens; False, and nothing is held, if they are not to be had."""
        own = self._own.get(sequence)
        if own is None:
            held = Held(tables={w: [] for w in self.storage.pages}, gone=dict.fromkeys(self.storage.pages, 0))
            own = self._own[sequence] = _Own(held, Held(tables=held.tables, gone=held.gone))
            for each in (own.held, own.guessing):
                each.slot = self.storage.slots.take()
            if own.guessing.slot is None:
                self._drop(sequence)
                return False
            self.storage.clear_slot(own.held.slot)
        for window, pool in self.storage.pages.items():
            table = own.held.tables[window]
            while len(table) * self.storage.page < length:
                place = pool.take()
                if place is None:
                    self._drop(sequence)
                    return False
                table.append(place)
        return True

    def _release(self, alive: set[Sequence]) -> None:
        for sequence in [s for s in self._own if s not in alive]:
            self._drop(sequence)

    def _drop(self, sequence: Sequence) -> None:
        own = self._own.pop(sequence)
        if own.guessing.slot is not None:
            self.storage.slots.drop(own.guessing.slot)
        self.storage.release(own.held)


def check_draft(draft: Decoder, model: Decoder) -> None:
    """Raise `IntarsiaError` for a draft model that does not speak the model's language."""
    if draft.arch.vocab_size != model.arch.vocab_size or draft.arch.max_positions < model.arch.max_positions:
        raise IntarsiaError(
            f"a draft model with {draft.arch.vocab_size} tokens and a context of {draft.arch.max_positions} cannot "
            f"guess for one with {model.arch.vocab_size} and {model.arch.max_positions}: the vocabulary must be the "
            "same and the context as long."
        )
