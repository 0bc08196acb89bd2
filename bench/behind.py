"""Decoding behind a context that was not read: its memory is filled with zeros, which cost what any numbers cost."""

from __future__ import annotations

import torch
from peers.torch_clock import now, tokens

from intarsia.engine.generate import next_logits
from intarsia.model import Cache, Decoder


@torch.inference_mode()
def decode_behind(model: Decoder, context: int, batch: int, count: int) -> list[float]:
    """Seconds of each of `count` steps of `batch` sequences, after one to warm up."""
    cache = Cache(model.arch, batch, context + count + 1, model.dtype, model.device)
    for tensor in (t for held in cache.entries for t in held or ()):
        tensor.zero_()
    cache.length = context
    ids, seconds = tokens(model.arch.vocab_size, batch, 1, model.device), []
    for _ in range(count + 1):
        began = now(model.device)
        next_logits(model, ids, cache)
        seconds.append(now(model.device) - began)
    return seconds[1:]
