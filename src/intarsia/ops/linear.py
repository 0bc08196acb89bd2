"""A linear layer that also knows the shape of decoding: a few rows at a time."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn

from intarsia.ops.backends import pick


def linear(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    """x (..., I), weight (O, I), bias (O,) -> (..., O)."""
    return pick("linear", linear_torch, x, weight, bias)(x, weight, bias)


def linear_torch(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    """`linear` in torch.

    One row in bfloat16 or float16 on a CPU goes through its matrix-vector kernel, which reads the weight once; its
    matrix-matrix kernel first rearranges the weight and takes 1.5 to 2 times as long.
    """
    if x.numel() != x.shape[-1] or x.dtype not in (torch.bfloat16, torch.float16) or x.device.type != "cpu":
        return F.linear(x, weight, bias)
    row = x.reshape(-1)
    out = torch.mv(weight, row) if bias is None else torch.addmv(bias, weight, row)
    return out.view(*x.shape[:-1], -1)


class Projection(nn.Linear):
    """`nn.Linear` through our op."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return linear(x, self.weight, self.bias)
