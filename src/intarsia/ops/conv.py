"""Causal depthwise convolution, the short memory in front of the scan (Mamba, arXiv 2312.00752, section 3.4).

Shape letters: B batch, L length, C channels, K width.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch.autograd.function import once_differentiable

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
    state = x.new_zeros(x.shape[0], weight.shape[1] - 1, x.shape[2]) if state is None else state.to(x.dtype)
    y = _Conv.apply(x, weight, bias, state, segments, activation)
    return y, last_inputs(x, state, segments)


def last_inputs(x: torch.Tensor, state: torch.Tensor, segments: torch.Tensor | None) -> torch.Tensor:
    """(B, K-1, C): what the token after x will see of [state, x]."""
    tail = slice(max(x.shape[1] - state.shape[1], 0), None)
    seen = torch.cat([state, x[:, tail]], 1)
    last = seen[:, seen.shape[1] - state.shape[1] :]
    if segments is None:
        return last
    ids = torch.cat([segments[:, :1].expand(state.shape[:2]), segments[:, tail]], 1)[:, -last.shape[1] :]
    return last * (ids == segments[:, -1:])[..., None]


class _Conv(torch.autograd.Function):
    """The convolution of a row without documents by torch, and again, token by token, where a window is cut.

    Backward keeps the inputs and computes what the activation saw again.
    """

    @staticmethod
    def forward(ctx, x, weight, bias, state, segments, activation):
        ctx.save_for_backward(x, weight, bias, state, segments)
        ctx.activation = activation
        y = _before_activation(x, weight, bias, _Edges(x, weight, state, segments))
        return F.silu(y, inplace=True) if activation else y

    @staticmethod
    @once_differentiable
    def backward(ctx, dy):
        x, weight, bias, state, segments = ctx.saved_tensors
        edges = _Edges(x, weight, state, segments)
        if ctx.activation:
            dy = torch.ops.aten.silu_backward(dy, _before_activation(x, weight, bias, edges))
        else:
            dy = dy.clone()
        dbias = None if bias is None else dy.sum((0, 1), dtype=edges.wide).to(bias.dtype)
        at_edges = edges.take(dy)
        turned = _rows_by_weight(dy, weight.flip(1), None)  # (B, L + K - 1, C): gradients of K - 1 zeros, then of x
        dx, dstate = turned[:, weight.shape[1] - 1 :], torch.zeros_like(state)
        dweight = _weight_gradient(x, dy, weight.shape[1]) + edges.gradients(at_edges, weight, dx, dstate)
        return dx, dweight.to(weight.dtype), dbias, dstate, None, None


def _before_activation(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, edges: _Edges
) -> torch.Tensor:
    y = _rows_by_weight(x, weight, bias)[:, : x.shape[1]]
    edges.write(y, weight, bias)
    return y


def _rows_by_weight(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    """(B, L, C) with K-1 zeros on both sides -> (B, L + K - 1, C). A picture one pixel high whose channels lie
    together is what torch convolves fastest: the layout stays as it is."""
    picture = x[:, None].permute(0, 3, 1, 2)  # (B, C, 1, L)
    kernel = weight.to(x.dtype)[:, None, None]
    bias = None if bias is None else bias.to(x.dtype)
    y = F.conv2d(picture, kernel, bias, padding=(0, weight.shape[1] - 1), groups=weight.shape[0])
    return y.permute(0, 2, 3, 1)[:, 0]


def _weight_gradient(x: torch.Tensor, dy: torch.Tensor, width: int) -> torch.Tensor:
    """(C, K) wide: the sum over tokens of dy_t x_{t-K+1+k}, a piece at a time so that its sums stay in the cache."""
    wide = torch.promote_types(x.dtype, torch.float32)
    piece, length = 64, x.shape[1]
    sums = x.new_zeros(width, min(piece, length), x.shape[2], dtype=wide)
    for row in range(x.shape[0]):
        for first in range(0, length, piece):
            g = dy[row, first : first + piece].to(wide)
            start = max(first - width + 1, 0)
            seen = x[row, start : first + len(g)].to(wide)
            for k in range(width):
                skip = max(width - 1 - k - first, 0)  # tokens whose window begins before the row
                at = first + skip - (width - 1 - k) - start
                if skip < len(g):
                    sums[k, skip : len(g)].addcmul_(g[skip:], seen[at : at + len(g) - skip])
    return sums.sum(1).T


class _Edges:
    """The tokens whose window is not the K inputs before them: they reach into the state, or into another document.

    n of them in all; `row` and `token` (n,) say where, and the inputs they see are (n, K, C).
    """

    def __init__(self, x, weight, state, segments):
        self.x, self.state = x, state
        self.wide = torch.promote_types(x.dtype, torch.float32)
        batch, length, width = *x.shape[:2], weight.shape[1]
        ids = torch.zeros(batch, length, dtype=torch.int32, device=x.device) if segments is None else segments
        past = torch.cat([ids[:, :1].expand(-1, width - 1), ids], 1)[:, :length]  # of the input K - 1 tokens before
        cut = past != ids
        cut[:, : width - 1] = True
        self.row, self.token = cut.nonzero(as_tuple=True)
        at = self.token[:, None] + torch.arange(1 - width, 1, device=x.device)  # (n, K)
        same = ids[self.row[:, None], at.clamp(min=0)] == ids[self.row, self.token][:, None]
        self.in_row, self.in_state = (at >= 0) & same, (at < 0) & same
        self.at, self.at_state = at.clamp(min=0), (at + width - 1).clamp(max=width - 2)

    def inputs(self) -> torch.Tensor:
        row = self.row[:, None]
        seen = self.x[row, self.at].to(self.wide) * self.in_row[..., None]
        return seen + self.state[row, self.at_state].to(self.wide) * self.in_state[..., None]

    def write(self, y: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> None:
        """Put the right values, before the activation, where the plain convolution is wrong."""
        right = torch.einsum("nkc,ck->nc", self.inputs(), weight.to(self.wide))
        y[self.row, self.token] = (right if bias is None else right + bias).to(y.dtype)

    def take(self, dy: torch.Tensor) -> torch.Tensor:
        """What dy has at the edges, (n, C); it keeps zeros there, for the plain convolution's backward."""
        at_edges = dy[self.row, self.token].to(self.wide)
        dy[self.row, self.token] = 0
        return at_edges

    def gradients(self, dy: torch.Tensor, weight: torch.Tensor, dx: torch.Tensor, dstate: torch.Tensor) -> torch.Tensor:
        """Add to dx and dstate what the edges' dy (n, C) gives them; their part of the weight's gradient (C, K)."""
        dseen = dy[:, None] * weight.to(self.wide).T  # (n, K, C)
        row = self.row[:, None].expand_as(self.at)
        for into, at, where in ((dx, self.at, self.in_row), (dstate, self.at_state, self.in_state)):
            into.index_put_((row[where], at[where]), dseen[where].to(into.dtype), accumulate=True)
        return torch.einsum("nc,nkc->ck", dy, self.inputs())


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
