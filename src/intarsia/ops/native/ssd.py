"""`ops.ssd` on native code. Shape letters: B batch, L length, H heads, P head dim, G groups, N state."""

from __future__ import annotations

import torch
from torch.autograd.function import once_differentiable

from intarsia.ops.native import library
from intarsia.ops.native.library import DTYPES, dense, pointer, summed


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
    """`ops.ssd.ssd`."""
    return _Scan.apply(x, dt, A, B, C, D, state, segments)


class _Scan(torch.autograd.Function):
    """Keeps its inputs; backward makes the states between chunks again, for some heads at a time."""

    @staticmethod
    def forward(ctx, *inputs):
        ctx.save_for_backward(*inputs)
        x, B = inputs[0], inputs[3]
        y, last = torch.empty(x.shape, dtype=x.dtype), torch.empty(x.shape[0], *x.shape[2:], B.shape[3])
        arguments, keep = _inputs(*inputs)
        library.loaded.code.ssd_forward(*arguments, y.data_ptr(), last.data_ptr(), *_sizes(x, B))
        del keep
        return y, last

    @staticmethod
    @once_differentiable
    def backward(ctx, dy, dlast):
        x, dt, A, B, C, D, state, _ = kept = ctx.saved_tensors  # once: a checkpointed block computes them anew
        batch, _, heads, _ = x.shape
        parts = library.loaded.code.ssd_parts(batch, heads, B.shape[2])
        dy, dlast = dense(dy, x.dtype), dense(dlast, torch.float32)
        dx, ddt, dstate = torch.empty(x.shape, dtype=x.dtype), torch.empty(dt.shape), torch.empty(dlast.shape)
        (dA, dD), (dB, dC) = torch.zeros(2, batch, heads), torch.empty(2, parts, *B.shape)
        outputs = (t.data_ptr() for t in (dy, dlast, dx, ddt, dA, dD, dB, dC, dstate))
        arguments, keep = _inputs(*kept)
        library.loaded.code.ssd_backward(*arguments, *outputs, *_sizes(x, B))
        del keep
        dB, dC = (t[0] if parts == 1 else summed(t) for t in (dB, dC))
        of_D = None if D is None else summed(dD).to(D.dtype)
        of_state = None if state is None else dstate.to(state.dtype)
        return dx, ddt.to(dt.dtype), summed(dA).to(A.dtype), dB.to(B.dtype), dC.to(C.dtype), of_D, of_state, None


def _inputs(x, dt, A, B, C, D, state, segments) -> tuple[tuple, list]:
    """The arguments that forward and backward share, and the tensors that must live until the call is over."""
    tokens = [_tokens(t.to(x.dtype)) for t in (x, B, C)]
    rest = [*(dense(t, torch.float32) for t in (dt, A, D, state)), dense(segments, torch.int32)]
    places = (argument for t in tokens for argument in (t.data_ptr(), t.stride(0), t.stride(1)))
    return (DTYPES[x.dtype], *places, *(pointer(t) for t in rest)), [*tokens, *rest]


def _sizes(x: torch.Tensor, B: torch.Tensor) -> tuple[int, ...]:
    return (*x.shape, *B.shape[2:], torch.get_num_threads())


def _tokens(t: torch.Tensor) -> torch.Tensor:
    """(B, L, H, P) in which the numbers of a token lie together; a view of a wider row is fine."""
    return t if t.stride(3) == 1 and t.stride(2) == t.shape[3] else t.contiguous()


def ssd_step(
    x: torch.Tensor,
    dt: torch.Tensor,
    A: torch.Tensor,
    B: torch.Tensor,
    C: torch.Tensor,
    D: torch.Tensor | None,
    state: torch.Tensor,
) -> torch.Tensor:
    """`ops.ssd.ssd_step`."""
    (batch, heads, size), (groups, width) = x.shape, B.shape[1:]
    x, B, C = _token(x), _token(B.to(x.dtype)), _token(C.to(x.dtype))
    dt, A, D, held = (dense(t, torch.float32) for t in (dt, A, D, state))
    y = torch.empty(x.shape, dtype=x.dtype)
    library.loaded.code.ssd_step(
        DTYPES[x.dtype], x.data_ptr(), x.stride(0), dt.data_ptr(), A.data_ptr(), B.data_ptr(), B.stride(0),
        C.data_ptr(), C.stride(0), pointer(D), held.data_ptr(), y.data_ptr(), batch, heads, size, groups, width,
        torch.get_num_threads(),
    )  # fmt: skip
    if held is not state:
        state.copy_(held)
    return y


def _token(t: torch.Tensor) -> torch.Tensor:
    """(B, H, P) in which the numbers of a token lie together."""
    return t if t.stride(2) == 1 and t.stride(1) == t.shape[2] else t.contiguous()
