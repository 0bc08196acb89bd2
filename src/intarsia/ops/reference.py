"""The definitions in float64, where there is time token by token: the ground truth of the ops. Differentiable, slow.

Shape letters: B batch, L length, C channels, K conv width, H heads, P head dim, G groups, N state, E inner channels.
All return float64. See the public functions of the same names for the arguments.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

Optional = torch.Tensor | None


def conv_reference(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: Optional = None,
    state: Optional = None,
    segments: Optional = None,
    activation: bool = True,
) -> tuple[torch.Tensor, torch.Tensor]:
    """`ops.conv.causal_conv`: x (B, L, C) -> y (B, L, C) and the last K - 1 inputs (B, K - 1, C)."""
    x, weight = x.double(), weight.double()
    window = x.new_zeros(x.shape[0], weight.shape[1] - 1, x.shape[2]) if state is None else state.double()
    ys = []
    for t in range(x.shape[1]):
        window = window * _goes_on(segments, t)[:, None, None].to(x)
        seen = torch.cat([window, x[:, t, None]], 1)  # (B, K, C)
        y = torch.einsum("bkc,ck->bc", seen, weight) + (0 if bias is None else bias.double())
        ys.append(F.silu(y) if activation else y)
        window = seen[:, 1:]
    return torch.stack(ys, 1), window


def ssd_reference(
    x: torch.Tensor,
    dt: torch.Tensor,
    A: torch.Tensor,
    B: torch.Tensor,
    C: torch.Tensor,
    D: Optional = None,
    state: Optional = None,
    segments: Optional = None,
    chunk_size: int = 128,
) -> tuple[torch.Tensor, torch.Tensor]:
    """`ops.ssd.ssd`: S_t = exp(dt_t A) S_{t-1} + dt_t x_t B_t^T, y_t = S_t C_t + D x_t. x (B, L, H, P) -> y, S."""
    x, dt, A, B, C = (t.double() for t in (x, dt, A, B, C))
    batch, length, heads, size = x.shape
    B, C = (t.repeat_interleave(heads // t.shape[2], 2) for t in (B, C))  # (B, L, H, N)
    S = x.new_zeros(batch, heads, size, B.shape[3]) if state is None else state.double()
    ys = []
    for t in range(length):
        decay = (dt[:, t] * A).exp() * _goes_on(segments, t)[:, None].to(x)
        S = decay[..., None, None] * S + (dt[:, t, :, None] * x[:, t])[..., None] * B[:, t, :, None]
        y = (S @ C[:, t, :, :, None]).squeeze(-1)
        ys.append(y if D is None else y + D.double()[:, None] * x[:, t])
    return torch.stack(ys, 1), S


def selective_reference(
    x: torch.Tensor,
    dt: torch.Tensor,
    A: torch.Tensor,
    B: torch.Tensor,
    C: torch.Tensor,
    D: Optional = None,
    state: Optional = None,
    segments: Optional = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """`ops.selective.selective_scan`: as above, with a decay for every channel and state. x (B, L, E) -> y, S."""
    x, dt, A, B, C = (t.double() for t in (x, dt, A, B, C))
    S = x.new_zeros(x.shape[0], *A.shape) if state is None else state.double()
    ys = []
    for t in range(x.shape[1]):
        decay = (dt[:, t, :, None] * A).exp() * _goes_on(segments, t)[:, None, None].to(x)
        S = decay * S + (dt[:, t] * x[:, t])[..., None] * B[:, t, None]
        y = (S @ C[:, t, :, None]).squeeze(-1)
        ys.append(y if D is None else y + D.double() * x[:, t])
    return torch.stack(ys, 1), S


def gated_norm_reference(
    y: torch.Tensor, z: torch.Tensor, weight: torch.Tensor, groups: int, eps: float
) -> torch.Tensor:
    """`ops.gated_norm.gated_norm`: the gate first, then an RMSNorm of every group of the last dimension."""
    v = (y.double() * F.silu(z.double())).unflatten(-1, (groups, -1))
    v = v / (v.square().mean(-1, keepdim=True) + eps).sqrt()
    return v.flatten(-2) * weight.double()


def rms_norm_reference(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    """`ops.norm.rms_norm`."""
    x = x.double()
    return x / (x.square().mean(-1, keepdim=True) + eps).sqrt() * weight.double()


def rotate_reference(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """`ops.rope.rotate`: sin comes with its first half negated."""
    x = x.double()
    low, high = x.chunk(2, -1)
    return x * cos.double() + torch.cat([high, low], -1) * sin.double()


def silu_mul_reference(gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
    """`ops.activation.silu_mul`."""
    return gate.double() / (1 + (-gate.double()).exp()) * up.double()


def relu_squared_reference(x: torch.Tensor) -> torch.Tensor:
    """`ops.activation.relu_squared`."""
    return x.double().clamp(min=0) ** 2


def kl_reference(p: torch.Tensor, q: torch.Tensor) -> torch.Tensor:
    """KL(softmax(p) || softmax(q)) in nats, row by row."""
    p, q = p.double().log_softmax(-1), q.double().log_softmax(-1)
    return (p.exp() * (p - q)).sum(-1)


def preference_reference(margin: torch.Tensor, gap: Optional, beta: float, eta: float = 1.0) -> torch.Tensor:
    """`ops.preference.rpo_loss`, and `dpo_loss` where `gap` is None: the divergence of two coins."""
    ours = torch.stack([margin.double() * beta, torch.zeros_like(margin.double())]).log_softmax(0)
    if gap is None:
        return -ours[0]
    wanted = torch.stack([gap.double() * eta, torch.zeros_like(gap.double())]).log_softmax(0)
    return (wanted.exp() * (wanted - ours)).sum(0)


def _goes_on(segments: Optional, t: int) -> torch.Tensor:
    """(B,) boolean: does token t belong to the document of the token before it (or of the initial state)?"""
    if segments is None or t == 0:
        return torch.ones((), dtype=torch.bool).expand(1)
    return segments[:, t] == segments[:, t - 1]
