"""The scan of Mamba-2 on GPUs, chunked and with its own backward pass: `ops.ssd` says what it computes.

Shape letters: B batch, L length, H heads, P head dim, G groups, N state, Q rows of a chunk. Forward: one pass over the
chunks of a sequence leaves the state before each (L / Q states, the largest thing there is), a second computes all
outputs at once. Backward keeps the inputs alone, makes the states again, and their gradients in a pass from the end.
Log decays, dt, sums and the running state are float32, the operands of matrix products have x's dtype.
"""

from __future__ import annotations

import torch

from intarsia.ops.triton import launcher
from intarsia.ops.triton.launcher import CHUNK, blocks, config, padded, rows
from intarsia.ops.triton.scan_backward import groups_kernel, inputs_kernel
from intarsia.ops.triton.scan_forward import outputs_kernel, states_kernel
from intarsia.ops.triton.scan_step import step_kernel


def ssd(
    x: torch.Tensor,
    dt: torch.Tensor,
    A: torch.Tensor,
    B: torch.Tensor,
    C: torch.Tensor,
    D: torch.Tensor | None = None,
    state: torch.Tensor | None = None,
    segments: torch.Tensor | None = None,
    chunk_size: int = 128,
) -> tuple[torch.Tensor, torch.Tensor]:
    """x (B, L, H, P), B, C (B, L, G, N) -> y (B, L, H, P) in x's dtype and the last state (B, H, P, N) float32.

    Chunks are no longer than the kernels like them, nor than `chunk_size`; the result does not depend on it.
    """
    chunk = padded(min(chunk_size, x.shape[1]), 16)
    return _Scan.apply(x, dt.float(), A.float(), B.to(x.dtype), C.to(x.dtype), D, state, segments, chunk)


