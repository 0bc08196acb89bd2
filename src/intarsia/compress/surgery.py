"""Weights for an option from the weights of the parent's block, without training (Puzzle, appendix A, and further).

Everything is a slice, a rotation or a least-squares fit of the parent's block, from the moments of `statistics`.
Shape letters: D model, I intermediate channels, H query heads, K KV heads, P head dim.
"""

from __future__ import annotations

import torch

from intarsia.arch import Architecture, Attention
from intarsia.compress.experts import cut_up, rank_experts, slice_experts
from intarsia.compress.hybrid import attention_to_mamba
from intarsia.compress.importance import rank_kv_heads, refit_rows, ridge
from intarsia.compress.narrow import rank_mamba, slice_mamba
from intarsia.compress.options import OptionSpec
from intarsia.compress.statistics import Statistics
from intarsia.model import ResidualBlock


@torch.no_grad()
def make_option(
    parent: ResidualBlock, spec: OptionSpec, arch: Architecture, stats: Statistics, order: torch.Tensor | None = None,
    states: str = "balanced",
) -> ResidualBlock:
    """A float32 block for `spec` from the parent's block. `order` (I,): FFN channels, most important first; `states`:
    the measure of a Mamba-2 block's states."""
    child = ResidualBlock(spec.block, arch, torch.float32)
    child.norm.weight.copy_(parent.norm.weight)
    if spec.method == "prefix":
        assert order is not None, "a narrower FFN needs the ranking of its channels"
        _slice_ffn(parent.mixer, child.mixer, stats, order)
    elif spec.method == "linear":
        child.mixer.proj.weight.copy_(torch.linalg.solve(ridge(stats.inputs), stats.cross).T)
        _copy_bias(parent.mixer.o if isinstance(parent.spec, Attention) else parent.mixer.down, child.mixer.proj)
    elif spec.method == "drop":
        _drop_kv(parent.mixer, child.mixer, stats)
    elif spec.method == "mamba":
        attention_to_mamba(parent.mixer, child.mixer, stats)
    elif spec.method == "narrow":
        slice_mamba(parent.mixer, child.mixer, rank_mamba(parent.mixer, spec.block, stats, states))
    elif spec.method == "experts":
        slice_experts(parent.mixer, child.mixer, rank_experts(stats))
    elif spec.method in ("cmoe", "moefication"):
        cut_up(parent.mixer, child.mixer, stats, spec.method)
    elif spec.method in ("mean", "aligned", "keep"):
        _share_kv(parent.mixer, child.mixer, stats, spec.method)
    else:
        child.load_state_dict(parent.state_dict())
    return child


def _copy_bias(source: torch.nn.Linear, target: torch.nn.Linear, rows: torch.Tensor | None = None) -> None:
    if source.bias is not None:
        target.bias.copy_(source.bias if rows is None else source.bias[rows])


def _copy_rows(source: torch.nn.Linear, target: torch.nn.Linear, rows: torch.Tensor) -> None:
    target.weight.copy_(source.weight[rows])
    _copy_bias(source, target, rows)


def _slice_ffn(parent, child, stats: Statistics, order: torch.Tensor) -> None:
    keep = order[: child.spec.intermediate_size]
    for name in ("gate", "up") if child.spec.gated else ("up",):
        _copy_rows(getattr(parent, name), getattr(child, name), keep)
    child.down.weight.copy_(refit_rows(stats.channels, parent.down.weight.T, keep).T)
    _copy_bias(parent.down, child.down)


def _expand(heads: torch.Tensor, size: int) -> torch.Tensor:
    """Row indices of whole heads: (n,) head numbers -> (n*size,)."""
    return (heads[:, None] * size + torch.arange(size)).flatten()


def _drop_kv(parent, child, stats: Statistics) -> None:
    """Keep the KV heads that add most to the stream, each with its queries; refit the output projection."""
    old, kept = parent.spec, child.spec.num_kv_heads
    best = rank_kv_heads(stats.channels, parent.o.weight.T, old.num_kv_heads)[:kept].sort().values
    narrow, wide = _expand(best, old.head_dim), _expand(best, old.head_dim * old.group)
    for name, rows in (("q", wide), ("k", narrow), ("v", narrow)):
        _copy_rows(getattr(parent, name), getattr(child, name), rows)
    child.o.weight.copy_(refit_rows(stats.channels, parent.o.weight.T, wide).T)
    _copy_bias(parent.o, child.o)
    _copy_qk_norm(parent, child)


def _copy_qk_norm(parent, child) -> None:
    if parent.spec.qk_norm:
        child.q_norm.weight.copy_(parent.q_norm.weight)
        child.k_norm.weight.copy_(parent.k_norm.weight)


