"""AdamW over parameters of any dtype, with float32 masters, exact to resume.

The working parameters may be bfloat16 (which is what the processor multiplies fast); what is learned lives in float32,
because an update of a thousandth of a weight is lost in bfloat16. A parameter that is float32 is its own master. Of a
parameter that is sharded over ranks each rank's optimiser knows the own shard: the update is elementwise, and only the
norm of the gradient is a matter of all.
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterable, Mapping
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from intarsia.base.files import atomic_path

UNDECAYED = ("A_log", "D", "dt_bias")  # also where they are matrices, as Mamba-1's A_log is
MOMENTS = ("exp_avg", "exp_avg_sq", "step")


def cosine(step: int, steps: int, peak: float, warmup: float = 0.05, floor: float = 0.01) -> float:
    """Learning rate of a step (from 0): linear warm-up over a share of the steps, then a cosine to floor x peak."""
    rise = max(1, round(warmup * steps))
    if step < rise:
        return peak * (step + 1) / rise
    part = (step - rise) / max(1, steps - rise)
    return peak * (floor + (1 - floor) * 0.5 * (1 + math.cos(math.pi * min(1.0, part))))


def decays(name: str, parameter: torch.Tensor) -> bool:
    """The decay table: matrices decay, the convolution's among them, as in Megatron-LM; nothing of one dimension does
    (norms, biases), nor A_log, D and dt_bias of a scan."""
    return parameter.dim() >= 2 and name.rpartition(".")[2] not in UNDECAYED


class MasterAdamW:
    """AdamW (Loshchilov and Hutter 2019) on float32 copies of named parameters; `decays` says which are decayed.

    `collect` adds `.grad` of the working parameters to the masters' in float32 and clears it; `step` collects, clips
    the global norm, updates the masters and writes them back. `shares`: of the learning rate, by name, where not all
    of it. `apart`: float32 parameters have masters too, so that what is done to them between steps is not learned.
    """

    def __init__(
        self, named: Iterable[tuple[str, torch.nn.Parameter]], betas: tuple[float, float] = (0.9, 0.95),
        weight_decay: float = 0.0, eps: float = 1e-8, shares: Mapping[str, float] | None = None, apart: bool = False,
    ):  # fmt: skip
        self.working = dict(named)
        self.masters = {name: _master(p, apart) for name, p in self.working.items()}
        grouped: dict[tuple[float, float], list[torch.Tensor]] = {}
        for name, master in self.masters.items():
            decay, share = weight_decay if decays(name, master) else 0.0, (shares or {}).get(name, 1.0)
            grouped.setdefault((decay, share), []).append(master)
        groups = [{"params": those, "weight_decay": decay, "share": share} for (decay, share), those in grouped.items()]
        groups = groups or [{"params": [], "share": 1.0}]
        self.inner = torch.optim.AdamW(groups, lr=0.0, betas=betas, eps=eps, fused=True)
        for master in self.masters.values():  # there from the beginning, so that a state always has the same tensors
            self.inner.state[master] = {
                "step": torch.zeros((), device=master.device),
                "exp_avg": torch.zeros_like(master), "exp_avg_sq": torch.zeros_like(master),
            }  # fmt: skip
        self.steps = 0

    def collect(self) -> None:
        """Take the gradients of a backward pass: several may follow each other before `step`."""
        for name, parameter in self.working.items():
            if parameter.grad is not None:
                master, gradient = self.masters[name], local(parameter.grad).float()
                master.grad = gradient if master.grad is None else master.grad.add_(gradient)
                parameter.grad = None

    def norm(self) -> float:
        """The global norm of the collected gradients, over all ranks that hold shards."""
        gradients: dict[tuple, list[torch.Tensor]] = {}
        for name, master in self.masters.items():
            if master.grad is not None:
                gradients.setdefault(_holders(self.working[name]), []).append(master.grad)
        total = 0.0
        for holders, group in gradients.items():
            square = torch.nn.utils.get_total_norm(group).double().square()
            for ranks in holders:
                torch.distributed.all_reduce(square, group=ranks)
            total += float(square)
        return math.sqrt(total) if math.isfinite(total) else total

    def skip(self) -> None:
        """Forget the gradients; the step counts as done."""
        for name, master in self.masters.items():
            self.working[name].grad = master.grad = None
        self.steps += 1

    @torch.no_grad()
    def step(self, lr: float, clip: float = 0.0, norm: float | None = None) -> float:
        """One update at learning rate `lr`; returns the global gradient norm before clipping (0 where not asked).

        `norm` spares computing it again. A gradient that is not finite moves nothing: with clipping, whose norm ties
        all parameters, the whole update is left out, otherwise that of its own parameter.
        """
        self.collect()
        if clip > 0:
            norm = self.norm() if norm is None else norm
            scale = min(1.0, clip / (norm + 1e-6))
            if scale < 1:
                torch._foreach_mul_([m.grad for m in self.masters.values() if m.grad is not None], scale)
        else:
            norm = 0.0
            for master in self.masters.values():
                if master.grad is not None and not master.grad.sum().isfinite():
                    master.grad = None
        if math.isfinite(norm):
            for group in self.inner.param_groups:
                group["lr"] = lr * group["share"]
            self.inner.step()
            self._write_back()
        self.skip()
        return norm

    @torch.no_grad()
    def _write_back(self) -> None:
        for name, parameter in self.working.items():
            if self.masters[name].data_ptr() != local(parameter).data_ptr():
                parameter.copy_(self.masters[name])

    def tensors(self) -> dict[str, torch.Tensor]:
        """Masters and moments, this rank's shards of them: `master/NAME`, `exp_avg/NAME`, `exp_avg_sq/NAME`,
        `step/NAME`. The tensors themselves, so that writing into them is restoring; `restored` must follow."""
        found = {f"master/{name}": master for name, master in self.masters.items()}
        for name, master in self.masters.items():
            found |= {f"{key}/{name}": self.inner.state[master][key] for key in MOMENTS}
        return found

    def restored(self, steps: int) -> None:
        """What `tensors` gave has been written to: let the working parameters follow."""
        self.steps = steps
        self._write_back()

    def save(self, path: str | os.PathLike) -> None:
        """Masters, moments and counters as one safetensors file, written whole or not at all."""
        tensors: Mapping[str, torch.Tensor] = {**self.tensors(), "steps": torch.tensor(self.steps)}
        with atomic_path(path) as temporary:
            save_file({key: tensor.contiguous() for key, tensor in tensors.items()}, temporary)

    @torch.no_grad()
    def load(self, path: str | os.PathLike) -> None:
        """Continue from `save`: the same numbers, bit for bit."""
        stored = load_file(Path(path))
        for key, tensor in self.tensors().items():
            tensor.copy_(stored[key])
        self.restored(int(stored["steps"]))


def local(tensor: torch.Tensor) -> torch.Tensor:
    """This rank's shard of a tensor that is sharded (a DTensor); any other tensor itself."""
    return tensor.to_local() if hasattr(tensor, "to_local") else tensor


def _master(parameter: torch.Tensor, apart: bool) -> torch.Tensor:
    own = local(parameter.detach())
    return own.to(torch.float32, copy=apart)


def _holders(parameter: torch.Tensor) -> tuple:
    """The groups of ranks over which a parameter is sharded; none where every rank has the whole."""
    mesh = getattr(parameter, "device_mesh", None)
    if mesh is None:
        return ()
    return tuple(mesh.get_group(dim) for dim, placed in enumerate(parameter.placements) if not placed.is_replicate())
