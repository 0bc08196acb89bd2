"""The engine's memory: keys and values in pages for attention blocks, one slot a sequence for Mamba blocks.

A page holds some tokens of one sequence for every attention block of one window; blocks with different windows have
tables and pools of their own, for their pages leave at different times. A slot holds the conv inputs and the states of
all Mamba blocks. The two never mix: a page is a few kilobytes, a slot can be as large as thousands of tokens.

Shape letters: T tokens of a page, K KV heads (or the conv kernel), P head dim, C and E channels, H heads, N state.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch

from intarsia.arch import Architecture, Attention, Mamba1, Mamba2
from intarsia.arch.cost import block_cache_bytes
from intarsia.base.errors import IntarsiaError
from intarsia.engine.pool import Pool

if TYPE_CHECKING:
    from intarsia.engine.replay import Replay

Window = int | None


@dataclass
class Held:
    """What one sequence holds: its slot, and for every window the pages of its tokens in order.

    `tables[w][i]` is the page of tokens i*T .. i*T+T-1; `gone[w]` pages at the front have left the window and been
    given back. `inputs` are those of each Mamba block for tokens that a verification saw, of which the first `pending`
    are part of the text but not yet of the slot's state.
    """

    slot: int | None = None
    tables: dict[Window, list[int]] = field(default_factory=dict)
    gone: dict[Window, int] = field(default_factory=dict)
    inputs: dict[int, tuple[torch.Tensor, ...]] = field(default_factory=dict)
    pending: int = 0

    def place(self, window: Window, token: int, page: int) -> int:
        """Where a token's key and value are, counted in tokens over all pages."""
        return self.tables[window][token // page] * page + token % page


class Storage:
    """Pages and slots of a model, all allocated at once."""

    def __init__(
        self,
        arch: Architecture,
        tokens: int,
        slots: int,
        page: int = 32,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
        most_running: int = 1,
        reach: int = 1,
        spare: bool = False,
    ):
        """Room for `tokens` tokens in pages of `page`, and for `slots` sequences or snapshots.

        Blocks with a window get no more than `most_running` sequences need that each add `reach` tokens at a time, if
        there are blocks without. With `spare` there are a page of every window and a slot behind those of the pools,
        which nobody is given (`engine.replay`).
        """
        self.page, self.device = page, torch.device(device)
        self.slots = Pool(slots)
        windows = windows_of(arch)
        self.pages = {w: Pool(-(-tokens // page)) for w in windows}
        for w in windows:
            if w is not None and None in windows:
                self.pages[w] = Pool(min(self.pages[None].size, 2 * most_running * pages_within(w, page, reach)))
        self.page_bytes = page_bytes(arch, page, dtype)
        self.slot_bytes = slot_bytes(arch, dtype)
        self.recurrent = self.slot_bytes > 0
        self.pairs: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}
        wide = torch.promote_types(dtype, torch.float32)
        for index, block in enumerate(arch.blocks):
            if isinstance(block, Attention):
                count = self.pages[window_of(arch, block)].size + spare
                shape = (count, page, block.num_kv_heads, block.head_dim)
                self.pairs[index] = (torch.zeros(shape, dtype=dtype, device=device),
                                     torch.zeros(shape, dtype=dtype, device=device))  # fmt: skip
            elif isinstance(block, (Mamba1, Mamba2)):
                channels = block.conv_size if isinstance(block, Mamba2) else block.inner_size
                heads = (block.num_heads, block.head_dim) if isinstance(block, Mamba2) else (block.inner_size,)
                self.pairs[index] = (
                    torch.zeros(slots + spare, block.conv_kernel - 1, channels, dtype=dtype, device=device),
                    torch.zeros(slots + spare, *heads, block.state_size, dtype=wide, device=device),
                )
        self.replay: Replay | None = None  # runs steps of one token each, where that is set (`engine.engine`)
        self.mamba = [i for i, b in enumerate(arch.blocks) if isinstance(b, (Mamba1, Mamba2))]
        self.window = {i: window_of(arch, b) for i, b in enumerate(arch.blocks) if isinstance(b, Attention)}

    def states(self, index: int, slot: int, count: int = 1) -> tuple[torch.Tensor, torch.Tensor]:
        """Views of what `count` neighbouring slots hold for a Mamba block."""
        return tuple(held[slot : slot + count] for held in self.pairs[index])

    def clear_slot(self, slot: int) -> None:
        """The state before the first token."""
        for index in self.mamba:
            for held in self.pairs[index]:
                held[slot].zero_()

    def copy_slot(self, source: int, target: int) -> None:
        for index in self.mamba:
            for held in self.pairs[index]:
                held[target].copy_(held[source])

    def copy_page(self, window: Window, source: int, target: int) -> None:
        for index in (i for i, w in self.window.items() if w == window):
            for held in self.pairs[index]:
                held[target].copy_(held[source])

    @property
    def bytes(self) -> dict[str, int]:
        """Bytes that pages and slots in use hold, apart."""
        pages = sum(pool.used * self.page_bytes[w] for w, pool in self.pages.items())
        return {"pages": pages, "slots": self.slots.used * self.slot_bytes}

    @property
    def capacity(self) -> dict[str, int]:
        """Bytes allocated, apart."""
        pages = sum(pool.size * self.page_bytes[w] for w, pool in self.pages.items())
        return {"pages": pages, "slots": self.slots.size * self.slot_bytes}

    def release(self, held: Held) -> None:
        """Give everything back."""
        for window, table in held.tables.items():
            for place in table[held.gone[window] :]:
                self.pages[window].drop(place)
        if held.slot is not None:
            self.slots.drop(held.slot)
        held.slot, held.tables, held.gone, held.inputs, held.pending = None, {}, {}, {}, 0

    def leave_behind(self, held: Held, length: int) -> None:
        """Give back the pages that no query at position `length` or later can see."""
        for window, table in held.tables.items():
            if window is None:
                continue
            passed = max(0, length - window + 1) // self.page
            for place in table[held.gone[window] : passed]:
                self.pages[window].drop(place)
            held.gone[window] = max(held.gone[window], min(passed, len(table)))


def window_of(arch: Architecture, block: Attention) -> Window:
    """A window that no text of this model can fill is none."""
    return None if (block.sliding_window or arch.max_positions) >= arch.max_positions else block.sliding_window


def windows_of(arch: Architecture) -> list[Window]:
    """The different windows of its attention blocks, the unlimited one first."""
    found = {window_of(arch, b) for b in arch.blocks if isinstance(b, Attention)}
    return sorted(found, key=lambda w: (w is not None, w or 0))


def pages_within(window: int, page: int, reach: int) -> int:
    """Most pages that a sequence holds at once in blocks of this window, when it adds `reach` tokens at a time."""
    return (window + reach - 2) // page + 2


def page_bytes(arch: Architecture, page: int, dtype: torch.dtype) -> dict[Window, int]:
    """Bytes of one page, keys and values of all blocks of each window."""
    found = dict.fromkeys(windows_of(arch), 0)
    for block in arch.blocks:
        if isinstance(block, Attention):
            found[window_of(arch, block)] += 2 * page * block.num_kv_heads * block.head_dim * dtype.itemsize
    return found


def slot_bytes(arch: Architecture, dtype: torch.dtype) -> int:
    """Bytes of one slot: conv inputs and states of all Mamba blocks."""
    mamba = [b for b in arch.blocks if isinstance(b, (Mamba1, Mamba2))]
    return sum(block_cache_bytes(b, 0, 1, dtype.itemsize) for b in mamba)


def tokens_that_fit(arch: Architecture, page: int, dtype: torch.dtype, budget: int, slots: int) -> int:
    """Tokens for which a budget has pages once `slots` slots are paid. Raises `IntarsiaError` below one page."""
    states = slots * slot_bytes(arch, dtype)
    each = sum(page_bytes(arch, page, dtype).values())
    if states + each > budget:
        raise IntarsiaError(
            f"a cache of {budget:,} bytes is too small: {slots} states take {states:,} and one page of {page} tokens "
            f"{each:,}. Give a larger budget, or a smaller batch."
        )
    return (budget - states) // each * page if each else arch.max_positions * slots
