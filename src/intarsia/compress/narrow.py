"""Narrower Mamba-2 blocks: which heads, head channels and state channels matter, and the slices that keep them.

Heads of one group share B and C, so heads leave inside their group, as many from each; a head channel is one for all
heads; a state channel leaves B and C alike (Minitron-SSM, arXiv 2504.11409, section 3; Model-Optimizer's Mamba-2
surgery). Heads and channels are ranked on what the projection to x gives, which the paper found better than z or the
output. All of it comes from the second moments of the calibration pass.

Shape letters: D model, H heads, P head dim, G groups, N state.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from intarsia.arch import Mamba2
from intarsia.base.errors import IntarsiaError
from intarsia.compress.statistics import Statistics
from intarsia.model.mamba import Mamba2Mixer

STATE_MEASURES = ("balanced", "energy")


@dataclass(frozen=True)
class Kept:
    """What stays of a block: heads (H'), channels of every head (P'), states of every group (G, N'), as indices; each
    in the order in which it is to stand."""

    heads: torch.Tensor
    channels: torch.Tensor
    states: torch.Tensor

    @classmethod
    def everything(cls, spec: Mamba2) -> Kept:
        states = torch.arange(spec.state_size).expand(spec.num_groups, -1)
        return cls(torch.arange(spec.num_heads), torch.arange(spec.head_dim), states)

    def first(self, parent: Mamba2, child: Mamba2) -> Kept:
        """Of an order of all that `parent` has, as much as `child` takes: the first."""
        heads = self.heads.unflatten(0, (parent.num_groups, -1))[:, : child.num_heads // parent.num_groups]
        return Kept(heads.flatten(), self.channels[: child.head_dim], self.states[:, : child.state_size])

    def backwards(self, spec: Mamba2) -> Kept:
        """The same the other way round, heads inside their groups."""
        heads = self.heads.unflatten(0, (spec.num_groups, -1)).flip(1).flatten()
        return Kept(heads, self.channels.flip(0), self.states.flip(1))

    def inner(self, spec: Mamba2) -> torch.Tensor:
        """Indices into the parent's HP channels, (H'P',)."""
        return (self.heads[:, None] * spec.head_dim + self.channels).flatten()

    def shared(self, spec: Mamba2) -> torch.Tensor:
        """Indices into the parent's GN channels of B, or of C, (GN',)."""
        return (torch.arange(spec.num_groups)[:, None] * spec.state_size + self.states).flatten()


def x_power(mixer: Mamba2Mixer, stats: Statistics) -> torch.Tensor:
    """(H, P): sum over tokens of the square of what the projection to x gives, before the convolution."""
    spec = mixer.spec
    weight = mixer.in_proj.weight[spec.inner_size : 2 * spec.inner_size].float()
    power = ((weight @ stats.inputs) * weight).sum(1)
    if mixer.in_proj.bias is not None:
        bias = mixer.in_proj.bias[spec.inner_size : 2 * spec.inner_size].float()
        power = power + 2 * bias * (weight @ stats.total) + stats.tokens * bias.square()
    return power.unflatten(0, (spec.num_heads, spec.head_dim))


def state_power(stats: Statistics, groups: int, measure: str = "balanced") -> torch.Tensor:
    """(G, N): how much a state channel matters.

    `energy`: its square after a text, over the heads of the group. `balanced`: controllability times observability (cf.
    GHOST, puzzle.md 4.1). A decays all channels of a head alike, so to tokens without memory the Gramians of a channel
    are those of a scalar filter that all share, times the mean square of what writes it (B) and of what reads it (C).
    Raises `IntarsiaError` for another measure.
    """
    if measure not in STATE_MEASURES:
        raise IntarsiaError(f"state measure {measure!r} is not known; known: {', '.join(STATE_MEASURES)}.")
    power = stats.states if measure == "energy" else stats.writes * stats.reads
    return power.unflatten(0, (groups, -1))


def rank_mamba(mixer: Mamba2Mixer, child: Mamba2, stats: Statistics, states: str = "balanced") -> Kept:
    """What a narrower `child` keeps, most important first.

    Channels by their power over all heads; heads by their power in the channels that stay, within their group; states
    by the measure `states`.
    """
    spec, power = mixer.spec, x_power(mixer, stats)
    channels = _descending(power.sum(0))[: child.head_dim]
    heads = power[:, channels].sum(1).unflatten(0, (spec.num_groups, -1))
    first = torch.arange(spec.num_groups)[:, None] * heads.shape[1]
    kept = (_descending(heads)[:, : child.num_heads // spec.num_groups] + first).flatten()
    order = _descending(state_power(stats, spec.num_groups, states))
    return Kept(kept, channels, order[:, : child.state_size])


def _descending(power: torch.Tensor) -> torch.Tensor:
    return power.argsort(dim=-1, descending=True, stable=True)


@torch.no_grad()
def slice_mamba(parent: Mamba2Mixer, child: Mamba2Mixer, kept: Kept) -> None:
    """Copy what stays into `child`. Its gated norm is over the channels that stay, which only a fit of the output
    projection to its new readings (`library.fit_trainees`) can make up for."""
    spec = parent.spec
    inner, shared, width = kept.inner(spec), kept.shared(spec), spec.num_groups * spec.state_size
    convolved = torch.cat([inner, spec.inner_size + shared, spec.inner_size + width + shared])
    steps = spec.inner_size + spec.conv_size + kept.heads
    rows = torch.cat([inner, spec.inner_size + convolved, steps])
    child.in_proj.weight.copy_(parent.in_proj.weight[rows])
    child.conv.weight.copy_(parent.conv.weight[convolved])
    child.norm.weight.copy_(parent.norm.weight[inner])
    child.out_proj.weight.copy_(parent.out_proj.weight[:, inner])
    for name in parent.FLOAT32:
        getattr(child, name).copy_(getattr(parent, name)[kept.heads])
    if parent.in_proj.bias is not None:
        child.in_proj.bias.copy_(parent.in_proj.bias[rows])
        child.out_proj.bias.copy_(parent.out_proj.bias)
    if parent.conv.bias is not None:
        child.conv.bias.copy_(parent.conv.bias[convolved])
