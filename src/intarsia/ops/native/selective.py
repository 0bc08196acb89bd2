"""`ops.selective` on native code. Shape letters: B batch, L length, E inner channels, N state."""

from __future__ import annotations

import torch
from torch.autograd.function import once_differentiable

from intarsia.ops import selective
from intarsia.ops.native import library
from intarsia.ops.native.library import DTYPES, dense, pointer, summed


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
    """`ops.selective.selective_scan`."""
    if x.numel() == 0:
        return selective.selective_scan_torch(x, dt, A, B, C, D, state, segments)
    return _SelectiveScan.apply(x, dt, A, B, C, D, state, segments)


class _SelectiveScan(torch.autograd.Function):
    """Backward keeps the inputs and the state before every chunk, and makes a chunk's states again."""

    @staticmethod
    def forward(ctx, x, dt, A, B, C, D, state, segments):
        (batch, _, channels), width = x.shape, A.shape[1]
        training, code = any(ctx.needs_input_grad), library.loaded.code
        last = torch.zeros(batch, width, channels) if state is None else _turned(state.float())
        chunks = code.selective_chunks(x.shape[1]) if training else 0
        y, kept = torch.empty(x.shape, dtype=x.dtype), torch.empty(chunks, batch, width, channels)
        inputs, keep = _inputs(x, dt, A, B, C, D, segments)
        outputs = (y.data_ptr(), last.data_ptr(), kept.data_ptr() if training else None)
        code.selective_forward(*inputs, *outputs, *x.shape, width, torch.get_num_threads())
        del keep
        if training:
            ctx.save_for_backward(x, dt, A, B, C, D, state, segments, kept)
        return y, last.transpose(1, 2).contiguous()

    @staticmethod
    @once_differentiable
    def backward(ctx, dy, dS):
        x, dt, A, B, C, D, state, segments, kept = ctx.saved_tensors
        (batch, length, channels), width, code = x.shape, A.shape[1], library.loaded.code
        dy, dstate, dx = dense(dy, x.dtype), _turned(dS.float()), torch.empty(x.shape, dtype=x.dtype)
        ddt, dA = torch.empty(x.shape), torch.zeros(batch, width, channels)
        dD = None if D is None else torch.zeros(batch, channels)
        dB, dC = (torch.empty(code.selective_groups(channels), batch, length, width) for _ in "BC")
        inputs, keep = _inputs(x, dt, A, B, C, D, segments)
        outputs = (pointer(t) for t in (dy, kept, dx, ddt, dA, dB, dC, dD, dstate))
        code.selective_backward(*inputs, *outputs, *x.shape, width, torch.get_num_threads())
        del keep
        return (
            dx, ddt.to(dt.dtype), summed(dA).T.to(A.dtype), summed(dB).to(B.dtype), summed(dC).to(C.dtype),
            None if D is None else summed(dD).to(D.dtype),
            None if state is None else dstate.transpose(1, 2).to(state.dtype), None,
        )  # fmt: skip


def selective_step(
    x: torch.Tensor,
    dt: torch.Tensor,
    A: torch.Tensor,
    B: torch.Tensor,
    C: torch.Tensor,
    D: torch.Tensor | None,
    state: torch.Tensor,
) -> torch.Tensor:
    """`ops.selective.selective_step`."""
    held, y = dense(state, torch.float32), torch.empty(x.shape, dtype=x.dtype)
    keep = [dense(x), *(dense(t, torch.float32) for t in (dt, A, B, C, D))]
    outputs = (held.data_ptr(), y.data_ptr(), *x.shape, A.shape[1], torch.get_num_threads())
    library.loaded.code.selective_step(DTYPES[x.dtype], *(pointer(t) for t in keep), *outputs)
    if held is not state:
        state.copy_(held)
    return y


def _turned(state: torch.Tensor) -> torch.Tensor:
    """(B, E, N) -> (B, N, E), memory of its own: the code writes into it."""
    return state.transpose(1, 2).clone(memory_format=torch.contiguous_format)


def _inputs(x, dt, A, B, C, D, segments) -> tuple[tuple, list]:
    """The arguments that forward and backward share, and the tensors that must live until the call is over."""
    wide = [dense(t, torch.float32) for t in (dt, A.T, B, C, D)]
    keep = [dense(x), *wide, dense(segments, torch.int32)]
    return (DTYPES[x.dtype], *(pointer(t) for t in keep)), keep
