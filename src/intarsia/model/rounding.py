"""Weights that learn while they are kept as packing will round them (quantisation-aware training).

What is learned are masters of their own; a model runs and is differentiated at what they are rounded to, as if rounding
were nothing (straight-through, arXiv 1308.3432). Scales of four bits are fitted once, to the weights that a training
begins with: finding them takes longer than a step, and a training moves few weights by as much as a code. Those of int8
follow the weights, and what is left out of a sparse matrix is chosen anew every time, so that it may come back (SR-STE,
arXiv 2102.04010, without its decay).
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F

from intarsia.model.decoder import ResidualBlock
from intarsia.model.packed import Importance, matrices
from intarsia.ops.int4 import GROUP, entries, rounded
from intarsia.ops.packed import WEIGHED, eight_bits, four_bits, sparsified

Matrix = Callable[[torch.Tensor], torch.Tensor]  # a weight (O, I) -> the same rounded, in its dtype


@torch.no_grad()
def rounding(block: ResidualBlock, kind: str, importance: Importance | None = None) -> Callable[[ResidualBlock], None]:
    """What rounds, in place, the matrices of a block like this one as packing as `kind` will. `importance`: of the
    inputs of its matrices, by name, for int4 and int4+."""
    ways = {name: _way(m.weight, kind, (importance or {}).get(name)) for name, m in matrices(block)}

    @torch.no_grad()
    def settle(other: ResidualBlock) -> None:
        for name, matrix in matrices(other):
            matrix.weight.copy_(ways[name](matrix.weight))

    return settle


def _way(weight: torch.Tensor, kind: str, importance: torch.Tensor | None) -> Matrix:
    if kind == "sparse":
        return lambda now: sparsified(now.bfloat16()).to(now.dtype)
    if kind not in WEIGHED:
        return lambda now: _matrix(torch.mul(*eight_bits(_groups(now))), now)
    _, lines, *words = four_bits(_groups(weight), kind, importance, weight.shape[1])
    places = entries(words[0])[0] if words else None
    return lambda now: _matrix(rounded(_groups(now), lines, places), now)


def _groups(weight: torch.Tensor) -> torch.Tensor:
    """(O, I) -> (O, G, 32) float32, filled up with zeros."""
    return F.pad(weight.float(), (0, -weight.shape[1] % GROUP)).unflatten(1, (-1, GROUP))


def _matrix(groups: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    """`_groups` undone, in the dtype of another."""
    return groups.flatten(1)[:, : like.shape[1]].to(like.dtype)
