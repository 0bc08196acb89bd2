"""What generation remembers: keys and values of the attention blocks, and of no other block."""

from __future__ import annotations

import torch

from intarsia.arch import Architecture, Attention
from intarsia.base.errors import IntarsiaError


class Cache:
    """Preallocated keys and values, (B, K, max_length, P) for each attention block, None for every other block."""

    def __init__(
        self,
        arch: Architecture,
        batch: int,
        max_length: int,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
    ):
        self.length = 0  # tokens held so far; the decoder moves it after the last block
        self.max_length = max_length
        self.keep: torch.Tensor | None = None  # (B, T) boolean over old and new tokens; False is padding
        self.entries: list[tuple[torch.Tensor, torch.Tensor] | None] = []
        for block in arch.blocks:
            if isinstance(block, Attention):
                shape = (batch, block.num_kv_heads, max_length, block.head_dim)
                pair = (torch.empty(shape, dtype=dtype, device=device), torch.empty(shape, dtype=dtype, device=device))
                self.entries.append(pair)
            else:
                self.entries.append(None)

    def extend(self, index: int, k: torch.Tensor, v: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Store k, v (B, K, L, P) of block `index` behind what is held; return all of them, (B, K, T, P)."""
        entry = self.entries[index]
        assert entry is not None, "only attention blocks have a cache"
        end = self.length + k.shape[2]
        if end > self.max_length:
            raise IntarsiaError(f"the cache holds {self.max_length} tokens and was asked for {end}: make a longer one.")
        entry[0][:, :, self.length : end] = k
        entry[1][:, :, self.length : end] = v
        return entry[0][:, :, :end], entry[1][:, :, :end]

    @property
    def bytes(self) -> int:
        """Bytes allocated."""
        return sum(t.numel() * t.element_size() for pair in self.entries if pair for t in pair)
