"""Mamba-1's selective scan, S6 (arXiv 2312.00752, section 3): a decay for every channel and state.

Shape letters: B batch, L length, E inner channels, N state.
"""

from __future__ import annotations

import torch

from intarsia.ops import backends


def selective_scan(
    x: torch.Tensor,
    dt: torch.Tensor,
    A: torch.Tensor,
    B: torch.Tensor,
    C: torch.Tensor,
    D: torch.Tensor | None = None,
    state: torch.Tensor | None = None,
    segments: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """S_t = exp(dt_t A) S_{t-1} + dt_t x_t B_t^T and y_t = S_t C_t + D x_t; the gate is the mixer's.

    x (B, L, E); dt (B, L, E) float32, after softplus, 0 where a token is padding; A (E, N) float32, negative; B, C
    (B, L, N); D (E,) or None; state (B, E, N) float32 or None for zeros; segments (B, L) integers, non-decreasing, or
    None: the state is zero at the first token of every segment but the first. Returns y (B, L, E) in x's dtype and
    the last state (B, E, N) float32. Differentiable in all but segments.
    """
    run = backends.pick("selective_scan", selective_scan_torch, x, dt, A, B, C, D, state)
    return run(x, dt, A, B, C, D, state, segments)


def selective_step(
    x: torch.Tensor,
    dt: torch.Tensor,
    A: torch.Tensor,
    B: torch.Tensor,
    C: torch.Tensor,
    D: torch.Tensor | None,
    state: torch.Tensor,
) -> torch.Tensor:
    """One token: x, dt (B, E), B, C (B, N) -> y (B, E). `state` (B, E, N) float32 is updated in place."""
    run = backends.pick("selective_step", selective_step_torch, x, dt, A, B, C, D, state)
    return run(x, dt, A, B, C, D, state)


def selective_scan_torch(
    x: torch.Tensor,
    dt: torch.Tensor,
    A: torch.Tensor,
    B: torch.Tensor,
    C: torch.Tensor,
    D: torch.Tensor | None = None,
    state: torch.Tensor | None = None,
    segments: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    wide = torch.promote_types(x.dtype, torch.float32)
    x_, dt, A, B, C = (t.to(wide) for t in (x, dt, A, B, C))
    state = x_.new_zeros(x.shape[0], *A.shape) if state is None else state.to(wide)
    ys = []
    for t in range(x.shape[1]):
        decay = (dt[:, t, :, None] * A).exp()
        if segments is not None and t:
            decay = decay * (segments[:, t] == segments[:, t - 1])[:, None, None]
        state = decay * state + (dt[:, t] * x_[:, t])[..., None] * B[:, t, None]
        ys.append((state @ C[:, t, :, None]).squeeze(-1))
    y = torch.stack(ys, 1)
    return (y if D is None else y + D.to(wide) * x_).to(x.dtype), state


def selective_step_torch(
    x: torch.Tensor,
    dt: torch.Tensor,
    A: torch.Tensor,
    B: torch.Tensor,
    C: torch.Tensor,
    D: torch.Tensor | None,
    state: torch.Tensor,
) -> torch.Tensor:
    wide = state.dtype
    state.mul_((dt[..., None] * A).exp())
    state.addcmul_((dt * x)[..., None].to(wide), B[:, None].to(wide))
    y = (state @ C[..., None].to(wide)).squeeze(-1)
    return (y if D is None else y + D * x).to(x.dtype)
