"""`ops.activation` on native code."""

from __future__ import annotations

import torch
from torch.autograd.function import once_differentiable

from intarsia.ops.native import library
from intarsia.ops.native.library import DTYPES, dense


def silu_mul(gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
    """`ops.activation.silu_mul`."""
    gate, up = dense(gate), dense(up, gate.dtype)
    return _SiluMul.apply(gate, up) if torch.is_grad_enabled() else _run("silu_mul_forward", 1, gate, up)[0]


def relu_squared(x: torch.Tensor) -> torch.Tensor:
    """`ops.activation.relu_squared`."""
    x = dense(x)
    return _ReluSquared.apply(x) if torch.is_grad_enabled() else _run("relu_squared_forward", 1, x)[0]


def _run(name: str, outputs: int, *inputs: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """Call the code with contiguous inputs of one shape and dtype and as many outputs of theirs."""
    x = inputs[0]
    made = tuple(torch.empty(x.shape, dtype=x.dtype) for _ in range(outputs))
    tensors = (t.data_ptr() for t in (*inputs, *made))
    getattr(library.loaded.code, name)(DTYPES[x.dtype], *tensors, x.numel(), torch.get_num_threads())
    return made


class _SiluMul(torch.autograd.Function):
    """Keeps its inputs only."""

    @staticmethod
    def forward(ctx, gate, up):
        ctx.save_for_backward(gate, up)
        return _run("silu_mul_forward", 1, gate, up)[0]

    @staticmethod
    @once_differentiable
    def backward(ctx, dout):
        gate, up = ctx.saved_tensors
        return _run("silu_mul_backward", 2, gate, up, dense(dout, gate.dtype))


class _ReluSquared(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return _run("relu_squared_forward", 1, x)[0]

    @staticmethod
    @once_differentiable
    def backward(ctx, dout):
        (x,) = ctx.saved_tensors
        return _run("relu_squared_backward", 1, x, dense(dout, x.dtype))[0]
