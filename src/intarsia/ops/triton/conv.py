"""Causal depthwise convolution on GPUs: `ops.conv` says what it computes.

Shape letters: B batch, L length, C channels, K width. A program computes BLOCK_L rows of BLOCK_C channels. Sums are in
float32. The backward pass keeps only the inputs: it computes the convolution again where it needs the activation.
Offsets inside a tile are 32 bits wide, its place 64: a long sequence of wide rows has more than 2^31 elements.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from intarsia.ops.triton import launcher
from intarsia.ops.triton.launcher import CONFIG, blocks, rows


def causal_conv(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None = None,
    state: torch.Tensor | None = None,
    segments: torch.Tensor | None = None,
    activation: bool = True,
) -> tuple[torch.Tensor, torch.Tensor]:
    """x (B, L, C), weight (C, K) -> y (B, L, C) and the last K-1 inputs (B, K-1, C)."""
    state = None if state is None else state.to(x.dtype)
    y = _Conv.apply(x, weight, bias, state, segments, activation)
    return y, _last_inputs(x, weight.shape[1] - 1, state, segments)


def causal_conv_step(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    state: torch.Tensor,
    activation: bool = True,
) -> torch.Tensor:
    """One token: x (B, C) -> y (B, C); state (B, K-1, C) is updated in place."""
    x, kept = rows(x, 1), state.contiguous()
    (batch, channels), config = x.shape, CONFIG["conv_step"]
    y = torch.empty_like(x, memory_format=torch.contiguous_format)
    grid = (blocks(channels, config["BLOCK_C"]), batch)
    args = (x, weight.contiguous(), bias, kept, y, channels, x.stride(0))
    launcher.launch(_step_kernel, grid, *args, WIDTH=weight.shape[1], SILU=activation, **config)
    if kept is not state:
        state.copy_(kept)
    return y


def _last_inputs(
    x: torch.Tensor, count: int, state: torch.Tensor | None, segments: torch.Tensor | None
) -> torch.Tensor:
    """The last `count` inputs (B, count, C), zero where they belong to another segment than the last token."""
    recent = x[:, max(x.shape[1] - count, 0) :]
    missing = count - recent.shape[1]
    if missing:
        before = x.new_zeros(x.shape[0], missing, x.shape[2]) if state is None else state[:, count - missing :]
        recent = torch.cat([before, recent], 1)
    if segments is None:
        return recent if missing else recent.clone()
    ids = torch.cat([segments[:, :1].expand(-1, missing), segments[:, segments.shape[1] - count + missing :]], 1)
    return recent * (ids == segments[:, -1:])[..., None]


class _Conv(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, bias, state, segments, activation):
        x, weight = rows(x, 1), weight.contiguous()
        state = None if state is None else state.contiguous()
        segments = None if segments is None else segments.contiguous()
        (batch, length, channels), config = x.shape, CONFIG["conv_forward"]
        y = torch.empty_like(x, memory_format=torch.contiguous_format)
        grid = (blocks(channels, config["BLOCK_C"]) * blocks(length, config["BLOCK_L"]), batch)
        args = (x, weight, bias, state, segments, y, length, channels, x.stride(0), x.stride(1))
        launcher.launch(_forward_kernel, grid, *args, WIDTH=weight.shape[1], SILU=activation, **config)
        ctx.save_for_backward(x, weight, bias, state, segments)
        ctx.activation = activation
        return y

    @staticmethod
    def backward(ctx, dy):
        x, weight, bias, state, segments = ctx.saved_tensors
        (batch, length, channels), width, config = x.shape, weight.shape[1], CONFIG["conv_backward"]
        tiles = blocks(length + width - 1, config["BLOCK_L"])
        dx = torch.empty_like(x, memory_format=torch.contiguous_format)
        dstate = None if state is None else torch.empty_like(state)
        sums = x.new_empty(batch, tiles, width + 1, channels, dtype=torch.float32)
        grid = (blocks(channels, config["BLOCK_C"]) * tiles, batch)
        args = (x, weight, bias, state, segments, dy.contiguous(), dx, dstate, sums)
        sizes = (length, channels, x.stride(0), x.stride(1))
        launcher.launch(_backward_kernel, grid, *args, *sizes, WIDTH=width, SILU=ctx.activation, **config)
        sums = sums.sum((0, 1))
        dbias = None if bias is None else sums[width].to(bias.dtype)
        return dx, sums[:width].T.to(weight.dtype), dbias, dstate, None, None


@triton.jit
def _segment(segments, row, first, length):
    """The segments of these rows; rows before the sequence count to its first, rows behind it to its last."""
    return tl.load(segments + tl.minimum(tl.maximum(row + first, 0), length - 1))


@triton.jit
def _inputs(x, state, row, first, c, length, channels, step, WIDTH: tl.constexpr):
    """x at rows `first` + row in float32; `x` points at row `first`. Rows before the sequence come from the state."""
    here = (row + first >= 0) & (row + first < length)
    values = tl.load(x + (row[:, None] * step + c), here[:, None] & (c < channels), 0.0).to(tl.float32)
    if state is not None and first < 2 * WIDTH:
        before = (row + first < 0) & (row + first > -WIDTH)
        earlier = state + ((row[:, None] + (first + WIDTH - 1)) * channels + c)
        values += tl.load(earlier, before[:, None] & (c < channels), 0.0).to(tl.float32)
    return values


@triton.jit
def _convolve(x, weight, bias, state, segments, row, first, c, length, channels, step, WIDTH: tl.constexpr):
    """The convolution at these rows and channels, before the activation."""
    total = tl.zeros((row.shape[0], c.shape[1]), tl.float32)
    if bias is not None:
        total += tl.load(bias + c, c < channels, 0.0).to(tl.float32)
    for k in tl.static_range(WIDTH):
        source = row + (k - WIDTH + 1)
        values = _inputs(x, state, source, first, c, length, channels, step, WIDTH)
        if segments is not None:
            same = _segment(segments, source, first, length) == _segment(segments, row, first, length)
            values = tl.where(same[:, None], values, 0.0)
        total += values * tl.load(weight + c * WIDTH + k, c < channels, 0.0).to(tl.float32)
    return total


@triton.jit
def _forward_kernel(
    x, weight, bias, state, segments, y, length, channels, x_batch, x_step,
    WIDTH: tl.constexpr, SILU: tl.constexpr, BLOCK_L: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    across = tl.cdiv(channels, BLOCK_C)
    c = tl.program_id(0) % across * BLOCK_C + tl.arange(0, BLOCK_C)[None, :]
    first, row = tl.program_id(0) // across * BLOCK_L, tl.arange(0, BLOCK_L)
    b = tl.program_id(1).to(tl.int64)
    x += b * x_batch + first.to(tl.int64) * x_step
    y += (b * length + first) * channels
    if state is not None:
        state += b * (WIDTH - 1) * channels
    if segments is not None:
        segments += b * length
    out = _convolve(x, weight, bias, state, segments, row, first, c, length, channels, x_step, WIDTH)
    if SILU:
        out *= tl.sigmoid(out)
    inside = (row + first < length)[:, None] & (c < channels)
    tl.store(y + (row[:, None] * channels + c), out.to(y.dtype.element_ty), inside)


@triton.jit
def _backward_kernel(
    x, weight, bias, state, segments, dy, dx, dstate, sums, length, channels, x_batch, x_step,
    WIDTH: tl.constexpr, SILU: tl.constexpr, BLOCK_L: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """A program owns rows of the input, those of the state included, and visits the outputs that each has a part in."""
    across = tl.cdiv(channels, BLOCK_C)
    c = tl.program_id(0) % across * BLOCK_C + tl.arange(0, BLOCK_C)[None, :]
    first, row = tl.program_id(0) // across * BLOCK_L - (WIDTH - 1), tl.arange(0, BLOCK_L)
    b = tl.program_id(1).to(tl.int64)
    x += b * x_batch + first.to(tl.int64) * x_step
    dy += (b * length + first) * channels
    dx += (b * length + first) * channels
    if state is not None:
        state += b * (WIDTH - 1) * channels
    if segments is not None:
        segments += b * length
    sums += (b * (tl.num_programs(0) // across) + tl.program_id(0) // across) * (WIDTH + 1) * channels + c
    own = _inputs(x, state, row, first, c, length, channels, x_step, WIDTH)
    grad = tl.zeros((BLOCK_L, BLOCK_C), tl.float32)
    for k in tl.static_range(WIDTH):
        out = row + (WIDTH - 1 - k)
        valid = ((out + first >= 0) & (out + first < length))[:, None] & (c < channels)
        delta = tl.load(dy + (out[:, None] * channels + c), valid, 0.0).to(tl.float32)
        if SILU:
            pre = _convolve(x, weight, bias, state, segments, out, first, c, length, channels, x_step, WIDTH)
            gate = tl.sigmoid(pre)
            delta *= gate * (1 + pre * (1 - gate))
        if k == WIDTH - 1:  # the output of the row itself: every output once, so these are the bias's
            tl.store(sums + WIDTH * channels, tl.sum(delta, 0)[None, :], c < channels)
        if segments is not None:
            same = _segment(segments, out, first, length) == _segment(segments, row, first, length)
            delta = tl.where(same[:, None], delta, 0.0)
        grad += delta * tl.load(weight + c * WIDTH + k, c < channels, 0.0).to(tl.float32)
        tl.store(sums + k * channels, tl.sum(delta * own, 0)[None, :], c < channels)
    here = (row + first >= 0) & (row + first < length)
    tl.store(dx + (row[:, None] * channels + c), grad.to(dx.dtype.element_ty), here[:, None] & (c < channels))
    if dstate is not None:
        dstate += b * (WIDTH - 1) * channels + ((row[:, None] + (first + WIDTH - 1)) * channels + c)
        tl.store(dstate, grad.to(dstate.dtype.element_ty), (row + first < 0)[:, None] & (c < channels))


@triton.jit
def _step_kernel(
    x, weight, bias, state, y, channels, x_batch, WIDTH: tl.constexpr, SILU: tl.constexpr, BLOCK_C: tl.constexpr
):
    c = tl.program_id(0) * BLOCK_C + tl.arange(0, BLOCK_C)
    b = tl.program_id(1).to(tl.int64)
    mask = c < channels
    state += b * (WIDTH - 1) * channels + c
    newest = tl.load(x + b * x_batch + c, mask, 0.0).to(tl.float32)
    total = newest * tl.load(weight + c * WIDTH + (WIDTH - 1), mask, 0.0).to(tl.float32)
    if bias is not None:
        total += tl.load(bias + c, mask, 0.0).to(tl.float32)
    for k in tl.static_range(WIDTH - 1):
        value = tl.load(state + k * channels, mask, 0.0)
        total += value.to(tl.float32) * tl.load(weight + c * WIDTH + k, mask, 0.0).to(tl.float32)
        if k > 0:
            tl.store(state + (k - 1) * channels, value, mask)
    if WIDTH > 1:
        tl.store(state + (WIDTH - 2) * channels, newest.to(state.dtype.element_ty), mask)
    if SILU:
        total *= tl.sigmoid(total)
    tl.store(y + b * channels + c, total.to(y.dtype.element_ty), mask)
