"""The FFN and the linear layer.

Shape letters: B batch, L length, D model, I intermediate channels.
"""

from __future__ import annotations

import torch
from torch import nn

from intarsia.arch import FeedForward, Linear
from intarsia.base.errors import IntarsiaError
from intarsia.model.parts import ACTIVATIONS, activate
from intarsia.ops.linear import Projection


class Mlp(nn.Module):
    """The FFN. up and gate (I, D), down (D, I)."""

    def __init__(self, spec: FeedForward, hidden_size: int, dtype: torch.dtype, device=None):
        super().__init__()
        if spec.activation not in ACTIVATIONS:
            raise IntarsiaError(f"activation {spec.activation!r} is not known; known: {', '.join(ACTIVATIONS)}.")
        self.spec = spec
        like = {"bias": spec.bias, "dtype": dtype, "device": device}
        if spec.gated:
            self.gate = Projection(hidden_size, spec.intermediate_size, **like)
        self.up = Projection(hidden_size, spec.intermediate_size, **like)
        self.down = Projection(spec.intermediate_size, hidden_size, **like)

    def channels(self, x: torch.Tensor) -> torch.Tensor:
        """The intermediate activations (B, L, I) that `down` reads."""
        return activate(self.spec.activation, self.up(x), self.gate(x) if self.spec.gated else None)

    def forward(self, x: torch.Tensor, *_: object) -> torch.Tensor:
        """x (B, L, D), already normalised -> (B, L, D)."""
        return self.down(self.channels(x))


class LinearMixer(nn.Module):
    """One linear layer, proj (D, D)."""

    def __init__(self, spec: Linear, hidden_size: int, dtype: torch.dtype, device=None):
        super().__init__()
        self.spec = spec
        self.proj = Projection(hidden_size, hidden_size, bias=spec.bias, dtype=dtype, device=device)

    def forward(self, x: torch.Tensor, *_: object) -> torch.Tensor:
        """x (B, L, D), already normalised -> (B, L, D)."""
        return self.proj(x)
