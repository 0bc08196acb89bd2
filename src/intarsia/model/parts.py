"""Small things that several mixers are made of."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import nn

from intarsia.ops.activation import relu_squared, silu_mul

Tables = tuple[torch.Tensor, torch.Tensor]

ACTIVATIONS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "silu": F.silu,
    "gelu": F.gelu,
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
    "relu2": relu_squared,
}


def activate(activation: str, up: torch.Tensor, gate: torch.Tensor | None = None) -> torch.Tensor:
    """act(up), or act(gate) * up where there is a gate."""
    if gate is None:
        return ACTIVATIONS[activation](up)
    return silu_mul(gate, up) if activation == "silu" else ACTIVATIONS[activation](gate) * up


class Scale(nn.Module):
    """A norm's weight alone; the op does the rest."""

    def __init__(self, size: int, dtype: torch.dtype, device=None):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size, dtype=dtype, device=device))


class Float32Parameters(nn.Module):
    """A module whose parameters named in `FLOAT32` keep that dtype when the model moves to another.

    They feed exponentials or decide between experts, where the 8 bits of bfloat16 change what the model does.
    """

    FLOAT32: tuple[str, ...] = ()

    def _apply(self, fn, recurse: bool = True):
        before = {name: self._parameters[name].data for name in self.FLOAT32}
        super()._apply(fn, recurse)
        for name, data in before.items():
            parameter = self._parameters[name]
            if parameter.dtype != torch.float32:
                parameter.data = data.to(parameter.device)
        return self
