"""Numbered places, pages or slots, that are taken, shared and given back."""

from __future__ import annotations

import heapq


class Pool:
    """`size` places; each counts its holders and is free again when the last has dropped it.

    The lowest free place is taken first: what is taken together tends to lie together, and is then read without a copy.
    """

    def __init__(self, size: int):
        self.size = size
        self.holders = [0] * size
        self._free = list(range(size))

    @property
    def free(self) -> int:
        return len(self._free)

    @property
    def used(self) -> int:
        return self.size - len(self._free)

    def take(self) -> int | None:
        """A place with one holder; None if all are taken."""
        if not self._free:
            return None
        place = heapq.heappop(self._free)
        self.holders[place] = 1
        return place

    def share(self, place: int) -> int:
        """One more holder of a taken place."""
        assert self.holders[place] > 0, "only a taken place can be shared"
        self.holders[place] += 1
        return place

    def drop(self, place: int) -> None:
        """One holder less."""
        assert self.holders[place] > 0, "this place is free already"
        self.holders[place] -= 1
        if not self.holders[place]:
            heapq.heappush(self._free, place)
