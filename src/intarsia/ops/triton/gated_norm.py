"""The gated, grouped RMSNorm on GPUs: `ops.gated_norm` says what it computes.

A program normalises one group of channels in several rows at a time, in float32. The backward pass keeps only the
inputs: with v = y silu(z), n = v / rms(v) and g = dout weight, dv = (g - n mean(g n)) / rms(v).
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from intarsia.ops.triton import launcher
from intarsia.ops.triton.launcher import CONFIG, REDUCERS, blocks, padded, rows


def gated_norm(y: torch.Tensor, z: torch.Tensor, weight: torch.Tensor, groups: int, eps: float) -> torch.Tensor:
    """y, z (..., C), weight (C,) -> (..., C) in y's dtype."""
    return _GatedNorm.apply(y, z, weight, groups, eps)


class _GatedNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx, y, z, weight, groups, eps):
        shape, weight = y.shape, weight.contiguous()
        y, z = (rows(t.reshape(-1, shape[-1]), 1) for t in (y, z))
        out = torch.empty_like(y, memory_format=torch.contiguous_format)
        tile = _tile(y.shape[1] // groups, "norm_forward")
        grid = (blocks(len(y), tile["BLOCK_R"]), groups)
        args = (y, z, weight, out, len(y), y.shape[1] // groups, y.stride(0), z.stride(0), eps)
        launcher.launch(_forward_kernel, grid, *args, **tile)
        ctx.save_for_backward(y, z, weight)
        ctx.shape, ctx.groups, ctx.eps = shape, groups, eps
        return out.view(shape)

    @staticmethod
    def backward(ctx, dout):
        y, z, weight = ctx.saved_tensors
        count, channels = y.shape
        tile = _tile(channels // ctx.groups, "norm_backward")
        programs = min(blocks(count, tile["BLOCK_R"]), blocks(REDUCERS, ctx.groups))
        dy, dz = (torch.empty_like(t, memory_format=torch.contiguous_format) for t in (y, z))
        sums = y.new_empty(programs, channels, dtype=torch.float32)
        args = (y, z, weight, dout.reshape(count, channels).contiguous(), dy, dz, sums)
        sizes = (count, channels // ctx.groups, y.stride(0), z.stride(0), ctx.eps)
        launcher.launch(_backward_kernel, (programs, ctx.groups), *args, *sizes, **tile)
        return dy.view(ctx.shape), dz.view(ctx.shape), sums.sum(0).to(weight.dtype), None, None


def _tile(size: int, kernel: str) -> dict[str, int]:
    """A whole group of `size` channels, and as many rows as fit in the block; more warps where a group needs them."""
    config = dict(CONFIG[kernel])
    block, channels = config.pop("BLOCK"), padded(size)
    warps = min(max(config["num_warps"], channels // 1024), 16)
    return config | {"BLOCK_R": max(block // channels, 1), "BLOCK_C": channels, "num_warps": warps}


@triton.jit
def _forward_kernel(
    y, z, weight, out, count, size, y_step, z_step, eps, BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr
):
    channels = size * tl.num_programs(1)
    own = tl.arange(0, BLOCK_C)[None, :]
    c = tl.program_id(1) * size + own
    row = (tl.program_id(0) * BLOCK_R + tl.arange(0, BLOCK_R)).to(tl.int64)[:, None]
    mask = (row < count) & (own < size)
    gate = tl.load(z + row * z_step + c, mask, 0.0).to(tl.float32)
    v = tl.load(y + row * y_step + c, mask, 0.0).to(tl.float32) * gate * tl.sigmoid(gate)
    scale = tl.rsqrt(tl.sum(v * v, 1) / size + eps)[:, None]
    v = v * scale * tl.load(weight + c, own < size, 0.0).to(tl.float32)
    tl.store(out + row * channels + c, v.to(out.dtype.element_ty), mask)


@triton.jit
def _backward_kernel(
    y, z, weight, dout, dy, dz, sums, count, size, y_step, z_step, eps,
    BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """A program goes through every num_programs(0)-th block of rows and keeps their sum for the weight's gradient."""
    channels = size * tl.num_programs(1)
    own = tl.arange(0, BLOCK_C)[None, :]
    c = tl.program_id(1) * size + own
    scales = tl.load(weight + c, own < size, 0.0).to(tl.float32)
    dscales = tl.zeros((1, BLOCK_C), tl.float32)
    for first in range(tl.program_id(0) * BLOCK_R, count, tl.num_programs(0) * BLOCK_R):
        row = (first + tl.arange(0, BLOCK_R)).to(tl.int64)[:, None]
        mask = (row < count) & (own < size)
        gate = tl.load(z + row * z_step + c, mask, 0.0).to(tl.float32)
        half = tl.sigmoid(gate)
        value = tl.load(y + row * y_step + c, mask, 0.0).to(tl.float32)
        v = value * gate * half
        scale = tl.rsqrt(tl.sum(v * v, 1) / size + eps)[:, None]
        delta = tl.load(dout + row * channels + c, mask, 0.0).to(tl.float32)
        dscales += tl.sum(delta * v * scale, 0)[None, :]
        delta *= scales
        dv = scale * (delta - v * scale * scale * (tl.sum(delta * v, 1) / size)[:, None])
        tl.store(dy + row * channels + c, (dv * gate * half).to(dy.dtype.element_ty), mask)
        dgate = dv * value * half * (1 + gate * (1 - half))
        tl.store(dz + row * channels + c, dgate.to(dz.dtype.element_ty), mask)
    tl.store(sums + tl.program_id(0) * channels + c, dscales, own < size)
