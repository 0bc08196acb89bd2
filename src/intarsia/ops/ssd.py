"""The scan of Mamba-2, state space duality (arXiv 2405.21060): a linear recurrence, computed in chunks of products.

Shape letters: B batch, L length, H heads, P head dim, G groups of heads (H a multiple of G), N state.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

from intarsia.ops import backends
from intarsia.ops.ssd_chunked import ChunkedScan


def time_steps(
    dt: torch.Tensor, bias: torch.Tensor | None, dt_min: float = 0.0, dt_max: float | None = None
) -> torch.Tensor:
    """clamp(softplus(dt + bias), dt_min, dt_max) in float32 (float64 for float64). dt (..., H), bias (H,) or None.

    The bounds are `time_step_limit` of a checkpoint; its `time_step_min` and `_max` only say how to draw `bias`.
    """
    wide = torch.promote_types(dt.dtype, torch.float32)
    dt = dt.to(wide) if bias is None else dt.to(wide) + bias.to(wide)
    dt = F.softplus(dt)
    return dt if dt_min <= 0 and dt_max is None else dt.clamp(dt_min, dt_max)


def ssd(
    x: torch.Tensor,
    dt: torch.Tensor,
    A: torch.Tensor,
    B: torch.Tensor,
    C: torch.Tensor,
    D: torch.Tensor | None = None,
    state: torch.Tensor | None = None,
    segments: torch.Tensor | None = None,
    chunk_size: int = 128,
) -> tuple[torch.Tensor, torch.Tensor]:
    """y_t = S_t C_t + D x_t with S_t = exp(dt_t A) S_{t-1} + dt_t x_t B_t^T, a scalar decay for every head.

    x (B, L, H, P); dt (B, L, H) float32, after softplus and clamp, 0 where a token is padding (its x, B and C must be
    finite); A (H,) float32, negative; B, C (B, L, G, N), head h reads group h // (H / G); D (H,) or None; state
    (B, H, P, N) float32 or None for zeros; segments (B, L) integers, non-decreasing, or None: the state is zero at
    the first token of every segment, except that an initial state belongs to the segment of the first token. The
    result does not depend on chunk_size. Returns y (B, L, H, P) in x's dtype and the last state (B, H, P, N) float32.
    Differentiable in x, dt, A, B, C, D and state, through y and the last state; memory is linear in L.
    """
    run = backends.pick("ssd", ssd_torch, x, dt, A, B, C, D, state)
    return run(x, dt, A, B, C, D, state, segments, chunk_size)


def ssd_step(
    x: torch.Tensor,
    dt: torch.Tensor,
    A: torch.Tensor,
    B: torch.Tensor,
    C: torch.Tensor,
    D: torch.Tensor | None,
    state: torch.Tensor,
) -> torch.Tensor:
    """One token: x (B, H, P), dt (B, H), B, C (B, G, N) -> y (B, H, P). `state` (B, H, P, N) is updated in place."""
    return backends.pick("ssd_step", ssd_step_torch, x, dt, A, B, C, D, state)(x, dt, A, B, C, D, state)


def ssd_torch(
    x: torch.Tensor,
    dt: torch.Tensor,
    A: torch.Tensor,
    B: torch.Tensor,
    C: torch.Tensor,
    D: torch.Tensor | None = None,
    state: torch.Tensor | None = None,
    segments: torch.Tensor | None = None,
    chunk_size: int = 128,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Chunks of a size of its own: chunk_size is that of the checkpoint, and the result does not depend on it."""
    return ChunkedScan.apply(x, dt, A, B, C, D, state, segments)


def ssd_step_torch(
    x: torch.Tensor,
    dt: torch.Tensor,
    A: torch.Tensor,
    B: torch.Tensor,
    C: torch.Tensor,
    D: torch.Tensor | None,
    state: torch.Tensor,
) -> torch.Tensor:
    batch, heads, size, width = state.shape
    wide, groups = state.dtype, B.shape[1]
    state.mul_((dt * A).exp()[..., None, None])
    grouped = state.view(batch * groups, heads // groups * size, width)
    scaled = (x * dt[..., None]).to(wide).reshape(*grouped.shape[:2], 1)
    grouped.addcmul_(scaled, B.reshape(-1, 1, width).to(wide))
    y = (grouped @ C.reshape(-1, width, 1).to(wide)).view(batch, heads, size)
    return (y if D is None else y + D[:, None] * x).to(x.dtype)
