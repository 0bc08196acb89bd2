"""A last matrix moved by least squares: what a block's channels tell of an error of the stream.

A little text knows a big matrix badly, and one ridge suits some of its directions and not others. So a fit is a mixture
of the fits with several ridges, and of none, in the proportions that are best on other text, where no share is below
nothing (stacked regression, Breiman 1996): fits are nearly one along the channels of a few enormous tokens, and their
differences taken twentyfold are noise on any other text.

The norm of the block that reads the stream divides by its size, so every token's error counts relative to that. Without
it the few tokens whose stream is enormous are all that is fitted.

Shape letters: N rows, L tokens of each, D model, C inner channels.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from scipy.optimize import nnls

from intarsia.arch import Attention, FeedForward, Linear, Mamba2
from intarsia.compress.importance import ridge_solve
from intarsia.compress.library import FIT_TOKENS
from intarsia.compress.text import parts
from intarsia.compress.trainees import channels_of, last_matrix
from intarsia.model import ResidualBlock
from intarsia.model.mixers import Tables
from intarsia.ops.norm import rms_norm

RIDGES = (0.003, 0.1, 1.0, 10.0)  # times the mean square of a channel
STEADY = 1e-6  # of the mean diagonal, for fits that are nearly one
ONE = 1e4  # how strictly shares are one together
CHECKED = 4  # of the rows, one in so many says how the fits are mixed
FITTED = (Attention, FeedForward, Linear, Mamba2)  # what ends in one matrix

Moments = tuple[torch.Tensor, torch.Tensor]  # sum c c^T (C, C) and sum c e^T (C, D), weighed, float32


def inner(block: ResidualBlock, x: torch.Tensor, tables: Tables | None) -> torch.Tensor:
    """What the last matrix of a block reads, (N, L, C), of a stream x (N, L, D)."""
    return channels_of(block.mixer, rms_norm(x, block.norm.weight, block.eps), tables)


@dataclass(frozen=True)
class Passed:
    """Text on its way through a model: the stream x (N, L, D), and what the last matrix of the block before has read,
    (N, L, C); None where there is no such block."""

    x: torch.Tensor
    read: torch.Tensor | None = None

    def through(self, block: ResidualBlock, rope: dict[int, Tables]) -> Passed:
        """Behind a block. `rope`: the tables of the text."""
        tables = rope.get(getattr(block.spec, "head_dim", 0))
        if not isinstance(block.spec, FITTED):
            return Passed(torch.cat([block(part, tables) for part in parts(self.x)]))
        read = torch.cat([inner(block, part, tables) for part in parts(self.x)])
        return Passed(self.x + last_matrix(block.mixer)(read), read)

    def given(self, matrix: torch.Tensor) -> Passed:
        """With a last matrix before that gives `matrix` (C, D) more."""
        return Passed(self.x + (self.read.float() @ matrix).to(self.x.dtype), self.read)


def checked_rows(count: int, device: torch.device) -> torch.Tensor:
    """(count,) bool: the rows that say how fits are mixed. At least one where there are two."""
    return torch.arange(count, device=device) % CHECKED == min(CHECKED, count) - 1


def fitted(
    channels: torch.Tensor, errors: Sequence[torch.Tensor], beside: torch.Tensor, checked: torch.Tensor
) -> list[torch.Tensor | None]:
    """For each of several errors e (N, L, D) a matrix M (C, D) for which c M is near e on text that nobody has seen;
    None where the checked rows know of none. `beside` (N, L, D): the stream whose size errors are relative to."""
    wide = errors[0] if len(errors) == 1 else torch.cat(list(errors), -1)
    fitting, checking = (moments(channels[rows], wide[rows], beside[rows]) for rows in (~checked, checked))
    both = fitting[0] + checking[0], fitting[1] + checking[1]
    size = beside.shape[-1]
    split = [[fit.split(size, 1) for fit in fits(known)] for known in (fitting, both)]
    found: list[torch.Tensor | None] = []
    for n, cross in enumerate(checking[1].split(size, 1)):
        tried, whole = ([columns[n] for columns in made] for made in split)
        shares = proportions(tried, (checking[0], cross))
        found.append(None if shares is None else sum(share * fit for share, fit in zip(shares, whole)))
    return found


def moments(channels: torch.Tensor, errors: torch.Tensor, beside: torch.Tensor) -> Moments:
    """Of what a last matrix reads, and of that with errors, both relative to the stream `beside`."""
    gram, cross = 0.0, 0.0
    rows = max(1, FIT_TOKENS // channels.shape[1])
    for c, e, p in zip(*(t.split(rows) for t in (channels, errors, beside))):
        # Weights are powers of two, so that what was bfloat16 is still exact.
        weight = torch.exp2(-p.float().square().mean(-1, keepdim=True).log2().div(2).round())
        c, e = ((t.float() * weight).flatten(0, 1) for t in (c, e))
        gram, cross = gram + c.T @ c, cross + c.T @ e
    return gram, cross


def fits(known: Moments) -> list[torch.Tensor]:
    """The least squares of e from c, (C, D), with every ridge."""
    return [ridge_solve(*known, share) for share in RIDGES]


def proportions(made: Sequence[torch.Tensor], checking: Moments) -> list[float] | None:
    """How much of each fit makes the mixture that leaves least on the checked text: no share below 0, together at most
    1. None where no mixture leaves less."""
    gram, cross = checking
    read = [gram @ fit for fit in made]
    alike = torch.tensor([[float((a * b).double().sum()) for b in read] for a in made], dtype=torch.float64)
    told = torch.tensor([float((fit * cross).double().sum()) for fit in made], dtype=torch.float64)
    if not (alike.isfinite().all() and told.isfinite().all()):
        return None
    alike.diagonal().add_(STEADY * alike.diagonal().mean().clamp_min(1e-30))
    sizes, directions = torch.linalg.eigh(alike)  # which rounding may have left indefinite: Cholesky would fail then
    roots = sizes.clamp_min(STEADY * sizes.mean()).sqrt()
    whole = ONE * float(alike.diagonal().max()) ** 0.5  # what a sum of shares other than 1 costs
    system = F.pad(roots[:, None] * directions.T, (0, 1, 0, 1))  # the last share is that of no fit
    aim = told @ directions / roots
    system[-1] = whole
    shares = torch.from_numpy(nnls(system.numpy(), F.pad(aim, (0, 1), value=whole).numpy())[0][:-1])
    return shares.tolist() if float(told @ shares) > 0 else None
