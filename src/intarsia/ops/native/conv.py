"""`ops.conv` on native code. Shape letters: B batch, L length, C channels, K width."""

from __future__ import annotations

import torch
from torch.autograd.function import once_differentiable

from intarsia.ops import conv
from intarsia.ops.native import library
from intarsia.ops.native.library import DTYPES, dense, pointer, summed

WIDEST = 4  # K for which there is code


def causal_conv(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None = None,
    state: torch.Tensor | None = None,
    segments: torch.Tensor | None = None,
    activation: bool = True,
) -> tuple[torch.Tensor, torch.Tensor]:
    """`ops.conv.causal_conv`."""
    if weight.shape[1] > WIDEST or x.numel() == 0:
        return conv.causal_conv_torch(x, weight, bias, state, segments, activation)
    held = x.new_zeros(x.shape[0], weight.shape[1] - 1, x.shape[2]) if state is None else state.to(x.dtype)
    y = _Conv.apply(x, weight, bias, None if state is None else held, segments, activation)
    return y, conv.last_inputs(x, held, segments)


class _Conv(torch.autograd.Function):
    """Keeps its inputs, and computes what the activation saw again."""

    @staticmethod
    def forward(ctx, x, weight, bias, state, segments, activation):
        x = x if x.stride(-1) == 1 else x.contiguous()
        ctx.save_for_backward(x, weight, bias, state, segments)
        ctx.activation = activation
        y = torch.empty(x.shape, dtype=x.dtype)
        inputs, keep = _inputs(x, weight, bias, state, segments)
        library.loaded.code.conv_forward(*inputs, y.data_ptr(), *_sizes(x, weight, activation))
        del keep
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx, dy):
        x, weight, bias, state, segments = ctx.saved_tensors
        dy, dx = dy.to(x.dtype).contiguous(), torch.empty(x.shape, dtype=x.dtype)
        dstate = None if state is None else torch.empty(state.shape, dtype=x.dtype)
        (channels, width), code = weight.shape, library.loaded.code
        sums = torch.zeros(code.conv_sums(*x.shape[:2]), width + 1, _padded(channels))
        inputs, keep = _inputs(x, weight, bias, state, segments)
        outputs = (pointer(t) for t in (dy, dx, dstate, sums))
        code.conv_backward(*inputs, *outputs, *_sizes(x, weight, ctx.activation))
        del keep
        sums = summed(sums)[:, :channels]
        dbias = None if bias is None else sums[width].to(bias.dtype)
        dstate = None if dstate is None else dstate.to(state.dtype)
        return dx, sums[:width].T.to(weight.dtype), dbias, dstate, None, None


def _inputs(x, weight, bias, state, segments) -> tuple[tuple, list]:
    """The arguments that forward and backward share, and the tensors that must live until the call is over."""
    channels, width = weight.shape
    taps = torch.zeros(width + 1, _padded(channels))
    taps[:width, :channels] = weight.T
    if bias is not None:
        taps[width, :channels] = bias
    keep = [taps, dense(state, x.dtype), dense(segments, torch.int32)]
    return (DTYPES[x.dtype], x.data_ptr(), x.stride(0), x.stride(1), *(pointer(t) for t in keep)), keep


def _padded(channels: int) -> int:
    return -(-channels // 16) * 16


def _sizes(x: torch.Tensor, weight: torch.Tensor, activation: bool) -> tuple[int, ...]:
    return (*x.shape, weight.shape[1], int(activation), torch.get_num_threads())


def causal_conv_step(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    state: torch.Tensor,
    activation: bool = True,
) -> torch.Tensor:
    """`ops.conv.causal_conv_step`."""
    (batch, channels), width = x.shape, weight.shape[1]
    if width > WIDEST or state.dtype != x.dtype:
        return conv.causal_conv_step_torch(x, weight, bias, state, activation)
    x = x if x.stride(-1) == 1 else x.contiguous()
    low = weight.dtype if weight.dtype in DTYPES and (bias is None or bias.dtype == weight.dtype) else torch.float32
    weight, bias, held, y = dense(weight, low), dense(bias, low), dense(state), torch.empty(x.shape, dtype=x.dtype)
    library.loaded.code.conv_step(
        DTYPES[x.dtype], DTYPES[low], x.data_ptr(), x.stride(0), weight.data_ptr(), pointer(bias), held.data_ptr(),
        y.data_ptr(), batch, channels, width, int(activation),
    )  # fmt: skip
    if held is not state:
        state.copy_(held)
    return y
