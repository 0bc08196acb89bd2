"""Causal depthwise convolution, the short memory in front of the scan (Mamba, arXiv 2312.00752, section 3.4).

Shape letters: B batch, L length, C channels, K width.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

from intarsia.ops import backends


def causal_conv(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None = None,
    state: torch.Tensor | None = None,
    segments: torch.Tensor | None = None,
    activation: bool = True,
) -> tuple[torch.Tensor, torch.Tensor]:
    """y_t = silu(bias + sum_k weight[:, k] x_{t-K+1+k}), and what the next token will need.

    x (B, L, C); weight (C, K); bias (C,) or None; state (B, K-1, C), the last K-1 inputs before x, or None for zeros;
    segments (B, L) integers or None: a token sees only inputs of its own segment, and the state belongs to the
    segment of the first token. Returns y (B, L, C) in x's dtype and the new state (B, K-1, C): the last inputs, zero
    where they belong to another segment than the last token. Differentiable in x, weight, bias and state.
    """
    run = backends.pick("causal_conv", causal_conv_torch, x, weight, bias, state)
    return run(x, weight, bias, state, segments, activation)


def causal_conv_step(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    state: torch.Tensor,
    activation: bool = True,
) -> torch.Tensor:
    """One token: x (B, C) -> y (B, C). `state` (B, K-1, C), the last K-1 inputs, is updated in place."""
    run = backends.pick("causal_conv_step", causal_conv_step_torch, x, weight, bias, state)
    return run(x, weight, bias, state, activation)


def causal_conv_torch(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None = None,
    state: torch.Tensor | None = None,
    segments: torch.Tensor | None = None,
    activation: bool = True,
) -> tuple[torch.Tensor, torch.Tensor]:
    before = weight.shape[1] - 1
    state = x.new_zeros(x.shape[0], before, x.shape[2]) if state is None else state.to(x.dtype)
    seen = torch.cat([state, x], 1)
    ids = None if segments is None else torch.cat([segments[:, :1].expand(-1, before), segments], 1)
    y = 0 if bias is None else bias.to(x.dtype)
    length = x.shape[1]
    for k in range(before + 1):
        part = seen[:, k : k + length]
        if ids is not None:
            part = part * (ids[:, k : k + length] == segments)[..., None]
        y = y + part * weight[:, k].to(x.dtype)
    last = seen[:, length:]
    if ids is not None:
        last = last * (ids[:, length:] == segments[:, -1:])[..., None]
    return (F.silu(y) if activation else y), last


def causal_conv_step_torch(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    state: torch.Tensor,
    activation: bool = True,
) -> torch.Tensor:
    seen = torch.cat([state, x[:, None].to(state.dtype)], 1)
    state.copy_(seen[:, 1:])
    y = (seen.float() * weight.float().T).sum(1)
    if bias is not None:
        y = y + bias
    return (F.silu(y) if activation else y).to(x.dtype)
