"""What is left out is taken over: scores of left-out blocks, with the block before them fitted to what is missing.

A child is mended before it learns (`mend`), and most of all that helps where blocks were left out: what one of them
added is in good part linear in what the block before it reads. A score that knows nothing of that takes leaving out for
two to four times the harm that it is. So wherever an option leaves something out, the last matrix of the block before
it gives that as well, as far as the text tells, and only then the parent runs on. (ReplaceMe, arXiv 2505.02819, fits a
matrix of its own behind the block before.)

Teacher-forced like all scores: one pass of the parent over the text of the fits goes beside the scorer's own.

Shape letters: N rows, L tokens of each, D model, C inner channels.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch

from intarsia.compress.options import NONE, OptionSpec, Site
from intarsia.compress.ridges import Passed, checked_rows, fitted
from intarsia.model import Decoder, ResidualBlock
from intarsia.ops.precise import exact_products

Slots = Sequence[ResidualBlock | None]  # what stands where the parent has a block; None: nothing


class Takeover:
    """Walks through a model beside a scorer of `seen` (B, L') int64. rows (N, L) int64: the text of the fits, N at
    least 2."""

    def __init__(self, model: Decoder, seen: torch.Tensor, rows: torch.Tensor):
        rows, seen = rows.to(model.device), seen.to(model.device)
        self.model, self.checked = model, checked_rows(len(rows), rows.device)
        self.ropes = [model.rope_tables(0, ids.shape[1]) for ids in (rows, seen)]
        # Of both texts before the site and behind its blocks; what the block before it gives more, by where that ends.
        self.steps = [[Passed(model.embed_tokens(ids)) for ids in (rows, seen)]]
        self.before: list[torch.Tensor | None] | None = None

    @torch.inference_mode()
    def enter(self, site: Site) -> None:
        """Come to a site, from the end of the one before it."""
        self.steps, self.before = self.steps[-1:], None
        self.blocks = [self.model.blocks[index] for index in site.blocks]
        with exact_products(self.model.dtype):
            for block in self.blocks:
                self.steps.append(self._through(block, self.steps[-1]))

    @torch.inference_mode()
    def stream(self, slots: Slots) -> torch.Tensor:
        """The scorer's stream (B, L', D) behind what stands in the site's slots: what is left out is taken over by the
        block before it, where there is one that can."""
        at, gap = self.steps[0], False
        with exact_products(self.model.dtype):
            for n, block in enumerate(slots):
                if block is not None:
                    at = self._taken(at, n) if gap else at
                    own = at is self.steps[n] and block is self.blocks[n]
                    at = self.steps[n + 1] if own else self._through(block, at)
                gap = block is None
            return (self._taken(at, len(slots)) if gap else at)[1].x

    def _through(self, block: ResidualBlock, both: list[Passed]) -> list[Passed]:
        return [text.through(block, rope) for text, rope in zip(both, self.ropes)]

    def _taken(self, both: list[Passed], end: int) -> list[Passed]:
        """Both texts with what the last block before gives more, where all up to the site's block `end` is left out
        behind it."""
        if both[0].read is None:
            return both
        if both is not self.steps[0]:
            matrix = self._fitted(both[0], [end])[0]
        else:  # all ends at once: they share all but what is told of the error
            self.before = self.before or self._fitted(both[0], range(1, len(self.steps)))
            matrix = self.before[end - 1]
        return both if matrix is None else [text.given(matrix) for text in both]

    def _fitted(self, text: Passed, ends: Sequence[int]) -> list[torch.Tensor | None]:
        errors = [self.steps[end][0].x.float() - text.x.float() for end in ends]
        return fitted(text.read, errors, text.x, self.checked)


def leaves_out(specs: Iterable[OptionSpec | None]) -> bool:
    """Whether one of the options is to have nothing where the parent has a block."""
    return any(spec is not None and spec.method == NONE for spec in specs)