def _share_kv(parent, child, stats: Statistics, method: str) -> None:
    """Every query stays; neighbouring KV heads become one: their mean, their mean after alignment, or the best of them
    with the output columns of the others' queries zeroed (Model-Optimizer's kept-queries pruning)."""
    old, new = parent.spec, child.spec
    size, merged = old.head_dim, old.num_kv_heads // new.num_kv_heads
    _copy_rows(parent.q, child.q, torch.arange(old.num_heads * size))
    child.o.weight.copy_(parent.o.weight)
    _copy_bias(parent.o, child.o)
    _copy_qk_norm(parent, child)
    weights = {name: _heads(getattr(parent, name), old.num_kv_heads) for name in ("k", "v")}
    if method == "keep":
        rank = rank_kv_heads(stats.channels, parent.o.weight.T, old.num_kv_heads)
        place = torch.argsort(rank)
        best = torch.stack([run[place[run].argmin()] for run in torch.arange(old.num_kv_heads).split(merged)])
        lost = torch.tensor([g for g in range(old.num_kv_heads) if g not in best.tolist()])
        child.o.weight[:, _expand(lost, size * old.group)] = 0
        picked = {name: heads[best] for name, heads in weights.items()}
    else:
        if method == "aligned":
            weights = _align(child, stats, old, weights, merged)
        picked = {name: heads.unflatten(0, (-1, merged)).mean(1) for name, heads in weights.items()}
    for name, heads in picked.items():
        layer = getattr(child, name)
        flat = heads.flatten(0, 1)
        layer.weight.copy_(flat[:, : layer.in_features])
        if layer.bias is not None:
            layer.bias.copy_(flat[:, -1])


def _heads(layer: torch.nn.Linear, count: int) -> torch.Tensor:
    """(count, P, D), or (count, P, D + 1) with the bias as the last column, float32."""
    weight = layer.weight.float()
    if layer.bias is not None:
        weight = torch.cat([weight, layer.bias.float()[:, None]], dim=1)
    return weight.unflatten(0, (count, -1))


def _align(child, stats: Statistics, spec: Attention, weights: dict[str, torch.Tensor], merged: int):
    """Rotate the heads of each run of `merged` KV heads onto one another (Align Attention Heads, arXiv 2412.20677).

    Values take any rotation, undone in the output projection. Keys take one angle for each rotary pair, given to the
    queries too; such rotations commute with RoPE, so the parent's function is unchanged. Keys that are normalised
    per channel (q/k norm) cannot be rotated and stay.
    """
    k, v = weights["k"].clone(), weights["v"].clone()
    size = spec.head_dim
    for run in torch.arange(spec.num_kv_heads).split(merged):
        rows = _expand(run, size)
        for head, turn in zip(run.tolist(), procrustes(stats.values[rows][:, rows], size, _any_rotation)):
            v[head] = turn.T @ v[head]
            for column in _query_columns(head, spec):
                child.o.weight[:, column] = child.o.weight[:, column] @ turn
        if spec.qk_norm:
            continue
        for head, turn in zip(run.tolist(), procrustes(stats.keys[rows][:, rows], size, _pair_rotation)):
            k[head] = turn.T @ k[head]
            for rows_q in _query_columns(head, spec):
                child.q.weight[rows_q] = turn.T @ child.q.weight[rows_q]
                if child.q.bias is not None:
                    child.q.bias[rows_q] = turn.T @ child.q.bias[rows_q]
    return {"k": k, "v": v}


def _query_columns(kv_head: int, spec: Attention) -> list[slice]:
    first = kv_head * spec.group
    return [slice(h * spec.head_dim, (h + 1) * spec.head_dim) for h in range(first, first + spec.group)]


def procrustes(gram: torch.Tensor, size: int, fit, sweeps: int = 20) -> list[torch.Tensor]:
    """Generalised Procrustes from second moments: one (P, P) rotation a head, so that the rotated heads agree best.

    gram (n*P, n*P) = sum over tokens of the heads' outer products; `fit` turns a cross moment of a head with the mean
    of the others into its best rotation. Every sweep can only raise the agreement.
    """
    count = len(gram) // size
    cross = gram.unflatten(0, (count, size)).unflatten(2, (count, size)).transpose(1, 2)  # (n, n, P, P)
    turns = [torch.eye(size) for _ in range(count)]
    for _ in range(sweeps):
        for head in range(count):
            others = [cross[head, j] @ turns[j] for j in range(count) if j != head]
            turns[head] = fit(torch.stack(others).sum(0))
    return turns


def _any_rotation(cross: torch.Tensor) -> torch.Tensor:
    u, _, vt = torch.linalg.svd(cross)
    return u @ vt


def _pair_rotation(cross: torch.Tensor) -> torch.Tensor:
    """The best rotation within each pair (d, d + P/2), determinant +1."""
    half = len(cross) // 2
    first, second = torch.arange(half), torch.arange(half) + half
    angle = torch.atan2(cross[second, first] - cross[first, second], cross[first, first] + cross[second, second])
    turn = torch.zeros_like(cross)
    turn[first, first] = turn[second, second] = angle.cos()
    turn[second, first], turn[first, second] = angle.sin(), -angle.sin()
    return turn
