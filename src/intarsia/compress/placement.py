"""How much attention may stay and where, as costs and bounds of the search: the rules of Nemotron-H (2504.03624, 2.1).

About 8 % of a hybrid's blocks are attention. They are evenly dispersed, none is the first mixer, and each stands
directly before an FFN. All of it is linear in the choice: what is counted is an option's cost, what is allowed a bound.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from intarsia.arch import Attention, Block, Experts, FeedForward
from intarsia.compress.options import Site
from intarsia.compress.solve import Bound, Option

BLOCKS, MISPLACED = "blocks", "misplaced"
SLACK = 1e-6  # of a block: 0.1 x 60 need not come out as 6


class Placement:
    """Attention is at most `share` of the child's blocks. The layers are cut into as many equal stretches as the parent
    could keep attentions, and into halves of these; any two halves side by side keep one attention at most. So no two
    stand nearer than half a stretch."""

    words = "as little attention as may stay"

    def __init__(self, share: float, sites: Sequence[Site]):
        self.share, self.layers = share, len(sites)
        self.first = next((s.layer for s in sites if s.attention is not None), 0)  # the layer of the first mixer
        blocks = sum((s.attention is not None) + (s.ffn is not None) for s in sites)
        self.most = math.floor(share * blocks + SLACK)
        self.halves = max(1, 2 * self.most)

    def half(self, layer: int) -> int:
        return layer * self.halves // self.layers

    def costs(self, layer: int, attention: Block | None, ffn: Block | None) -> dict[str, float]:
        """What a pair at a layer adds to the counts."""
        kept = isinstance(attention, Attention)
        misplaced = kept and not isinstance(ffn, (FeedForward, Experts))
        if layer == self.first:  # were it left out, the next mixer would be the first
            misplaced = kept or attention is None
        counts = {_half(n): float(kept and n == self.half(layer)) for n in range(self.halves)}
        return counts | {BLOCKS: (attention is not None) + (ffn is not None) + 0.0, MISPLACED: float(misplaced)}

    def ties(self, attention: Block | None, ffn: Block | None) -> dict[str, str]:
        """Nothing must be as in other layers."""
        return {}

    def bounds(self) -> list[Bound]:
        all_of_them = {_half(n): 1.0 for n in range(self.halves)}
        share = Bound(f"{self.share:.3g} of the blocks", all_of_them | {BLOCKS: -self.share}, SLACK, counts=True)
        placed = Bound("attention not first and before an FFN", {MISPLACED: 1.0}, 0.0, counts=True)
        pairs = [Bound(self._stretch(n), {_half(n): 1.0, _half(n + 1): 1.0}, 1.0, counts=True)
                 for n in range(self.halves - 1)]  # fmt: skip
        return [share, placed, *pairs]

    def _stretch(self, half: int) -> str:
        layers = [layer for layer in range(self.layers) if self.half(layer) in (half, half + 1)]
        span = f"{layers[0]} to {layers[-1]}" if layers else "none"
        return f"one attention in layers {span} ({half + 1})"

    def evenly(self, sites: Sequence[Site]) -> list[int]:
        """The layers that keep attention where it is simply spaced evenly, as published hybrids are."""
        spaced = {math.ceil((n + 0.5) * self.layers / self.most) for n in range(self.most)}  # where second halves begin
        fit = sorted(n for n in spaced if n < self.layers and n != self.first)
        return [n for n in fit if sites[n].attention is not None]

    def stuck(self, options: Sequence[Sequence[Option]]) -> list[int]:
        """Layers where every choice keeps attention or breaks a rule, so that nothing can give way."""
        return [n for n, site in enumerate(options)
                if all(o.costs[_half(self.half(n))] or o.costs[MISPLACED] for o in site)]  # fmt: skip


def _half(number: int) -> str:
    return f"attention_{number}"
