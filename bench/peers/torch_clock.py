"""Seconds on a device, by the wall clock, with everything done that was asked of it."""

from __future__ import annotations

import time

import torch


def now(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def peak_bytes(device: torch.device) -> int:
    """Most memory that this process has held: allocated on a GPU, resident on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    from intarsia.base.machine import peak_rss_bytes

    return peak_rss_bytes()


def tokens(vocabulary: int, batch: int, length: int, device: torch.device) -> torch.Tensor:
    """Random ids (batch, length), always the same: what the tokens are does not change what they cost."""
    return torch.randint(vocabulary, (batch, length), generator=torch.Generator().manual_seed(0)).to(device)
