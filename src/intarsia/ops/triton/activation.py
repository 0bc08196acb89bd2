"""Squared ReLU on GPUs, in one pass over memory: `ops.activation` says what it computes."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from intarsia.ops.triton import launcher
from intarsia.ops.triton.launcher import CONFIG, blocks


def relu_squared(x: torch.Tensor) -> torch.Tensor:
    """max(x, 0)^2, in x's shape and dtype."""
    return _ReluSquared.apply(x.contiguous())


class _ReluSquared(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return _run(_forward_kernel, x)

    @staticmethod
    def backward(ctx, dout):
        (x,) = ctx.saved_tensors
        return _run(_backward_kernel, x, dout.to(x.dtype).contiguous())


def _run(kernel, *inputs: torch.Tensor) -> torch.Tensor:
    out, config = torch.empty_like(inputs[0]), CONFIG["relu_squared"]
    launcher.launch(kernel, (blocks(out.numel(), config["BLOCK"]),), *inputs, out, out.numel(), **config)
    return out


@triton.jit
def _forward_kernel(x, out, count, BLOCK: tl.constexpr):
    i = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    value = tl.load(x + i, i < count, 0.0).to(tl.float32)
    positive = tl.where(value < 0, 0.0, value)  # a NaN stays one
    tl.store(out + i, (positive * positive).to(out.dtype.element_ty), i < count)


@triton.jit
def _backward_kernel(x, dout, dx, count, BLOCK: tl.constexpr):
    i = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    value = tl.load(x + i, i < count, 0.0).to(tl.float32)
    slope = 2 * tl.where(value < 0, 0.0, value)
    delta = tl.load(dout + i, i < count, 0.0).to(tl.float32)
    tl.store(dx + i, (delta * slope).to(dx.dtype.element_ty), i < count)
