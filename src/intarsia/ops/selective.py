"""Mamba-1's selective scan, S6 (arXiv 2312.00752, section 3): a decay for every channel and state.

Shape letters: B batch, L length, E inner channels, N state.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch.autograd.function import once_differentiable

from intarsia.ops import backends

CHUNK = 32  # tokens whose states exist at once


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
    return _SelectiveScan.apply(x, dt, A, B, C, D, state, segments)


class _SelectiveScan(torch.autograd.Function):
    """The recurrence token by token, a chunk at a time: only a chunk's states exist at once. Backward keeps the
    inputs and the state before every chunk, makes the chunk's states again and goes through them from the end."""

    @staticmethod
    def forward(ctx, x, dt, A, B, C, D, state, segments):
        wide = torch.promote_types(x.dtype, torch.float32)
        S = x.new_zeros(x.shape[0], *A.shape, dtype=wide) if state is None else state.to(wide)
        y, kept = torch.empty(x.shape, dtype=x.dtype, device=x.device), []
        for part in _chunks(x.shape[1]):
            kept.append(S)
            chunk = _Chunk(x, dt, A, B, C, segments, part)
            states = chunk.states(S)
            y[:, part] = chunk.output(states, D)
            S = states[:, -1].clone()
        if any(ctx.needs_input_grad):
            ctx.save_for_backward(x, dt, A, B, C, D, state, segments, *kept)
        return y, S.clone() if S is state else S

    @staticmethod
    @once_differentiable
    def backward(ctx, dy, dS):
        x, dt, A, B, C, D, state, segments, *kept = ctx.saved_tensors
        dx, ddt, dB, dC = (torch.empty(t.shape, dtype=t.dtype, device=t.device) for t in (x, dt, B, C))
        dA = torch.zeros(A.shape, dtype=dS.dtype, device=A.device)
        for part, S in reversed(list(zip(_chunks(x.shape[1]), kept))):
            chunk = _Chunk(x, dt, A, B, C, segments, part)
            g = dy[:, part].to(dS.dtype)
            dC[:, part], flow, through, dS = chunk.backward(g, S, dS)
            dinput = (flow @ chunk.B[..., None]).squeeze(-1)  # of dt * x
            dB[:, part] = (chunk.input[:, :, None] @ flow).squeeze(2)
            dx[:, part] = dinput * chunk.dt if D is None else dinput * chunk.dt + g * D
            dA += torch.einsum("bten,bte->en", through, chunk.dt)
            ddt[:, part] = (dinput * chunk.x).add_(through.mul_(chunk.A).sum(-1))
        dD = None if D is None else torch.einsum("ble,ble->e", dy.to(dS.dtype), x.to(dS.dtype)).to(D.dtype)
        return dx, ddt, dA.to(A.dtype), dB, dC, dD, None if state is None else dS.to(state.dtype), None


def _chunks(length: int) -> list[slice]:
    """Stretches of tokens whose states (T, E, N) fit a processor's cache."""
    return [slice(first, min(first + CHUNK, length)) for first in range(0, length, CHUNK)]


class _Chunk:
    """T tokens of all rows, wide: their inputs, and the decays (B, T, E, N) into each of them."""

    def __init__(self, x, dt, A, B, C, segments, part: slice):
        wide = torch.promote_types(x.dtype, torch.float32)
        self.x, self.dt, self.B, self.C = (t[:, part].to(wide) for t in (x, dt, B, C))
        self.A, self.input = A.to(wide), self.x * self.dt
        self.decay = (self.dt[..., None] * self.A).exp_()
        if segments is not None:
            begins = F.pad(segments[:, 1:] != segments[:, :-1], (1, 0))[:, part]
            self.decay.masked_fill_(begins[..., None, None], 0)

    def states(self, S: torch.Tensor) -> torch.Tensor:
        """(B, E, N) before the chunk -> (B, T, E, N) after each of its tokens."""
        states = self.input[..., None] * self.B[:, :, None]
        for t in range(states.shape[1]):
            S = states[:, t].addcmul_(S, self.decay[:, t])
        return states

    def output(self, states: torch.Tensor, D: torch.Tensor | None) -> torch.Tensor:
        y = (states @ self.C[..., None]).squeeze(-1)
        return y if D is None else y.addcmul_(self.x, D.to(y.dtype))

    def backward(self, dy: torch.Tensor, S: torch.Tensor, dS: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """From dy (B, T, E) and the last state's gradient: dC (B, T, N), the states' gradients and those of the
        decays' exponents (B, T, E, N), and the gradient of the state before the chunk."""
        states = self.states(S)
        dC = (dy[:, :, None] @ states).squeeze(2)
        flow = dy[..., None] * self.C[:, :, None]
        flow[:, -1] += dS
        for t in range(flow.shape[1] - 1, 0, -1):
            flow[:, t - 1].addcmul_(flow[:, t], self.decay[:, t])
        dS = flow[:, 0] * self.decay[:, 0]
        through = self.decay.mul_(flow)
        through[:, 1:] *= states[:, :-1]
        through[:, 0] *= S
        return dC, flow, through, dS


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
