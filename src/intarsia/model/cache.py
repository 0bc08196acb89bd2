"""What generation remembers: keys and values of attention, the states of scans and their convolutions.

Shape letters: B batch, L new tokens, T keys, K KV heads (or the conv kernel), P head dim, S slots.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

import torch
import torch.nn.functional as F

from intarsia.arch import Architecture, Attention, Block, Mamba1, Mamba2
from intarsia.base.errors import IntarsiaError
from intarsia.model.rows import Rows
from intarsia.ops.attention import attend, visible

Pair = tuple[torch.Tensor, torch.Tensor]


class Memory(Protocol):
    """What a mixer asks of whatever remembers for it: `Cache` here, a batch of many sequences in the engine."""

    length: int

    def rows(self, x: torch.Tensor) -> Rows | None: ...

    def advance(self, length: int, rows: Rows | None) -> None: ...

    def attend(
        self, index: int, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, window: int | None, rows: Rows | None
    ) -> torch.Tensor:
        """Store k, v (B, K, L, P) of block `index` and answer its queries (B, H, L, P) from all that is held."""
        ...

    def scan(self, index: int, run: Callable[..., torch.Tensor], *tokens: torch.Tensor) -> torch.Tensor:
        """`run(*tokens, states)` over tokens (B, L, ...) of a Mamba block; it moves its states on in place."""
        ...


class Cache:
    """Preallocated memory for `batch` texts of up to `max_length` tokens, one entry a block.

    Attention: keys and values (B, K, S, P), S the `max_length` or the window if that is shorter; a real token stands
    in slot position mod S, padding in none. Mamba: the last K-1 inputs of the convolution (B, K-1, C) and the state,
    (B, H, P, N) or (B, E, N), float32. None for every other block.
    """

    def __init__(
        self,
        arch: Architecture,
        batch: int,
        max_length: int,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
    ):
        self.length = 0  # tokens held so far, padding included; the decoder moves it after the last block
        self.max_length = max_length
        # (B, T) boolean over old and new tokens: False is padding. Tokens after the T-th are real.
        self.keep: torch.Tensor | None = None
        self.counts: torch.Tensor | None = None  # (B,) real tokens held; None while there was no padding
        self.entries = [_entry(block, batch, max_length, dtype, device) for block in arch.blocks]

    def rows(self, x: torch.Tensor, keep: torch.Tensor | None = None) -> Rows | None:
        """How the next tokens, x (B, L, ...), stand: `keep` (B, L), else what `self.keep` says; None: plainly."""
        shape = x.shape[:2]
        if keep is None and self.keep is not None:
            keep = self.keep[:, self.length : self.length + shape[1]]
            keep = F.pad(keep, (0, shape[1] - keep.shape[1]), value=True)
        if keep is not None and bool(keep.all()):
            keep = None
        if keep is None and self.counts is None:
            return None
        return Rows(shape, x.device, keep, before=self.length if self.counts is None else self.counts)

    def advance(self, length: int, rows: Rows | None) -> None:
        """`length` more tokens have gone through all blocks."""
        self.length += length
        if rows is not None:
            self.counts = rows.after

    def scan(self, index: int, run: Callable[..., torch.Tensor], *tokens: torch.Tensor) -> torch.Tensor:
        """See `Memory`. The states are the conv inputs and the state of the scan."""
        entry = self.entries[index]
        assert entry is not None, "this block has no state"
        return run(*tokens, entry)

    def attend(
        self, index: int, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, window: int | None, rows: Rows | None
    ) -> torch.Tensor:
        """See `Memory`."""
        k, v, mask = self.extend(index, k, v, window, rows)
        return attend(q, k, v, window, mask)

    def reserve(self, length: int) -> None:
        """Raises `IntarsiaError` where there is no room for `length` more tokens."""
        end = self.length + length
        if end > self.max_length:
            raise IntarsiaError(f"the cache holds {self.max_length} tokens and was asked for {end}: make a longer one.")

    def extend(
        self, index: int, k: torch.Tensor, v: torch.Tensor, window: int | None = None, rows: Rows | None = None
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
        """Store k, v (B, K, L, P) of block `index`; return all that its queries may see, (B, K, T, P), and a mask.

        Mask None: the queries are the last of T tokens that stand in order. Else (B or 1, 1, L, T) boolean.
        """
        entry = self.entries[index]
        assert entry is not None, "only attention blocks have keys and values"
        slots, length = entry[0].shape[2], k.shape[2]
        self.reserve(length)
        end = self.length + length
        if rows is None and end <= slots:
            for held, new in zip(entry, (k, v)):
                held[:, :, self.length : end] = new
            return entry[0][:, :, :end], entry[1][:, :, :end], None
        if rows is not None:  # slots stay open where there is padding; a mask hides them only if they are finite
            for held in entry:
                held[:, :, self.length : end] = 0
        if length == 1 and (rows is None or rows.keep is None):
            return self._replace(entry, k, v, rows)
        rows = rows or Rows((1, length), k.device, before=self.length)
        old = _positions(min(self.length, slots), slots, rows.before, k.device).expand(len(rows.positions), -1)
        places = torch.cat([old, rows.positions], 1)
        keep = torch.ones_like(rows.positions, dtype=torch.bool) if rows.keep is None else rows.keep
        mask = visible(rows.positions, places, window, torch.cat([old >= 0, keep], 1))
        seen = [torch.cat([held[:, :, : old.shape[1]], new], 2) for held, new in zip(entry, (k, v))]
        _store(entry, k, v, rows, keep)
        return seen[0], seen[1], mask

    def _replace(
        self, entry: Pair, k: torch.Tensor, v: torch.Tensor, rows: Rows | None
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
        """One real token a row takes the place of the one that its window leaves behind."""
        slots = entry[0].shape[2]
        if rows is None:
            for held, new in zip(entry, (k, v)):
                held[:, :, self.length % slots] = new[:, :, 0]
            return *entry, None
        batch, place = torch.arange(len(k), device=k.device), rows.positions[:, 0] % slots
        for held, new in zip(entry, (k, v)):
            held[batch, :, place] = new[:, :, 0]
        used = min(self.length + 1, slots)
        filled = _positions(used, slots, rows.after, k.device) >= 0
        return entry[0][:, :, :used], entry[1][:, :, :used], filled[:, None, None]

    @property
    def bytes(self) -> int:
        """Bytes allocated."""
        return sum(t.numel() * t.element_size() for pair in self.entries if pair for t in pair)


def _entry(block: Block, batch: int, max_length: int, dtype: torch.dtype, device) -> Pair | None:
    if isinstance(block, Attention):
        slots = min(max_length, block.sliding_window or max_length)
        shape = (batch, block.num_kv_heads, slots, block.head_dim)
        return torch.empty(shape, dtype=dtype, device=device), torch.empty(shape, dtype=dtype, device=device)
    if isinstance(block, Mamba2):
        channels, state = block.conv_size, (block.num_heads, block.head_dim, block.state_size)
    elif isinstance(block, Mamba1):
        channels, state = block.inner_size, (block.inner_size, block.state_size)
    else:
        return None
    held = torch.zeros(batch, block.conv_kernel - 1, channels, dtype=dtype, device=device)
    return held, torch.zeros(batch, *state, dtype=torch.promote_types(dtype, torch.float32), device=device)


def _positions(used: int, slots: int, count: int | torch.Tensor, device: torch.device) -> torch.Tensor:
    """The position in the first `used` slots when `count` tokens, a number or (B,), went in; negative where none is.

    The last position that is congruent to the slot: (B or 1, used).
    """
    last = (count if isinstance(count, torch.Tensor) else torch.tensor([count], device=device))[:, None] - 1
    return last - (last - torch.arange(used, device=device)) % slots


def _store(entry: Pair, k: torch.Tensor, v: torch.Tensor, rows: Rows, keep: torch.Tensor) -> None:
    """Put the last real tokens of every row into their slots."""
    slots = entry[0].shape[2]
    after = rows.after if isinstance(rows.after, torch.Tensor) else torch.tensor([rows.after], device=k.device)
    lasting = (keep & (rows.positions >= after[:, None] - slots)).expand(len(k), -1)
    batch, token = lasting.nonzero(as_tuple=True)
    place = rows.positions.expand(len(k), -1)[batch, token] % slots
    for held, new in zip(entry, (k, v)):
        held[batch, :, place] = new[batch, :, token]
