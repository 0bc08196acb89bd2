"""`ops.rope` on native code. Shape letters: B batch, H heads, L length, P head dim."""

from __future__ import annotations

import torch
from torch.autograd.function import once_differentiable

from intarsia.ops.native import library
from intarsia.ops.native.library import DTYPES, dense


def rotate(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """`ops.rope.rotate`."""
    x = x if x.stride(-1) == 1 else x.contiguous()
    cos, sin = dense(cos, x.dtype), dense(sin, x.dtype)
    if torch.is_grad_enabled():
        return _Rotate.apply(x, cos, sin)
    return _run(x, cos, sin, torch.empty(x.shape, dtype=x.dtype), 1)


def _run(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, out: torch.Tensor, turn: float) -> torch.Tensor:
    batch = cos.stride(0) if cos.dim() == 4 else 0  # tables (B, 1, L, P), or (L, P) for every row
    library.loaded.code.rotate_heads(
        DTYPES[x.dtype], x.data_ptr(), *x.stride()[:3], cos.data_ptr(), sin.data_ptr(), batch, cos.stride(-2),
        out.data_ptr(), *out.stride()[:3], *x.shape, turn, torch.get_num_threads(),
    )  # fmt: skip
    return out


class _Rotate(torch.autograd.Function):
    """A rotation by the opposite angle is its backward; the gradient lies in memory as x does."""

    @staticmethod
    def forward(ctx, x, cos, sin):
        ctx.save_for_backward(cos, sin)
        ctx.order = sorted(range(3), key=x.stride, reverse=True)
        return _run(x, cos, sin, torch.empty(x.shape, dtype=x.dtype), 1)

    @staticmethod
    @once_differentiable
    def backward(ctx, dout):
        dout = dout if dout.stride(-1) == 1 else dout.contiguous()
        order = [*ctx.order, 3]
        dx = torch.empty([dout.shape[i] for i in order], dtype=dout.dtype).permute([order.index(i) for i in range(4)])
        return _run(dout, *ctx.saved_tensors, dx, -1), None, None
