"""A Mamba-2 block from an attention block (Mamba in the Llama, arXiv 2408.15237, Algorithm 1).

Attention without its softmax is a linear recurrence: the state sums v k^T, a query reads it. So V becomes x, K B, Q C
and O out_proj, with keys and values repeated for the query heads that share them, to learn apart from then on. z, dt,
the convolution, A, D and the norm are new.

Where the paper draws the new parameters at random, here they are set so that nothing stands between the copied ones:
the convolution looks at its own token, the gate is open, and A and dt are spread over what they are usually drawn from.
The convolution's SiLU is nearly linear on small numbers, so values are made small, which the norm behind the scan
undoes; queries and keys go a little into its bend.

Shape letters: D model, H query heads, K KV heads, P head dim.
"""

from __future__ import annotations

import torch

from intarsia.compress.importance import ridge_solve
from intarsia.compress.statistics import Statistics
from intarsia.model.attention import GroupedAttention
from intarsia.model.mamba import Mamba2Mixer

OPEN = 2.0  # what the gate reads on the average token: SiLU(2) = 1.76
SIZES = (0.1, 0.6, 0.6)  # root mean square of x, B and C before their SiLU
DECAYS, TIME_STEPS = (1.0, 16.0), (1e-3, 0.1)  # A and dt, as Mamba-2 draws them


@torch.no_grad()
def attention_to_mamba(parent: GroupedAttention, child: Mamba2Mixer, stats: Statistics) -> None:
    """Fill `child`, H heads of P channels over a state of P, each head with its own B and C.

    Positions are left out (the recurrence has its own sense of distance), and so is 1/sqrt(P), as the norm behind the
    scan takes any factor out. Biases carry over. Norms of queries and keys do so on average: their rows are scaled to
    the mean square that the norm would give them.
    """
    group, width = parent.spec.group, child.spec.inner_size
    moments = _moments(stats)
    q, k, v = (_rows(parent, name, moments) for name in "qkv")
    parts = [v.repeat_interleave(group, 0), k.repeat_interleave(group, 0), q]
    copied = torch.cat(parts).flatten(0, 1)
    child.in_proj.weight.zero_()
    child.in_proj.weight[width : 4 * width] = copied[:, :-1]
    child.out_proj.weight.copy_(parent.o.weight)
    if child.in_proj.bias is not None:
        child.in_proj.bias.zero_()
        child.in_proj.bias[width : 4 * width] = copied[:, -1]
        child.out_proj.bias.zero_() if parent.o.bias is None else child.out_proj.bias.copy_(parent.o.bias)
    child.in_proj.weight[:width] = OPEN * _ones(stats)
    taps = [size * _power(part, moments).mean().rsqrt() for part, size in zip(parts, SIZES)]
    _spread(child, torch.stack(taps).repeat_interleave(width))


def _moments(stats: Statistics) -> torch.Tensor:
    """(D + 1, D + 1): mean x x^T over tokens, x being the block's input with a 1 behind it for the bias."""
    mean = (stats.total / stats.tokens)[:, None]
    return torch.cat([torch.cat([stats.inputs / stats.tokens, mean], 1), torch.cat([mean, mean.new_ones(1, 1)]).T])


def _power(rows: torch.Tensor, moments: torch.Tensor) -> torch.Tensor:
    """(heads, P, D + 1) -> (heads,): mean square of a channel of every head."""
    return ((rows @ moments) * rows).sum(-1).mean(-1).clamp_min(1e-12)


def _rows(parent: GroupedAttention, name: str, moments: torch.Tensor) -> torch.Tensor:
    """(heads, P, D + 1): the rows of a projection by head, the bias last."""
    layer, size = getattr(parent, name), parent.spec.head_dim
    weight = layer.weight.float()
    bias = weight.new_zeros(len(weight)) if layer.bias is None else layer.bias.float()
    rows = torch.cat([weight, bias[:, None]], 1).unflatten(0, (-1, size))
    if name == "v" or not parent.spec.qk_norm:
        return rows
    scale = _power(rows, moments).rsqrt()[:, None] * getattr(parent, f"{name}_norm").weight.float()
    return rows * scale[..., None]


def _ones(stats: Statistics) -> torch.Tensor:
    """(D,): the direction in which the input is nearest to 1 for every token, by least squares."""
    return ridge_solve(stats.inputs, stats.total[:, None])[:, 0]


def _spread(child: Mamba2Mixer, taps: torch.Tensor) -> None:
    """A convolution that passes its token on, times `taps` (3HP,); memories from long to short over the heads; D and
    norm at 1."""
    child.conv.weight.zero_()
    child.conv.weight[:, -1] = taps
    if child.conv.bias is not None:
        child.conv.bias.zero_()
    part = (torch.arange(child.spec.num_heads) + 0.5) / child.spec.num_heads
    low, high = TIME_STEPS
    steps = low * (high / low) ** part
    child.dt_bias.copy_(steps + (-torch.expm1(-steps)).log())  # the inverse of softplus
    child.A_log.copy_((DECAYS[0] + (DECAYS[1] - DECAYS[0]) * part).log())
    child.D.fill_(1)
    child.norm.weight.fill_(1)
