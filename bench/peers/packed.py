"""Intarsia as it serves: a checkpoint on packed weights, prompts and decoded tokens; and what memory gives."""

from __future__ import annotations

# Before torch, as the command line does: it says how torch's threads wait.
import intarsia  # noqa: F401 # isort: skip

import time
from typing import Any

import torch

from intarsia.engine import Engine, Request
from intarsia.engine.generate import next_logits
from intarsia.formats import load
from intarsia.model import Cache, weight_bytes
from intarsia.model.decode import refusal
from peers.protocol import serve
from peers.torch_clock import now, tokens

BUDGET = 1 << 29  # bytes of an engine's caches


class Packed:
    """One model, and the cache that the last prefill left."""

    def load(self, folder: str, kind: str, room: int) -> dict[str, Any]:
        self.model, _ = load(folder, weights=kind)
        self.room = room
        how = "one native call a token" if self.model.native is not None else f"in torch ({refusal(self.model)})"
        return {"about": f"torch {torch.__version__}, decoding {how}", "bytes": weight_bytes(self.model)}

    def prefill(self, length: int, batch: int) -> float:
        """Seconds to read prompts and know what follows."""
        ids = tokens(self.model.arch.vocab_size, batch, length, self.model.device)
        self.cache = Cache(self.model.arch, batch, self.room, self.model.dtype)
        return self._timed(ids)

    def decode(self, count: int) -> list[float]:
        """Seconds of each of `count` greedy steps behind what was read."""
        return [self._timed(self.token) for _ in range(count)]

    def second_turn(self, opening: int, answer: int, question: int, remember: bool) -> dict[str, Any]:
        """Seconds to the first token of a conversation's second turn, and the tokens read for it."""
        engine = Engine(self.model, max_batch=1, budget_bytes=BUDGET, prefix_bytes=None if remember else 0)
        ids = tokens(self.model.arch.vocab_size, 1, opening + question, self.model.device)[0].tolist()
        first = engine.generate([Request(tuple(ids[:opening]), answer)])[0]
        second = Request((*ids[:opening], *first.answers[0].tokens, *ids[opening:]), 1)
        began = time.perf_counter()
        handle = engine.generate([second])[0]
        return {"seconds": time.perf_counter() - began, "read": len(second.prompt) - handle.cached_tokens}

    @torch.inference_mode()
    def _timed(self, ids: torch.Tensor) -> float:
        began = now(self.model.device)
        self.token = next_logits(self.model, ids, self.cache).argmax(-1, keepdim=True)
        return now(self.model.device) - began


def bandwidth(seconds: float = 0.3) -> float:
    """Bytes a second that all threads read of a block that no cache holds; the best of several passes."""
    block, best, end = torch.ones(1 << 25, dtype=torch.int64), 0.0, time.perf_counter() + seconds
    while time.perf_counter() < end:
        began = time.perf_counter()
        block.sum()
        best = max(best, block.numel() * 8 / (time.perf_counter() - began))
    return best


if __name__ == "__main__":
    peer = Packed()
    serve({"load": peer.load, "prefill": peer.prefill, "decode": peer.decode, "second_turn": peer.second_turn,
           "bandwidth": bandwidth})  # fmt: skip
