"""Tensor parallelism of a block: every rank has some of the heads, groups or channels of its mixer.

The matrices that widen (q, k, v, up, in_proj) are cut by rows, those that come back to the stream (o, down, out_proj)
by columns, and each rank computes a mixer that is narrower by the number of ranks; what they give is summed. in_proj
and the convolution of Mamba-2 have several parts side by side (z, x, B, C, dt), each of which is cut: their rows are
brought into another order first, so that a rank's rows stand together.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, distribute_tensor

from intarsia.arch import Attention, Block, FeedForward, Mamba2
from intarsia.base.errors import IntarsiaError

ROWS, COLUMNS = 0, 1


def share_block(block: nn.Module, mesh: DeviceMesh) -> dict[str, torch.Tensor]:
    """Cut the mixer of a residual block over a one-dimensional mesh; its parameters become DTensors.

    Returns the order that the rows of some were brought into, by their names in the mixer. Raises `IntarsiaError`
    where the widths do not divide by the size of the mesh, and for a mixer that cannot be cut.
    """
    count, mixer = mesh.size(), block.mixer
    narrow, cuts = narrowed(block.spec, count)
    order = _orders(block.spec, count)
    for name, parameter in list(mixer.named_parameters()):
        owner, leaf = mixer.get_submodule(name.rpartition(".")[0]), name.rpartition(".")[2]
        whole = parameter.data[order[name]] if name in order else parameter.data
        shard = distribute_tensor(whole, mesh, [Shard(cuts[name])], src_data_rank=None)
        owner.register_parameter(leaf, nn.Parameter(shard))
    mixer.spec = narrow
    _Local(mixer, mesh)
    return order


def narrowed(spec: Block, count: int) -> tuple[Block, dict[str, int]]:
    """The block that one of `count` ranks computes, and along which dimension each of its parameters is cut."""
    if isinstance(spec, Attention) and not spec.out_bias and not spec.qk_norm:
        changes = {"num_heads": spec.num_heads, "num_kv_heads": spec.num_kv_heads}
        cuts = dict.fromkeys([f"{n}.{kind}" for n in "qkv" for kind in ("weight", "bias")], ROWS)
        cuts["o.weight"] = COLUMNS
    elif isinstance(spec, FeedForward) and not spec.bias:
        changes = {"intermediate_size": spec.intermediate_size}
        cuts = {"gate.weight": ROWS, "up.weight": ROWS, "down.weight": COLUMNS}
    elif isinstance(spec, Mamba2) and not spec.proj_bias:
        changes = {"num_heads": spec.num_heads, "num_groups": spec.num_groups, "norm_groups": spec.groups_of_norm}
        cuts = dict.fromkeys(
            ("in_proj.weight", "conv.weight", "conv.bias", "norm.weight", "A_log", "D", "dt_bias"), ROWS
        )
        cuts["out_proj.weight"] = COLUMNS
    else:
        raise IntarsiaError(
            f"{spec.label} cannot be shared by heads: parallel.tensor cuts attention without an output bias or norms "
            "of its queries, FFNs without biases and Mamba-2 without projection biases. Set parallel.tensor = 1."
        )
    if wrong := [f"{name} = {size}" for name, size in changes.items() if size % count]:
        raise IntarsiaError(f"{spec.label} cannot be shared by {count} ranks: {', '.join(wrong)} does not divide by "
                            "it. Choose another parallel.tensor.")
    return dataclasses.replace(spec, **{name: size // count for name, size in changes.items()}), cuts


def _orders(spec: Block, count: int) -> dict[str, torch.Tensor]:
    """The new order of rows where several parts stand side by side: each rank's piece of every part."""
    if not isinstance(spec, Mamba2):
        return {}
    width = spec.num_groups * spec.state_size
    conv = _interleaved([spec.inner_size, width, width], count)
    return {
        "in_proj.weight": _interleaved([spec.inner_size, spec.inner_size, width, width, spec.num_heads], count),
        "conv.weight": conv, "conv.bias": conv,
    }  # fmt: skip


def _interleaved(sizes: list[int], count: int) -> torch.Tensor:
    parts = torch.arange(sum(sizes)).split(sizes)
    return torch.cat([part.chunk(count)[rank] for rank in range(count) for part in parts])


class _Local:
    """While a mixer runs, its parameters are this rank's plain shards.

    Every rank has the whole input, and the gradients of the input are summed; the outputs are parts of a sum.
    """

    def __init__(self, mixer: nn.Module, mesh: DeviceMesh):
        self.mesh, self.kept = mesh, []
        mixer.register_forward_pre_hook(self.before)
        mixer.register_forward_hook(self.after, always_call=True)

    def before(self, mixer: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
        self.kept = [(part, leaf, p) for part in mixer.modules() for leaf, p in part._parameters.items()
                     if isinstance(p, DTensor)]  # fmt: skip
        for part, leaf, parameter in self.kept:
            part._parameters[leaf] = parameter.to_local()
        x = DTensor.from_local(args[0], self.mesh, [Replicate()], run_check=False)
        return (x.to_local(grad_placements=[Partial()]), *args[1:])

    def after(self, mixer: nn.Module, args: tuple[Any, ...], y: torch.Tensor | None) -> torch.Tensor | None:
        for part, leaf, parameter in self.kept:
            part._parameters[leaf] = parameter
        self.kept = []
        if y is None:  # the mixer failed
            return None
        parts = DTensor.from_local(y, self.mesh, [Partial()], run_check=False)
        return parts.redistribute(placements=[Replicate()]).to_local()
