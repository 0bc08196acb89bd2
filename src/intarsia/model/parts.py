"""Small things that several mixers are made of."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import nn

Tables = tuple[torch.Tensor, torch.Tensor]

ACTIVATIONS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "silu": F.silu,
    "gelu": F.gelu,
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
    "relu2": lambda x: F.relu(x).square(),
}


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
