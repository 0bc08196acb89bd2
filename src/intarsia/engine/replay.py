"""A decoding step whose every tensor has one place and one shape, so that a GPU can replay it as a CUDA graph.

A step of a small model is hundreds of launches of microseconds each, which the processor takes longer to ask for than
the GPU to do. Recorded once for so many rows, they are asked for together. Rows that nobody uses run on the spare slot
and the spare pages of the storage.

Shape letters: R rows, H heads, K KV heads, P head dim, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch

from intarsia.engine.batch import Pass, Piece
from intarsia.engine.memory import Storage
from intarsia.model import Decoder, Rows
from intarsia.ops.paged_attention import paged_attention


class Replay:
    """Steps of up to `most` sequences: one `FixedStep` for every power of two that was needed."""

    def __init__(self, model: Decoder, storage: Storage, most: int):
        self._model, self._storage, self._most = model, storage, most
        self._steps: dict[int, FixedStep] = {}

    def run(self, pieces: Sequence[Piece]) -> None:
        """Move pieces of one generated token each through the model, and give them their logits."""
        count = min(self._most, 1 << (len(pieces) - 1).bit_length())
        if count not in self._steps:
            self._steps[count] = FixedStep(self._model, self._storage, count)
        self._steps[count].run(pieces)


class FixedStep(Pass):
    """One token of up to `count` sequences; the memory that the mixers see meanwhile (`model.cache.Memory`)."""

    def __init__(self, model: Decoder, storage: Storage, count: int):
        self.model, self.storage, device = model, storage, model.device
        pages = -(-model.arch.max_positions // storage.page)
        self.ids, self.positions = (torch.zeros(1, count, dtype=torch.int64, device=device) for _ in range(2))
        self.lengths = torch.ones(count, dtype=torch.int32, device=device)
        self.slots = torch.full((count,), storage.slots.size, device=device)
        self.tables, self.places = {}, {}
        for window, pool in storage.pages.items():
            self.tables[window] = torch.full((count, pages), pool.size, dtype=torch.int32, device=device)
            self.places[window] = torch.full((count,), pool.size * storage.page, device=device)
        model.rope_tables(0, model.arch.max_positions)  # as long as they will ever be: a graph knows their place
        self.graph = self._record() if device.type == "cuda" else None

    def run(self, pieces: Sequence[Piece]) -> None:
        self._fill(pieces)
        self._step() if self.graph is None else self.graph.replay()
        for row, piece in enumerate(pieces):
            piece.held.inputs = {}
            piece.logits, piece.best = self.logits[row : row + 1], self.best[row : row + 1]

    def _fill(self, pieces: Sequence[Piece]) -> None:
        """What the step reads: rows from `pieces`, behind them spare ones."""
        storage, spare, page = self.storage, self.ids.shape[1] - len(pieces), self.storage.page
        starts = [p.start for p in pieces] + [0] * spare
        _copy(self.ids[0], [p.tokens[0] for p in pieces] + [0] * spare)
        _copy(self.positions[0], starts)
        _copy(self.lengths, [start + 1 for start in starts])
        slots = storage.slots.size
        _copy(self.slots, [slots if p.held.slot is None else p.held.slot for p in pieces] + [slots] * spare)
        for window, pool in storage.pages.items():
            tables = [p.held.tables[window] for p in pieces]
            places = [p.held.place(window, p.start, page) for p in pieces]
            _copy(self.places[window], places + [pool.size * page] * spare)
            width = max(map(len, tables))
            filled = [t + [pool.size] * (width - len(t)) for t in tables] + [[pool.size] * width] * spare
            _copy(self.tables[window][:, :width], filled)

    @torch.inference_mode()
    def _step(self) -> None:
        rope = self.model.rope_tables(0, self.model.arch.max_positions, self.positions)
        x = self.model.run(self.model.embed_tokens(self.ids), cache=self, rope=rope)
        self.logits = self.model.head_logits(x)[0]
        self.best = self.logits.argmax(-1)

    def _record(self) -> torch.cuda.CUDAGraph:
        """The launches of a step, all of whose rows are spare. The first one, which compiles kernels, is not it."""
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            self._step()
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            self._step()
        return graph

    # What the mixers ask for.

    def attend(
        self, index: int, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, window: int | None, rows: Rows | None
    ) -> torch.Tensor:
        """q (1, H, R, P), k and v (1, K, R, P) -> (1, H, R, P)."""
        keys, values = self.storage.pairs[index]
        window = self.storage.window[index]
        for held, new in ((keys, k), (values, v)):
            held.flatten(0, 1).index_copy_(0, self.places[window], new[0].transpose(0, 1))
        queries = q[0].transpose(0, 1)
        found = paged_attention(queries, keys, values, self.tables[window], self.lengths, window)
        return found.transpose(0, 1)[None]

    def scan(self, index: int, run: Callable[..., torch.Tensor], *tokens: torch.Tensor) -> torch.Tensor:
        """Tokens (1, R, ...) -> (1, R, ...), each row from its own slot."""
        pair = self.storage.pairs[index]
        states = tuple(held.index_select(0, self.slots) for held in pair)
        out = run(*(t.transpose(0, 1) for t in tokens), states).transpose(0, 1)
        for held, moved in zip(pair, states):
            held.index_copy_(0, self.slots, moved)
        return out


def _copy(target: torch.Tensor, values: list) -> None:
    target.copy_(torch.tensor(values, dtype=target.dtype), non_blocking=True)
