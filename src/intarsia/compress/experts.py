"""Experts: fewer of them, and experts out of a dense FFN, without training.

A dense FFN is a sum over its channels, so any partition of them into experts is the same FFN while all are in use. What
is to be found is a partition in which few matter to a token:

- `cmoe` (arXiv 2502.04416): channels that most tokens mark are shared by all; the others are clustered by which tokens
  mark them;
- `moefication` (arXiv 2110.01786): clustered by their weights, the rows of the matrix that decides whether they fire.

Both clusterings only need inner products (how many tokens mark both channels; of two rows), so the tokens themselves
are not kept. Clusters have equal sizes: for these, the nearest centre is the most similar one, in L1 over marks and in
L2 over rows alike, since all that is left of a distance are sums that no assignment changes. The router looks at the
one channel of every cluster that is nearest to its centre.

Shape letters: D model, E experts, I intermediate channels.
"""

from __future__ import annotations

import torch
from scipy.optimize import linear_sum_assignment

from intarsia.compress.statistics import Statistics
from intarsia.model import ExpertsMixer
from intarsia.model.mlp import Mlp

SWEEPS = 4  # of the clustering; its authors make one


def rank_experts(stats: Statistics) -> torch.Tensor:
    """(E,) int64, most important first: how often a token uses an expert, times its weight, times what it says."""
    return stats.experts.argsort(descending=True, stable=True)


@torch.no_grad()
def slice_experts(parent: ExpertsMixer, child: ExpertsMixer, order: torch.Tensor) -> None:
    """Copy the first experts of `order` (E,), as many from every group, in that order, with their rows of the router.

    Tokens of those that leave go to the next in their own order: nothing else of the router changes.
    """
    groups = parent.spec.num_expert_groups
    size, kept = parent.spec.num_experts // groups, child.spec.num_experts // groups
    first = torch.stack([order[order // size == group][:kept] for group in range(groups)]).flatten()
    for name, parameter in child.named_parameters():
        source = parent.get_parameter(name)
        parameter.copy_(source if name.startswith("shared.") else source[first])


@torch.no_grad()
def cut_up(parent: Mlp, child: ExpertsMixer, stats: Statistics, method: str) -> None:
    """Fill `child` with the channels of a dense FFN, by `cmoe` or `moefication`. Its shared channels, if it has any,
    are those that most tokens mark."""
    spec = child.spec
    by_rate = stats.marks.diagonal().argsort(descending=True, stable=True)
    shared, rest = by_rate[: spec.shared_size], by_rate[spec.shared_size :]
    rows = (parent.gate if spec.gated else parent.up).weight[rest].float()
    likeness = stats.marks[rest][:, rest] if method == "cmoe" else rows @ rows.T
    clusters = balanced_clusters(likeness, spec.num_experts)
    members, heads = rest[clusters], rest[representatives(likeness, clusters)]
    names = ("gate", "up") if spec.gated else ("up",)
    for name in names:
        getattr(child.experts, name).copy_(getattr(parent, name).weight[members])
    child.experts.down.copy_(parent.down.weight.T[members].transpose(1, 2))
    if spec.shared_size:
        for name in names:
            getattr(child.shared, name).weight.copy_(getattr(parent, name).weight[shared])
        child.shared.down.weight.copy_(parent.down.weight[:, shared])
    # What the channel adds to the output, not the channel, is compared with the others'.
    size = parent.down.weight[:, heads].float().norm(dim=0)[:, None]
    child.router.weight.copy_(parent.up.weight[heads] * (size if spec.gated else size.sqrt()))
    if spec.gated:
        child.router.gate.copy_(parent.gate.weight[heads])
    child.router.bias.zero_()
    child.router.scale.zero_()


def balanced_clusters(likeness: torch.Tensor, count: int, sweeps: int = SWEEPS) -> torch.Tensor:
    """(count, I / count) int64: channels in clusters of equal size, each most like the mean of its cluster.

    likeness (I, I): inner products.
    """
    clusters = assign(likeness[:, first_centres(likeness, count)])
    for _ in range(sweeps - 1):
        moved = assign(likeness[:, clusters].mean(-1))
        if torch.equal(moved, clusters):
            break
        clusters = moved
    return clusters


def first_centres(likeness: torch.Tensor, count: int) -> torch.Tensor:
    """(count,): the channel of the largest inner product with itself, then always the one farthest from all chosen.
    With marks these are channels of high rate, as in CMoE, that do not all fire for the same tokens."""
    size = likeness.diagonal()
    chosen, nearest = [int(size.argmax())], torch.full_like(size, torch.inf)
    while len(chosen) < count:
        nearest = torch.minimum(nearest, size + size[chosen[-1]] - 2 * likeness[chosen[-1]])
        nearest[chosen] = -torch.inf
        chosen.append(int(nearest.argmax()))
    return torch.tensor(chosen)


def assign(likeness: torch.Tensor) -> torch.Tensor:
    """likeness (I, count) to centres -> (count, I / count): equal shares of the channels, of the largest sum."""
    count = likeness.shape[1]
    size = len(likeness) // count
    places = likeness.double().numpy().repeat(size, axis=1)
    _, place = linear_sum_assignment(places, maximize=True)
    return (torch.as_tensor(place) // size).argsort(stable=True).unflatten(0, (count, size))


def representatives(likeness: torch.Tensor, clusters: torch.Tensor) -> torch.Tensor:
    """(count,): of every cluster the channel that is nearest to its centre."""
    own = likeness[clusters[:, :, None], clusters[:, None, :]]  # (count, size, size)
    distance = own.diagonal(dim1=1, dim2=2) - 2 * own.mean(-1)
    return clusters.gather(1, distance.argmin(1, keepdim=True))[:, 0]
