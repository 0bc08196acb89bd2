"""The activations of an FFN that are worth a pass of their own over memory.

`silu_mul` is SwiGLU (Shazeer 2020); `relu_squared` is Primer's (So et al. 2021), as Nemotron-H uses it.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

from intarsia.ops import backends


def silu_mul(gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
    """silu(gate) * up, of one shape and dtype -> the same; on a native backend in float32, rounded once."""
    return backends.pick("silu_mul", silu_mul_torch, gate, up)(gate, up)


def relu_squared(x: torch.Tensor) -> torch.Tensor:
    """max(x, 0)^2, in x's shape and dtype."""
    return backends.pick("relu_squared", relu_squared_torch, x)(x)


def silu_mul_torch(gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
    return F.silu(gate) * up


def relu_squared_torch(x: torch.Tensor) -> torch.Tensor:
    return F.relu(x).square()
