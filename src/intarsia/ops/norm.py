"""Root-mean-square normalisation (Zhang and Sennrich 2019)."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from intarsia.ops import backends


def rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    """x (..., D) over its root mean square, times weight (D,); computed in float32, returned in x's dtype."""
    return backends.pick("rms_norm", rms_norm_torch, x, weight)(x, weight, eps)


def rms_norm_torch(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    return F.rms_norm(x, (x.shape[-1],), weight.to(x.dtype), eps)  # torch computes bfloat16 in float32 inside
