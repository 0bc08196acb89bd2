"""What llama.cpp's granitehybrid asks of Mamba-2 beyond its mathematics, without changing a logit.

Its loader takes blocks of twice the stream's width only, and its graph reads a bias of every convolution. So narrower
blocks get silent heads beside their own, each in a group of its own kind: they read zeros, the gated norm of a group of
zeros is zero, and nobody multiplies what they give. They cost their share of time and memory.

Shape letters: H heads, P head dim, G groups, N state, D model.
"""

from __future__ import annotations

import dataclasses

import torch

from intarsia.arch import Architecture, Block, Mamba2
from intarsia.model import Decoder

EXPANSION = 2


def why_not(arch: Architecture) -> str | None:
    """Why this hybrid cannot be made what llama.cpp loads; None if it can."""
    inner = EXPANSION * arch.hidden_size
    for block in arch.blocks:
        if not isinstance(block, Mamba2):
            continue
        shared = block.num_heads // block.num_groups
        if block.inner_size > inner or inner % block.head_dim or inner // block.head_dim % shared:
            return (
                f"its Mamba-2 blocks have {block.inner_size:,} channels in heads of {block.head_dim}, {shared} a "
                f"group, which cannot be filled up to {inner:,}"
            )
    return None


def _widened(block: Block, inner: int) -> Block:
    if not isinstance(block, Mamba2):
        return block
    heads, shared = inner // block.head_dim, block.num_heads // block.num_groups
    return dataclasses.replace(block, num_heads=heads, num_groups=heads // shared, norm_groups=None, conv_bias=True)


@torch.no_grad()
def fit_granite(model: Decoder) -> Decoder:
    """The same function as a model that llama.cpp loads, where nothing is against it (`why_not`); the model itself
    where it is one."""
    inner = EXPANSION * model.arch.hidden_size
    arch = model.arch.replace(blocks=tuple(_widened(block, inner) for block in model.arch.blocks))
    if arch.blocks == model.arch.blocks:
        return model
    fitted = Decoder(arch, model.dtype)
    stored = fitted.state_dict()
    for name, tensor in model.state_dict().items():
        if stored[name].shape == tensor.shape:
            stored[name].copy_(tensor)
    for old, new in zip(model.blocks, fitted.blocks):
        if old.spec != new.spec:
            _fill(old.mixer, new.mixer)
    return fitted.eval()


def _fill(old, new) -> None:
    """Copy a mixer into a wider one whose other heads are silent."""
    for parameter in new.parameters():
        parameter.zero_()
    sizes = [[m.spec.inner_size, m.spec.num_groups * m.spec.state_size] for m in (old, new)]
    (inner, shared), (wide, wide_shared) = sizes
    heads = (old.spec.num_heads, new.spec.num_heads)
    mixed = [(inner, wide), (shared, wide_shared), (shared, wide_shared)]  # x, B, C
    _copy(old.in_proj.weight, new.in_proj.weight, [(inner, wide), *mixed, heads])
    _copy(old.conv.weight, new.conv.weight, mixed)
    if old.conv.bias is not None:
        _copy(old.conv.bias, new.conv.bias, mixed)
    for name in ("A_log", "D", "dt_bias"):
        _copy(getattr(old, name), getattr(new, name), [heads])
    _copy(old.norm.weight, new.norm.weight, [(inner, wide)])
    new.out_proj.weight[:, :inner] = old.out_proj.weight


def _copy(old: torch.Tensor, new: torch.Tensor, parts: list[tuple[int, int]]) -> None:
    """Rows of `old`, part by part, to the beginning of the parts of `new`; `parts`: how many rows each has in both."""
    before, after = zip(*parts)
    for source, target in zip(old.split(before), new.split(after)):
        target[: len(source)] = source
