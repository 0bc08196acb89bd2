"""The gated, grouped RMSNorm behind the scan of Mamba-2: gate first (arXiv 2405.21060, section 8.2)."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from intarsia.ops import backends


def gated_norm(y: torch.Tensor, z: torch.Tensor, weight: torch.Tensor, groups: int, eps: float) -> torch.Tensor:
    """RMSNorm over each of `groups` equal parts of the last dimension of y * silu(z), times weight.

    y and z (..., C), weight (C,) -> (..., C) in y's dtype. All in float32 (float64 for float64), rounded once.
    """
    return backends.pick("gated_norm", gated_norm_torch, y, z, weight)(y, z, weight, groups, eps)


def gated_norm_torch(y: torch.Tensor, z: torch.Tensor, weight: torch.Tensor, groups: int, eps: float) -> torch.Tensor:
    wide = torch.promote_types(y.dtype, torch.float32)
    v = (y.to(wide) * F.silu(z.to(wide))).unflatten(-1, (groups, -1))
    v = v * (v.square().mean(-1, keepdim=True) + eps).rsqrt()
    return (v.flatten(-2) * weight.to(wide)).to(y.dtype)
