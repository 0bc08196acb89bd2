"""Learning by forward passes alone, for machines that hold a model and not its gradients (MeZO, arXiv 2305.17333).

Two passes with all weights a little up and a little down one random direction tell the slope along it, and the weights
move against that. Neither gradients nor moments nor activations are kept: beside the weights there is one block's
copy, while that block runs. The direction is never stored; it is drawn again from the step's number.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import nn

from intarsia.base.files import atomic_path

REACH = 1e-3  # how far up and down, as in the paper


class ForwardOnly:
    """Moves the parameters of `blocks`, in place; what is not in a block stays as it is.

    bfloat16 weights are rounded up or down by chance, so that moves much smaller than their last bit add up.
    """

    def __init__(self, blocks: nn.ModuleList, seed: int = 0, reach: float = REACH):
        self.blocks, self.seed, self.reach, self.steps = list(blocks), seed, reach, 0
        self.named = dict(blocks.named_parameters())

    @torch.no_grad()
    def step(self, loss: Callable[[], float], lr: float, clip: float = 0.0) -> tuple[float, float]:
        """Measure `loss()` twice and move; returns its mean and the slope along the direction.

        `clip` bounds the slope, 0: not. A slope that is not finite moves nothing.
        """
        up, down = (self._moved(loss, sign * self.reach) for sign in (1.0, -1.0))
        slope = (up - down) / (2 * self.reach)
        bounded = max(-clip, min(clip, slope)) if clip else slope
        if math.isfinite(slope):
            for index in range(len(self.blocks)):
                chance = self._generator(len(self.blocks) + index)
                for parameter, direction in self._directions(index):
                    _add(parameter, direction.mul_(-lr * bounded), chance)
        self.steps += 1
        return (up + down) / 2, slope

    def _moved(self, loss: Callable[[], float], far: float) -> float:
        """The loss with every block moved while it runs, and put back behind it."""
        kept: list[torch.Tensor] = []
        places = {id(block): index for index, block in enumerate(self.blocks)}

        def before(block: nn.Module, _: object) -> None:
            kept[:] = [parameter.detach().clone() for parameter in block.parameters()]
            for parameter, direction in self._directions(places[id(block)]):
                parameter.copy_(parameter.float() + far * direction)

        def after(block: nn.Module, *_: object) -> None:
            for parameter, old in zip(block.parameters(), kept):
                parameter.copy_(old)

        hooks = [block.register_forward_pre_hook(before) for block in self.blocks]
        hooks += [block.register_forward_hook(after, always_call=True) for block in self.blocks]
        try:
            return loss()
        finally:
            for hook in hooks:
                hook.remove()

    def _directions(self, index: int) -> Iterator[tuple[nn.Parameter, torch.Tensor]]:
        """The parameters of block `index`, each with its part of this step's direction."""
        generator = self._generator(index)
        for parameter in self.blocks[index].parameters():
            yield parameter, torch.randn(parameter.shape, generator=generator).to(parameter.device)

    def _generator(self, index: int) -> torch.Generator:
        """Of a number at this step: a pure function, so that a resumed run draws the same."""
        return torch.Generator().manual_seed((self.seed * 1_000_003 + self.steps) * 100_003 + index)

    def save(self, path: str | os.PathLike) -> None:
        """Weights and counter as one safetensors file, written whole or not at all."""
        tensors = {name: parameter.detach().contiguous() for name, parameter in self.named.items()}
        with atomic_path(path) as temporary:
            save_file(tensors | {"steps": torch.tensor(self.steps)}, temporary)

    @torch.no_grad()
    def load(self, path: str | os.PathLike) -> None:
        """Continue from `save`: the same numbers, bit for bit."""
        stored = load_file(Path(path))
        for name, parameter in self.named.items():
            parameter.copy_(stored[name])
        self.steps = int(stored["steps"])


def _add(parameter: torch.Tensor, move: torch.Tensor, generator: torch.Generator) -> None:
    """parameter += move, in bfloat16 rounded up with the probability of what is cut off."""
    total = parameter.float() + move
    if parameter.dtype == torch.bfloat16:
        chance = torch.randint(0, 1 << 16, parameter.shape, generator=generator, dtype=torch.int32)
        total = ((total.view(torch.int32) + chance.to(parameter.device)) & ~0xFFFF).view(torch.float32)
    parameter.copy_(total)
