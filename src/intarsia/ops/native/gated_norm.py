"""`ops.gated_norm` on native code. Shape letters: T rows, C channels."""

from __future__ import annotations

import torch
from torch.autograd.function import once_differentiable

from intarsia.ops.native import library
from intarsia.ops.native.library import DTYPES, dense, summed


def gated_norm(y: torch.Tensor, z: torch.Tensor, weight: torch.Tensor, groups: int, eps: float) -> torch.Tensor:
    """`ops.gated_norm.gated_norm`."""
    return _GatedNorm.apply(_rows(y), _rows(z.to(y.dtype)), weight, groups, eps).view(y.shape)


def _rows(t: torch.Tensor) -> torch.Tensor:
    """(..., C) -> (T, C), the channels of a row together; a view where that is possible."""
    t = t.reshape(-1, t.shape[-1])
    return t if t.stride(-1) == 1 else t.contiguous()


class _GatedNorm(torch.autograd.Function):
    """y, z (T, C) -> (T, C); keeps its inputs only."""

    @staticmethod
    def forward(ctx, y, z, weight, groups, eps):
        ctx.save_for_backward(y, z, weight)
        ctx.groups, ctx.eps = groups, eps
        out = torch.empty(y.shape, dtype=y.dtype)
        scale = dense(weight, torch.float32)
        library.loaded.code.gated_norm_forward(
            *_inputs(y, z, scale), out.data_ptr(), *y.shape, groups, eps, torch.get_num_threads()
        )
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx, dout):
        y, z, weight = ctx.saved_tensors
        code, dout = library.loaded.code, dense(dout, y.dtype)
        dy, dz = (torch.empty(y.shape, dtype=y.dtype) for _ in range(2))
        dweight = torch.zeros(code.gated_norm_sums(len(y)), weight.numel())
        scale = dense(weight, torch.float32)
        outputs = (t.data_ptr() for t in (dout, dy, dz, dweight))
        code.gated_norm_backward(
            *_inputs(y, z, scale), *outputs, *y.shape, ctx.groups, ctx.eps, torch.get_num_threads()
        )
        return dy, dz, summed(dweight).to(weight.dtype), None, None


def _inputs(y: torch.Tensor, z: torch.Tensor, weight: torch.Tensor) -> tuple[int, ...]:
    return (DTYPES[y.dtype], y.data_ptr(), y.stride(0), z.data_ptr(), z.stride(0), weight.data_ptr())