def ssd_step(
    x: torch.Tensor,
    dt: torch.Tensor,
    A: torch.Tensor,
    B: torch.Tensor,
    C: torch.Tensor,
    D: torch.Tensor | None,
    state: torch.Tensor,
) -> torch.Tensor:
    """One token: x (B, H, P), dt (B, H), B, C (B, G, N) -> y (B, H, P); state (B, H, P, N) is updated in place."""
    (batch, heads, size), (groups, width) = x.shape, B.shape[1:]
    x, B, C, kept = rows(x, 2), rows(B, 2), rows(C, 2), state.contiguous()
    y = torch.empty_like(x, memory_format=torch.contiguous_format)
    tile = config("scan_step", x.dtype)
    tile = tile | {"BLOCK_P": min(padded(size), tile["BLOCK_P"]), "BLOCK_N": padded(width)}
    grid = (blocks(size, tile["BLOCK_P"]), heads, batch)
    sizes = (heads, heads // groups, size, width, x.stride(0), B.stride(0), C.stride(0))
    launcher.launch(step_kernel, grid, x, dt.contiguous(), A, B, C, D, kept, y, *sizes, **tile)
    if kept is not state:
        state.copy_(kept)
    return y


class _Scan(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, dt, A, B, C, D, state, segments, chunk):
        x, B, C = (rows(t, 2) for t in (x, B, C))
        dt, A = dt.contiguous(), A.contiguous()
        segments = None if segments is None else segments.contiguous()
        ctx.chunk = min(chunk, CHUNK["backward"][x.dtype.itemsize])
        chunk = min(chunk, CHUNK["forward"][x.dtype.itemsize])
        states, last = _states(x, B, dt, A, segments, state, chunk, reverse=False)
        y = torch.empty_like(x, memory_format=torch.contiguous_format)
        tile = _tile("scan_outputs", x, B, chunk)
        tile["BLOCK_Q"] = min(tile["BLOCK_Q"], chunk)
        (length, heads, per_group, size, width), steps = _sizes(x, B, C)
        args = (x, B, C, dt, A, D, segments, states, y, length, heads, per_group, size, *steps)
        grid = (heads * (chunk // tile["BLOCK_Q"]), states.shape[1], x.shape[0])
        launcher.launch(outputs_kernel, grid, *args, WIDTH=width, **tile)
        ctx.save_for_backward(x, dt, A, B, C, D, state, segments)
        return y, last

    @staticmethod
    def backward(ctx, dy, dlast):
        x, dt, A, B, C, D, state, segments = ctx.saved_tensors
        dy = dy.contiguous()
        states, _ = _states(x, B, dt, A, segments, state, ctx.chunk, reverse=False)
        dstates, dstate = _states(dy, C, dt, A, segments, dlast, ctx.chunk, reverse=True)
        dx, ddt, dA, dD = _input_gradients(x, dt, A, B, C, D, segments, states, dstates, dy, ctx.chunk)
        dB, dC = _group_gradients(x, dt, A, B, C, segments, states, dstates, dy, ctx.chunk)
        return dx, ddt, dA, dB, dC, dD, None if state is None else dstate.to(state.dtype), None, None


def _states(values, keys, dt, A, segments, start, chunk, reverse):
    """The state before every chunk, (B, L/Q, H, P, N), and the last one, float32; reverse: their gradients behind.

    The state that is carried on is float32; what is kept of it is rounded as matrix products will want it.
    """
    batch, length, heads, size = values.shape
    groups, width = keys.shape[2:]
    chunks, tile = blocks(length, chunk), config("scan_states", values.dtype)
    tile = tile | {k: min(tile[k], padded(s, 16)) for k, s in (("BLOCK_P", size), ("BLOCK_N", width))}
    states = values.new_empty(batch, chunks, heads, size, width)
    end = values.new_empty(batch, heads, size, width, dtype=torch.float32)
    start = None if start is None else start.float().contiguous()
    grid = (blocks(size, tile["BLOCK_P"]) * blocks(width, tile["BLOCK_N"]), heads, batch)
    args = (values, keys, dt, A, segments, start, states, end, length, chunks, heads, heads // groups, size, width)
    steps = (*values.stride()[:2], *keys.stride()[:2])
    launcher.launch(states_kernel, grid, *args, *steps, REVERSE=reverse, Q=chunk, **tile)
    return states, end


def _input_gradients(x, dt, A, B, C, D, segments, states, dstates, dy, chunk):
    """dx, ddt, dA and dD; every chunk of a head has a part in the last two."""
    batch, chunks, heads = states.shape[:3]
    dx, ddt = torch.empty_like(dy), torch.empty_like(dt)
    dA = x.new_empty(batch, chunks, heads, dtype=torch.float32)
    dD = None if D is None else torch.empty_like(dA)
    args = (x, B, C, dt, A, D, segments, states, dstates, dy, dx, ddt, dA, dD)
    sizes, steps = _sizes(x, B, C)
    launcher.launch(inputs_kernel, (heads, chunks, batch), *args, *sizes, *steps, **_tile("scan_inputs", x, B, chunk))
    return dx, ddt, dA.sum((0, 1)), None if D is None else dD.sum((0, 1)).to(D.dtype)


def _group_gradients(x, dt, A, B, C, segments, states, dstates, dy, chunk):
    """dB and dC: sums over the heads of a group, in parts where it has many, so that few groups still fill a GPU."""
    (batch, length, groups, width), heads, chunks = B.shape, x.shape[2], states.shape[1]
    tile = _tile("scan_groups", x, B, chunk)
    parts = blocks(heads // groups, tile["SHARE"])
    dB, dC = (x.new_empty(parts, batch, length, groups, width, dtype=torch.float32) for _ in range(2))
    sizes, steps = _sizes(x, B, C)
    args = (x, B, C, dt, A, segments, states, dstates, dy, dB, dC, chunks)
    grid = (batch * chunks, groups * parts, blocks(width, tile["BLOCK_N"]))
    launcher.launch(groups_kernel, grid, *args, *sizes, *steps, **tile)
    return dB.sum(0).to(B.dtype), dC.sum(0).to(C.dtype)


def _tile(kernel: str, x: torch.Tensor, B: torch.Tensor, chunk: int) -> dict[str, int]:
    """Block sizes of a kernel that has a whole chunk of a head before it."""
    tile, size, width = config(kernel, x.dtype), padded(x.shape[3], 16), padded(B.shape[3], 16)
    return tile | {"Q": chunk, "BLOCK_P": size, "BLOCK_N": min(tile["BLOCK_N"], width)}


def _sizes(x: torch.Tensor, B: torch.Tensor, C: torch.Tensor) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """L, H, H / G, P, N; and the steps in memory between sequences and between rows of each of the three."""
    (length, heads, size), (groups, width) = x.shape[1:], B.shape[2:]
    return (length, heads, heads // groups, size, width), (*x.stride()[:2], *B.stride()[:2], *C.stride()[:2])
