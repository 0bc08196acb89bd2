"""The processes of one training: alone, or the ranks that `torchrun` started.

Ranks stand in a grid of (data, tensor): those of one row share every block by heads and groups, those of one column
share the samples of a step. One process is a grid of one, and joins nothing.
"""

from __future__ import annotations

import contextlib
import datetime
import functools
import itertools
import os
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist

from intarsia.base.errors import IntarsiaError


@dataclass(frozen=True)
class Ranks:
    """`rank` of `world`; `mesh` is the grid, a DeviceMesh with dimensions `data` and `tensor`, None for one rank."""

    rank: int
    world: int
    device: torch.device
    mesh: Any = None

    @property
    def first(self) -> bool:
        """Whether this is the rank that writes what is written once."""
        return self.rank == 0

    @property
    def data(self) -> tuple[int, int]:
        """Which share of a step's samples is read here, of how many."""
        return (0, 1) if self.mesh is None else (self.mesh.get_local_rank("data"), self.mesh["data"].size())

    @property
    def tensor(self) -> int:
        """Ranks that share a block."""
        return 1 if self.mesh is None else self.mesh["tensor"].size()

    def sum(self, values: torch.Tensor) -> torch.Tensor:
        """The sum over the ranks that share the samples, in place."""
        if self.data[1] > 1:
            dist.all_reduce(values, group=self.mesh.get_group("data"))
        return values

    def agree(self, value: Any) -> Any:
        """What the first rank says, on every rank."""
        if self.world == 1:
            return value
        box = [value]
        dist.broadcast_object_list(box, src=0)
        return box[0]

    def wait(self) -> None:
        """Until all are here."""
        if self.world > 1:
            dist.barrier()

    @contextlib.contextmanager
    def first_alone(self) -> Iterator[None]:
        """Let the first rank do something before all others do it, who then find it done."""
        if not self.first:
            self.wait()
        yield
        if self.first:
            self.wait()


_JOININGS = itertools.count()


@functools.cache
def _store() -> dist.Store:
    """Where the ranks that `torchrun` started find each other."""
    return next(dist.rendezvous("env://"))[0]


@contextlib.contextmanager
def joined(tensor: int = 1, patience: datetime.timedelta | None = None) -> Iterator[Ranks]:
    """The ranks of this work while it lasts; they wait for each other at most `patience` (None: torch's half hour).

    Raises `IntarsiaError` where they cannot be split by `tensor`.
    """
    world = int(os.environ.get("WORLD_SIZE", "1"))
    local = int(os.environ.get("LOCAL_RANK", "0"))
    cuda = torch.cuda.is_available()
    device = torch.device("cuda", local) if cuda else torch.device("cpu")
    if world % tensor:
        raise IntarsiaError(
            f"{world} process{'es' if world > 1 else ''} cannot share blocks by {tensor} (parallel.tensor): start a "
            f"multiple of it, torchrun --nproc-per-node {tensor} -m intarsia train ..."
        )
    if world == 1:
        yield Ranks(0, 1, device)
        return
    if cuda:
        torch.cuda.set_device(device)
    # Each joining under a prefix of its own: where one process trains twice, a fast rank would otherwise read what the
    # other ranks left behind in the store the first time, and wait for them at addresses that nobody listens at.
    store = dist.PrefixStore(f"joining {next(_JOININGS)}", _store())
    backend = "cuda:nccl,cpu:gloo" if cuda else "gloo"
    dist.init_process_group(backend, store=store, rank=int(os.environ["RANK"]), world_size=world, timeout=patience)
    try:
        mesh = dist.init_device_mesh(device.type, (world // tensor, tensor), mesh_dim_names=("data", "tensor"))
        yield Ranks(dist.get_rank(), world, device, mesh)
    finally:
        dist.destroy_process_group()
