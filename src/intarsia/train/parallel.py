"""One model over many ranks: the sequence of transforms, and where every shard stands in a checkpoint.

    1. a block is made on the device and drawn, whole                        no rank holds more than one whole block
    2. its mixer is shared by heads and groups over the ranks of `tensor`    tensor.py
    3. it is sharded over the ranks of `data` (FSDP2): float32 shards, gathered in the dtype that is computed in (FP8
       for layers that multiply in it), and gradients summed in float32; the float32 scalars of scans are left whole
       (islands)

Masters are the shards themselves, so that the optimiser (optimizer.py) sees plain float32 tensors.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, Replicate

from intarsia.arch import Architecture
from intarsia.model import Decoder
from intarsia.model.init import initialise
from intarsia.model.parts import Float32Parameters
from intarsia.train.fp8 import gather_in_fp8
from intarsia.train.optimizer import MasterAdamW, local
from intarsia.train.ranks import Ranks
from intarsia.train.tensor import share_block


class Layout:
    """Which parameters there are, and how this rank's shards of them make up the whole ones.

    `order` are the rows of a matrix, by its name, in the order in which tensor parallelism has them; `islands` are
    the names of parameters whose gradients are still to be averaged over the ranks of `data`.
    """

    def __init__(
        self, named: Mapping[str, nn.Parameter], order: Mapping[str, torch.Tensor], islands: list[str], ranks: Ranks
    ):
        self.named, self.order, self.islands, self.ranks = dict(named), dict(order), islands, ranks

    def renamed(self, model: Decoder) -> None:
        """Look the parameters up again: sharding has put others in their places."""
        self.named = dict(model.named_parameters())

    def average(self, optimizer: MasterAdamW) -> None:
        """Average the collected gradients that FSDP does not."""
        gradients = [g for name in self.islands if (g := optimizer.masters[name].grad) is not None]
        if gradients and self.ranks.data[1] > 1:
            flat = torch.cat([g.flatten() for g in gradients])
            dist.all_reduce(flat, group=self.ranks.mesh.get_group("data"))
            for gradient, part in zip(gradients, flat.div_(self.ranks.data[1]).split([g.numel() for g in gradients])):
                gradient.copy_(part.view_as(gradient))

    def to_file(self, tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """`KIND/NAME` tensors of an optimiser as a checkpoint has them: shards that know the whole tensor, rows in
        the model's own order. Collective."""
        return {key: self._whole(key, tensor) for key, tensor in tensors.items()}

    def _whole(self, key: str, tensor: torch.Tensor) -> torch.Tensor:
        kind, _, name = key.partition("/")
        parameter = self.named[name]
        if kind == "step" or not isinstance(parameter, DTensor):
            return tensor
        whole = DTensor.from_local(
            tensor, parameter.device_mesh, parameter.placements, run_check=False, shape=parameter.shape,
            stride=parameter.stride(),
        )  # fmt: skip
        return whole if name not in self.order else whole.full_tensor()[self.order[name].argsort()]

    @torch.no_grad()
    def from_file(self, stored: Mapping[str, torch.Tensor], tensors: Mapping[str, torch.Tensor]) -> None:
        """What `to_file` gave has been read into: bring it back where it is not the optimiser's own memory."""
        for key, tensor in tensors.items():
            kind, _, name = key.partition("/")
            if kind != "step" and name in self.order:
                tensor.copy_(self._shard(name, stored[key]))

    @torch.no_grad()
    def fill(self, name: str, whole: torch.Tensor) -> None:
        """Set a parameter from the whole tensor, which every rank has."""
        local(self.named[name]).copy_(self._shard(name, whole))

    def _shard(self, name: str, whole: torch.Tensor) -> torch.Tensor:
        parameter = self.named[name]
        if name in self.order:
            whole = whole[self.order[name]]
        if not isinstance(parameter, DTensor):
            return whole
        mesh, whole = parameter.device_mesh, whole.to(parameter.device, parameter.dtype)
        everywhere = DTensor.from_local(whole, mesh, [Replicate()] * mesh.ndim, run_check=False)
        return everywhere.redistribute(placements=parameter.placements).to_local()

    def gathered(self, optimizer: MasterAdamW, arch: Architecture, dtype: torch.dtype) -> Decoder | None:
        """The model whole, on the processor of the first rank; None on the others. Collective."""
        model = Decoder(arch, dtype) if self.ranks.first else None
        into = {} if model is None else dict(model.named_parameters())
        for name, master in optimizer.masters.items():
            whole = self._whole(f"master/{name}", master)
            whole = whole.full_tensor() if isinstance(whole, DTensor) else whole
            if model is not None:
                with torch.no_grad():
                    into[name].copy_(whole)
        return model


def drawn(
    arch: Architecture, dtype: torch.dtype, seed: int, ranks: Ranks, change: Callable[[Decoder], object] = lambda m: m
) -> tuple[Decoder, Layout]:
    """A model with fresh weights, the same ones for any number of ranks; `dtype` is what it computes in.

    `change` is done to the modules of the model before they are shared out, not to its parameters. Raises
    `IntarsiaError` where its heads and groups cannot be shared by so many.
    """
    if ranks.world == 1:
        model = initialise(Decoder(arch, dtype, ranks.device), seed)
        change(model)
        return model, Layout(dict(model.named_parameters()), {}, [], ranks)
    model = Decoder(arch, torch.float32, "meta")
    change(model)
    order: dict[str, torch.Tensor] = {}
    for index, block in enumerate(model.blocks):
        block.to_empty(device=ranks.device)
        initialise(model, seed, part=f"blocks.{index}.")
        if ranks.tensor > 1:
            rows = share_block(block, ranks.mesh["tensor"])
            order |= {f"blocks.{index}.mixer.{name}": those for name, those in rows.items()}
        if ranks.data[1] > 1:
            fully_shard(block, mesh=ranks.mesh["data"], mp_policy=_policy(dtype), ignored_params=set(_islands(block)))
            gather_in_fp8(block)
    for name, module in model.named_children():
        if name != "blocks":
            module.to_empty(device=ranks.device)
            initialise(model, seed, part=f"{name}.")
    whole = {id(parameter) for block in model.blocks for parameter in _islands(block)}
    named = dict(model.named_parameters())
    islands = [name for name, parameter in named.items() if id(parameter) in whole]
    return model, Layout(named, order, islands, ranks)


def shard_root(module: nn.Module, dtype: torch.dtype, ranks: Ranks) -> None:
    """Shard what is in no block (embedding, last norm, head) with `module`, whose forward runs the model."""
    if ranks.data[1] > 1:
        islands = {p for part in module.modules() for p in _islands(part)}
        fully_shard(module, mesh=ranks.mesh["data"], mp_policy=_policy(dtype), ignored_params=islands)


def _policy(dtype: torch.dtype) -> MixedPrecisionPolicy:
    low = None if dtype == torch.float32 else dtype
    return MixedPrecisionPolicy(param_dtype=low, reduce_dtype=torch.float32, cast_forward_inputs=False)


def _islands(module: nn.Module) -> list[nn.Parameter]:
    """The parameters that stay float32 in every forward pass."""
    parts = (part for part in module.modules() if isinstance(part, Float32Parameters))
    return [getattr(part, name) for part in parts for name in part.FLOAT32]
