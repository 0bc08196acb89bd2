"""Checks of the rankings on the model itself, before anything is trained (Model-Optimizer's sanity tests).

For every axis along which blocks become narrower: the parent in the order of the ranking must be the parent, and half
of it by the ranking must do less harm than half in the original order, or by the ranking backwards.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Mapping

import torch

from intarsia.arch import Architecture, Block, Experts, Mamba2
from intarsia.compress.assemble import with_blocks
from intarsia.compress.experts import rank_experts, slice_experts
from intarsia.compress.narrow import Kept, rank_mamba, slice_mamba
from intarsia.compress.options import fewer_experts
from intarsia.compress.score import Scorer
from intarsia.compress.statistics import Statistics
from intarsia.compress.stream import narrow_stream
from intarsia.model import ResidualBlock

MAMBA_AXES = {"mamba heads": "num_heads", "mamba channels": "head_dim", "mamba states": "state_size"}
ORDERS = ("sorted", "ranking", "original", "reversed")
Cut = Callable[[int, ResidualBlock, str], ResidualBlock]  # index, block, one of `ORDERS` -> sorted or narrower block


@dataclasses.dataclass(frozen=True)
class Gate:
    """KL from the parent: `sorted` of the parent in another order (0 but for rounding), the others of half of it."""

    axis: str
    sorted: float
    ranking: float
    original: float
    reversed: float

    @property
    def passed(self) -> bool:
        return self.sorted < 1e-2 * self.ranking + 1e-5 and self.ranking <= min(self.original, self.reversed)


def check(
    scorer: Scorer, stats: Mapping[int, Statistics], orders: Mapping[int, torch.Tensor], states: str = "balanced",
    stream: torch.Tensor | None = None,
) -> Iterator[Gate]:
    """A gate for every axis that the model has; `orders` are the rankings of FFN channels, by block, `states` is the
    measure of Mamba-2's states and `stream` (D,) the ranking of the stream's channels, where it is to be narrower."""
    arch = scorer.model.arch
    if orders:
        yield _gate(scorer, "ffn channels", lambda i, block, order: _ffn(block, orders[i], order, arch)
                    if i in orders else block)  # fmt: skip
    for axis, field in MAMBA_AXES.items():
        if any(isinstance(b, Mamba2) and _half(b, field) != b for b in arch.blocks):
            yield _gate(scorer, axis, lambda i, block, order, field=field:
                        _mamba(block, stats[i], order, field, arch, states)
                        if isinstance(block.spec, Mamba2) else block)  # fmt: skip
    if any(isinstance(b, Experts) and fewer_experts(b, 0.5) != b for b in arch.blocks):
        yield _gate(scorer, "experts", lambda i, block, order: _experts(block, stats[i], order, arch)
                    if isinstance(block.spec, Experts) else block)  # fmt: skip
    if stream is not None:
        yield _stream_gate(scorer, stream)


def _stream_gate(scorer: Scorer, ranking: torch.Tensor) -> Gate:
    half, found = len(ranking) // 2, {}
    for order in ORDERS:
        rank = {"original": ranking.sort().values, "reversed": ranking.flip(0)}.get(order, ranking)
        found[order] = scorer.whole(narrow_stream(scorer.model, rank if order == "sorted" else rank[:half]))["kl"]
    return Gate("stream channels", **found)


def _gate(scorer: Scorer, axis: str, cut: Cut) -> Gate:
    found = {}
    for order in ORDERS:
        blocks = [cut(index, block, order) for index, block in enumerate(scorer.model.blocks)]
        found[order] = scorer.whole(with_blocks(scorer.model, blocks))["kl"]
    return Gate(axis, **found)


def _empty(block: ResidualBlock, spec: Block, arch: Architecture) -> ResidualBlock:
    weight = block.norm.weight
    child = ResidualBlock(spec, arch, weight.dtype, weight.device).requires_grad_(False)
    child.norm.weight.copy_(weight)
    return child.eval()


def _ffn(block: ResidualBlock, ranking: torch.Tensor, order: str, arch: Architecture) -> ResidualBlock:
    old, size = block.mixer, block.spec.intermediate_size
    rank = torch.arange(size) if order == "original" else ranking
    keep = (rank.flip(0) if order == "reversed" else rank)[: size if order == "sorted" else max(1, size // 2)]
    child = _empty(block, dataclasses.replace(block.spec, intermediate_size=len(keep)), arch)
    state = old.state_dict()
    rows = {name: tensor[keep] for name, tensor in state.items() if not name.startswith("down")}
    columns = {"down.weight": state["down.weight"][:, keep]}
    child.mixer.load_state_dict(state | rows | columns)
    return child


def _half(spec: Mamba2, field: str) -> Mamba2:
    """Half of the heads of every group, of the channels of every head, or of the states; what is 1 stays."""
    step = spec.num_groups if field == "num_heads" else 1
    return dataclasses.replace(spec, **{field: max(1, getattr(spec, field) // step // 2) * step})


def _mamba(
    block: ResidualBlock, stats: Statistics, order: str, field: str, arch: Architecture, states: str
) -> ResidualBlock:
    spec = block.spec if order == "sorted" else _half(block.spec, field)
    ranking = rank_mamba(block.mixer, block.spec, stats, states)
    whole = {"original": Kept.everything(block.spec), "reversed": ranking.backwards(block.spec)}.get(order, ranking)
    child = _empty(block, spec, arch)
    slice_mamba(block.mixer, child.mixer, whole.first(block.spec, spec))
    return child


def _experts(block: ResidualBlock, stats: Statistics, order: str, arch: Architecture) -> ResidualBlock:
    ranking = rank_experts(stats)
    whole = {"original": torch.arange(len(ranking)), "reversed": ranking.flip(0)}.get(order, ranking)
    child = _empty(block, block.spec if order == "sorted" else fewer_experts(block.spec, 0.5), arch)
    slice_experts(block.mixer, child.mixer, whole)
    return child
