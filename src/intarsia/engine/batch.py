"""One pass through the model: pieces of many sequences side by side, each with its own memory.

Matrices multiply all tokens of the pass together; attention, convolutions and scans see one sequence at a time. So
there is no padding in a recurrence, and nothing of a neighbour in a result.

A float32 model gives every sequence bit for bit what it gives alone (`exact`). The sums of a matrix product depend on
how many rows it has, though not on where a row stands: so steps run in passes of `TILE` rows, always, and each piece
of a prompt in a pass of its own, cut at the same places whoever else is there. (Not so with `Experts`: the rows of an
expert are those of all sequences that chose it.)

Shape letters: T tokens of the pass, L of a piece, D model, H heads, K KV heads, P head dim, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property

import torch

from intarsia.engine.memory import Held, Storage
from intarsia.model import Decoder, Rows
from intarsia.ops.attention import attend
from intarsia.ops.paged_attention import gather_pages, paged_attention

TILE = 16  # a matrix product reads its weights once for so many rows in the time that it takes for one


@dataclass
class Piece:
    """The next `tokens` of one sequence, of which `start` are in its memory.

    `steps`: as if one came after the other (generated tokens), else a stretch of a prompt. `tentative`: the tokens may
    be taken back, so the slot stays as it is and their inputs are kept (Mamba in the Llama, arXiv 2408.15237,
    algorithm 2). `want`: for how many of its last tokens the logits are wanted. Pages for all of them are there.
    """

    held: Held
    start: int
    tokens: list[int]
    steps: bool = False
    tentative: bool = False
    want: int = 0
    logits: torch.Tensor | None = field(default=None, repr=False)  # (want, V) after the pass,
    best: torch.Tensor | None = field(default=None, repr=False)  # and the likeliest token of each, (want,)

    @property
    def one(self) -> bool:
        """Is it one generated token that stays?"""
        return self.steps and len(self.tokens) == 1 and not (self.tentative or self.held.pending)


@torch.inference_mode()
def run_pieces(model: Decoder, storage: Storage, pieces: Sequence[Piece]) -> int:
    """Move every piece through the model and give it its logits; how many passes that took."""
    exact = is_exact(model)
    passes = 0
    for group in _passes(pieces, exact, model.native is not None or storage.replay is not None):
        if storage.replay is not None and not exact and all(p.one for p in group):
            storage.replay.run(group)
        else:
            _Batch(model, storage, group, exact).run()
        passes += 1
    return passes


def is_exact(model: Decoder) -> bool:
    """Does a sequence get bit for bit what it gets alone?"""
    return model.dtype.itemsize >= 4


def _passes(pieces: Sequence[Piece], exact: bool, apart: bool) -> Iterator[list[Piece]]:
    """Which pieces go together: all of them, but single steps where something else decodes those `apart`; in exact mode
    steps up to a tile, and each piece of a prompt alone."""
    steps = sorted((p for p in pieces if p.steps), key=lambda p: p.held.slot)
    rest = [p for p in pieces if not p.steps]
    if not exact:
        decoded = [p for p in steps if apart and p.one]
        others = [p for p in steps if not (apart and p.one)] + rest
        yield from (group for group in (decoded, others) if group)
        return
    group: list[Piece] = []
    for piece in steps:
        if sum(len(p.tokens) for p in group) + len(piece.tokens) > TILE:
            yield group
            group = []
        group.append(piece)
    if group:
        yield group
    yield from ([piece] for piece in rest)


class Pass:
    """What every pass of the engine tells the mixers (`model.cache.Memory`): nothing is padded, and the engine itself
    knows how far each sequence is."""

    length = 0

    def rows(self, x: torch.Tensor) -> Rows | None:
        return None

    def advance(self, length: int, rows: Rows | None) -> None:
        pass


class _Batch(Pass):
    """The memory that the mixers see in one pass. Rows of steps come first, then stretches of prompts."""

    def __init__(self, model: Decoder, storage: Storage, pieces: list[Piece], exact: bool):
        self.model, self.storage, self.pieces, self.exact = model, storage, pieces, exact
        self.steps = [p for p in pieces if p.steps]
        self.prompts = [p for p in pieces if not p.steps]
        ids = [t for p in pieces for t in p.tokens]
        positions = [p.start + i for p in pieces for i in range(len(p.tokens))]
        self.real, self.stepping = len(ids), sum(len(p.tokens) for p in self.steps)
        if exact and self.steps:
            ids, positions = ([*given, *[0] * (TILE - len(given))] for given in (ids, positions))
        self.ids, self.positions = (torch.tensor([given], device=model.device) for given in (ids, positions))
        self.end = max(positions) + 1
        self.tables = {w: self._tables(w) for w in storage.pages} if self.steps else {}
        self.lengths = torch.tensor(positions[: self.stepping], dtype=torch.int32) + 1

    @cached_property
    def places(self) -> dict[int | None, torch.Tensor]:
        """For every window (T,): where each token's key and value go, counted in tokens over all pages."""
        size, found = self.storage.page, {}
        for window in self.storage.pages:
            places = [p.held.place(window, p.start + i, size) for p in self.pieces for i in range(len(p.tokens))]
            found[window] = torch.tensor(places, device=self.model.device)
        return found

    def _tables(self, window: int | None) -> torch.Tensor:
        """(rows of steps, most) int32: the pages of each row's sequence."""
        tables = [p.held.tables[window] for p in self.steps for _ in p.tokens]
        most = max(len(t) for t in tables)
        return torch.tensor([t + [0] * (most - len(t)) for t in tables], dtype=torch.int32)

    def run(self) -> None:
        if self.model.native is not None and all(p.one for p in self.pieces):
            return self._run_native()
        rope = self.model.rope_tables(0, self.end, self.positions)
        x = self.model.run(self.model.embed_tokens(self.ids), cache=self, rope=rope)
        for piece in self.steps:
            piece.held.pending = 0
            if not piece.tentative:
                piece.held.inputs = {}
        self._read_logits(x)

    def _run_native(self) -> None:
        native, storage = self.model.native, self.storage
        memory = native.memory_of(storage, lambda: storage.pairs)
        tables = [self.tables.get(w, self.tables.get(None)) for w in native.windows]  # one that cannot fill is none
        slots = torch.tensor([p.held.slot or 0 for p in self.pieces], dtype=torch.int32)
        logits = native(self.ids[0], self.lengths, memory, tables, slots)
        for piece in self.pieces:
            piece.held.inputs = {}
        self._give(logits)

    def _read_logits(self, x: torch.Tensor) -> None:
        """The head over the rows that are wanted; in exact mode over all rows of steps, whose number is then fixed."""
        at, wanted = 0, []
        for piece in self.pieces:
            at += len(piece.tokens)
            wanted.append(range(at - piece.want, at))
        rows = [row for part in wanted for row in part]
        if not rows:
            return
        if self.exact and self.steps:
            self._give(self.model.head_logits(x)[0, rows])
        else:
            self._give(self.model.head_logits(x[:, rows])[0])

    def _give(self, logits: torch.Tensor) -> None:
        """Every piece its rows of logits (sum of what is wanted, V), and what is likeliest in them."""
        counts = [p.want for p in self.pieces]
        for piece, part, best in zip(self.pieces, logits.split(counts), logits.argmax(-1).split(counts)):
            piece.logits, piece.best = part, best

    # What the mixers ask for: `model.cache.Memory`.

    def attend(
        self, index: int, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, window: int | None, rows: Rows | None
    ) -> torch.Tensor:
        """q (1, H, T, P), k and v (1, K, T, P) -> (1, H, T, P)."""
        keys, values = self.storage.pairs[index]
        window = self.storage.window[index]
        for held, new in ((keys, k), (values, v)):
            held.flatten(0, 1)[self.places[window]] = new[0].transpose(0, 1)[: self.real]
        out = torch.zeros_like(q)
        n = self.stepping
        if n:
            queries = q[0, :, :n].transpose(0, 1)
            found = paged_attention(queries, keys, values, self.tables[window], self.lengths, window)
            out[0, :, :n] = found.transpose(0, 1)
        for piece in self.prompts:
            part, end = slice(n, n + len(piece.tokens)), piece.start + len(piece.tokens)
            first = 0 if window is None else max(0, piece.start - window + 1)
            seen = (gather_pages(held, piece.held.tables[window], first, end) for held in (keys, values))
            out[:, :, part] = attend(q[:, :, part], *seen, window)
            n = part.stop
        return out

    def scan(self, index: int, run: Callable[..., torch.Tensor], *tokens: torch.Tensor) -> torch.Tensor:
        """Tokens (1, T, ...) -> (1, T, ...), each sequence from its own slot."""
        found, at = [], 0
        for together in self._neighbours():
            count = sum(len(p.tokens) for p in together)
            part = [t[:, at : at + count] for t in tokens]
            if len(together) > 1:
                states = self.storage.states(index, together[0].held.slot, count)
                found.append(run(*(t.transpose(0, 1) for t in part), states).transpose(0, 1))
            else:
                found.append(self._scan_piece(together[0], index, run, part))
            at += count
        padding = tokens[0].shape[1] - at
        if padding:
            found.append(found[0].new_zeros(1, padding, found[0].shape[2]))
        return torch.cat(found, 1)

    def _neighbours(self) -> Iterator[list[Piece]]:
        """Pieces whose states one call moves on: single steps in slots that lie side by side."""
        group: list[Piece] = []
        for piece in self.pieces:
            plain = piece.one and not self.exact
            if not (plain and group and piece.held.slot == group[-1].held.slot + 1):
                if group:
                    yield group
                group = []
            group.append(piece)
            if not plain:
                yield group
                group = []
        if group:
            yield group

    def _scan_piece(self, piece: Piece, index: int, run: Callable, tokens: list[torch.Tensor]) -> torch.Tensor:
        held, states = piece.held, self.storage.states(index, piece.held.slot)
        run = self._one_by_one(run) if self.exact and piece.steps else run
        if held.pending:
            run(*(t[:, : held.pending] for t in held.inputs[index]), states)
        if piece.tentative:
            held.inputs[index] = tuple(t.clone() for t in tokens)
            states = tuple(t.clone() for t in states)
        return run(*tokens, states)

    @staticmethod
    def _one_by_one(run: Callable) -> Callable:
        def each(*given):
            *tokens, states = given
            length = tokens[0].shape[1]
            return torch.cat([run(*(t[:, i : i + 1] for t in tokens), states) for i in range(length)], 1)

        return each
