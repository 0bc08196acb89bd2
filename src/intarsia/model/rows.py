"""Rows that are more than one text after the other: padding, and several documents packed into one row.

Shape letters: B batch, L tokens of this call, T keys, C channels.
"""

from __future__ import annotations

from functools import cached_property

import torch

from intarsia.ops.attention import visible


class Rows:
    """What the mixers must know of a call's tokens when a row is not simply the next L tokens of one text.

    `keep` (B, L) boolean or None: False is padding, which no real token may notice. `segments` (B, L) integers,
    non-decreasing, or None: the document of every token. `before` are the real tokens that each row's cache holds, a
    number or (B,). `positions` (B, L) int64: the place of every real token in its document, padding left out.
    """

    def __init__(
        self,
        shape: tuple[int, int],
        device: torch.device,
        keep: torch.Tensor | None = None,
        segments: torch.Tensor | None = None,
        before: int | torch.Tensor = 0,
    ):
        self.keep, self.segments, self.before = keep, segments, before
        real = torch.ones(shape, dtype=torch.int64, device=device) if keep is None else keep.long()
        places = real.cumsum(1) - real
        if segments is not None:
            starts = torch.zeros(shape, dtype=torch.bool, device=device)
            starts[:, 1:] = segments[:, 1:] != segments[:, :-1]
            places = places - torch.where(starts, places, 0).cummax(1).values
        else:
            places = places + (before if isinstance(before, int) else before[:, None])
        self.positions = places
        self._masks: dict[int | None, torch.Tensor] = {}

    @property
    def after(self) -> int | torch.Tensor:
        """Real tokens in the cache after this call."""
        return self.before + (self.positions.shape[1] if self.keep is None else self.keep.sum(1))

    def mask(self, window: int | None) -> torch.Tensor:
        """Which token of this call sees which, (B, 1, L, L) boolean, without a cache."""
        if window not in self._masks:
            segments = None if self.segments is None else (self.segments, self.segments)
            self._masks[window] = visible(self.positions, self.positions, window, self.keep, segments)
        return self._masks[window]

    # A scan and its convolution pass over their tokens one by one. There padding stands in front of the real tokens,
    # so that the last state is that of the last real token, and whatever came before is next to the first.

    @cached_property
    def pads(self) -> torch.Tensor:
        """(B, 1) padded tokens of each row."""
        assert self.keep is not None
        return (~self.keep).sum(1, keepdim=True)

    @cached_property
    def real(self) -> torch.Tensor:
        """(B, L) boolean: is the token real, after `pads_first`?"""
        return torch.arange(self.positions.shape[1], device=self.pads.device) >= self.pads

    @cached_property
    def _order(self) -> tuple[torch.Tensor, torch.Tensor] | None:
        """The order with padding first and its inverse, (B, L) each; None if it is the order that is there."""
        assert self.keep is not None
        if torch.equal(self.keep, self.real):
            return None
        order = self.keep.long().argsort(dim=1, stable=True)
        return order, order.argsort(dim=1)

    def pads_first(self, x: torch.Tensor) -> torch.Tensor:
        """x (B, L, ...) with each row's padding moved to its front."""
        return x if self._order is None else _reorder(x, self._order[0])

    def pads_back(self, x: torch.Tensor) -> torch.Tensor:
        """Undo `pads_first`."""
        return x if self._order is None else _reorder(x, self._order[1])

    @cached_property
    def scan_segments(self) -> torch.Tensor | None:
        """`segments` in the order of `pads_first`; padding belongs to the first real token's document."""
        if self.keep is None or self.segments is None:
            return self.segments
        moved = self.pads_first(self.segments)
        first = moved.gather(1, self.pads.clamp(max=moved.shape[1] - 1))
        return torch.where(self.real, moved, first)


def _reorder(x: torch.Tensor, order: torch.Tensor) -> torch.Tensor:
    return x[torch.arange(len(x), device=x.device)[:, None], order]
