"""`ops.norm` on native code. Shape letters: T rows, D channels."""

from __future__ import annotations

import torch
from torch.autograd.function import once_differentiable

from intarsia.ops.native import library
from intarsia.ops.native.library import DTYPES, dense, pointer, summed


def rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    """`ops.norm.rms_norm`."""
    rows = x.reshape(-1, x.shape[-1])
    rows = rows if rows.stride(-1) == 1 else rows.contiguous()
    weight = dense(weight, x.dtype)
    if torch.is_grad_enabled():
        return _RmsNorm.apply(rows, weight, eps).view(x.shape)
    return _forward(rows, weight, None, eps).view(x.shape)


def _forward(x: torch.Tensor, weight: torch.Tensor, scales: torch.Tensor | None, eps: float) -> torch.Tensor:
    out = torch.empty(x.shape, dtype=x.dtype)
    library.loaded.code.rms_norm_forward(
        DTYPES[x.dtype], x.data_ptr(), x.stride(0), weight.data_ptr(), out.data_ptr(), pointer(scales), *x.shape, eps,
        torch.get_num_threads(),
    )  # fmt: skip
    return out


class _RmsNorm(torch.autograd.Function):
    """x (T, D) -> (T, D); keeps its inputs and one number a row."""

    @staticmethod
    def forward(ctx, x, weight, eps):
        scales = torch.empty(len(x), dtype=torch.float32)
        ctx.save_for_backward(x, weight, scales)
        return _forward(x, weight, scales, eps)

    @staticmethod
    @once_differentiable
    def backward(ctx, dout):
        x, weight, scales = ctx.saved_tensors
        code, dout, dx = library.loaded.code, dense(dout, x.dtype), torch.empty(x.shape, dtype=x.dtype)
        sums = torch.zeros(code.rms_norm_sums(len(x)), x.shape[1]) if ctx.needs_input_grad[1] else None
        code.rms_norm_backward(
            DTYPES[x.dtype], x.data_ptr(), x.stride(0), *(pointer(t) for t in (weight, scales, dout, dx, sums)),
            *x.shape, torch.get_num_threads(),
        )  # fmt: skip
        return dx, None if sums is None else summed(sums).to(weight.dtype), None
