"""AdamW over parameters of any dtype, with float32 masters, exact to resume.

The working parameters may be bfloat16 (which is what the processor multiplies fast); what is learned lives in float32,
because an update of a thousandth of a weight is lost in bfloat16.
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterable
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from intarsia.base.files import atomic_path


def cosine(step: int, steps: int, peak: float, warmup: float = 0.05, floor: float = 0.01) -> float:
    """Learning rate of a step (from 0): linear warm-up over a share of the steps, then a cosine to floor x peak."""
    rise = max(1, round(warmup * steps))
    if step < rise:
        return peak * (step + 1) / rise
    part = (step - rise) / max(1, steps - rise)
    return peak * (floor + (1 - floor) * 0.5 * (1 + math.cos(math.pi * min(1.0, part))))


class MasterAdamW:
    """AdamW (Loshchilov and Hutter 2019) on float32 copies of named parameters.

    One-dimensional parameters are not decayed. `step` reads `.grad` of the working parameters, clips their global
    norm, updates the masters and writes them back; gradients are then cleared.
    """

    def __init__(
        self, named: Iterable[tuple[str, torch.nn.Parameter]], betas: tuple[float, float] = (0.9, 0.95),
        weight_decay: float = 0.0,
    ):  # fmt: skip
        self.working = dict(named)
        self.masters = {name: p.detach().float().clone() for name, p in self.working.items()}
        flat = [m for m in self.masters.values() if m.dim() < 2]
        deep = [m for m in self.masters.values() if m.dim() >= 2]
        groups = [{"params": deep, "weight_decay": weight_decay}, {"params": flat, "weight_decay": 0.0}]
        self.inner = torch.optim.AdamW(groups, lr=0.0, betas=betas, fused=True)
        self.steps = 0

    def step(self, lr: float, clip: float = 0.0) -> float:
        """One update at learning rate `lr`; returns the global gradient norm before clipping (0 where not asked).

        A gradient that is not finite moves nothing: with clipping, whose norm ties all parameters, the whole update
        is left out, otherwise that of its own parameter.
        """
        for name, parameter in self.working.items():
            self.masters[name].grad = None if parameter.grad is None else parameter.grad.float()
        norm = 0.0
        if clip > 0:
            norm = float(torch.nn.utils.clip_grad_norm_(self.masters.values(), clip))
        else:
            for master in self.masters.values():
                if master.grad is not None and not master.grad.sum().isfinite():
                    master.grad = None
        if math.isfinite(norm):
            for group in self.inner.param_groups:
                group["lr"] = lr
            self.inner.step()
            with torch.no_grad():
                for name, parameter in self.working.items():
                    parameter.copy_(self.masters[name])
        for name, parameter in self.working.items():
            parameter.grad = self.masters[name].grad = None
        self.steps += 1
        return norm

    def save(self, path: str | os.PathLike) -> None:
        """Masters, moments and counters as one safetensors file, written whole or not at all."""
        tensors = {f"master/{name}": master for name, master in self.masters.items()}
        for name, master in self.masters.items():
            for key, value in self.inner.state.get(master, {}).items():
                tensors[f"{key}/{name}"] = value
        tensors["steps"] = torch.tensor(self.steps)
        with atomic_path(path) as temporary:
            save_file(tensors, temporary)

    @torch.no_grad()
    def load(self, path: str | os.PathLike) -> None:
        """Continue from `save`: the same numbers, bit for bit."""
        tensors = load_file(Path(path))
        self.steps = int(tensors.pop("steps"))
        for name, master in self.masters.items():
            master.copy_(tensors[f"master/{name}"])
            self.working[name].copy_(master)
            keys = [k.partition("/")[0] for k in tensors if k.endswith(f"/{name}") and not k.startswith("master/")]
            if keys:
                self.inner.state[master] = {key: tensors[f"{key}/{name}"] for key in keys}
