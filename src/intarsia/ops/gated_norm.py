"""The gated, grouped RMSNorm behind the scan of Mamba-2: gate first (arXiv 2405.21060, section 8.2)."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch.autograd.function import once_differentiable

from intarsia.ops import backends


def gated_norm(y: torch.Tensor, z: torch.Tensor, weight: torch.Tensor, groups: int, eps: float) -> torch.Tensor:
    """RMSNorm over each of `groups` equal parts of the last dimension of y * silu(z), times weight.

    y and z (..., C), weight (C,) -> (..., C) in y's dtype. All in float32 (float64 for float64), rounded once.
    """
    return backends.pick("gated_norm", gated_norm_torch, y, z, weight)(y, z, weight, groups, eps)


def gated_norm_torch(y: torch.Tensor, z: torch.Tensor, weight: torch.Tensor, groups: int, eps: float) -> torch.Tensor:
    rows = (-1, y.shape[-1])
    return _GatedNorm.apply(y.reshape(rows), z.reshape(rows), weight, groups, eps).view(y.shape)


class _GatedNorm(torch.autograd.Function):
    """y, z (T, C) -> (T, C), a piece of rows at a time: what is float32 stays in the cache. Keeps its inputs only."""

    @staticmethod
    def forward(ctx, y, z, weight, groups, eps):
        ctx.save_for_backward(y, z, weight)
        ctx.groups, ctx.eps = groups, eps
        out = torch.empty(y.shape, dtype=y.dtype, device=y.device)
        for part in _pieces(y):
            _, _, _, v, scale = _normalise(y[part], z[part], groups, eps)
            out[part] = v.mul_(scale).flatten(-2).mul_(weight)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx, dout):
        y, z, weight = ctx.saved_tensors
        dy, dz = torch.empty_like(y), torch.empty_like(z)
        dweight = torch.zeros(weight.shape, dtype=torch.promote_types(y.dtype, torch.float32), device=y.device)
        for part in _pieces(y):
            y_, z_, gate, v, scale = _normalise(y[part], z[part], ctx.groups, ctx.eps)
            v.mul_(scale)
            g = dout[part].to(v.dtype)
            dweight += (g * v.flatten(-2)).sum(0)
            dv = (g * weight).view(v.shape)
            dv = dv.sub_(v * (dv * v).mean(-1, keepdim=True)).mul_(scale).flatten(-2)
            dy[part] = dv * gate
            dz[part] = torch.ops.aten.silu_backward(dv.mul_(y_), z_)
        return dy, dz, dweight.to(weight.dtype), None, None


def _pieces(y: torch.Tensor) -> list[slice]:
    """Some 64k numbers each on a CPU; all at once on a GPU, where launches cost more than memory."""
    step = max(1, 65536 // y.shape[-1]) if y.device.type == "cpu" else max(1, y.shape[0])
    return [slice(first, first + step) for first in range(0, y.shape[0], step)]


def _normalise(y: torch.Tensor, z: torch.Tensor, groups: int, eps: float) -> tuple[torch.Tensor, ...]:
    """y, z and silu(z) (T, C), v = y silu(z) (T, groups, C / groups) and 1 / rms(v) (T, groups, 1), all wide."""
    wide = torch.promote_types(y.dtype, torch.float32)
    y, z = y.to(wide), z.to(wide)
    gate = F.silu(z)
    v = (y * gate).unflatten(-1, (groups, -1))
    scale = (torch.linalg.vector_norm(v, dim=-1, keepdim=True).square_().div_(v.shape[-1]) + eps).rsqrt_()
    return y, z, gate, v, scale
