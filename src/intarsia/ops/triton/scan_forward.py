"""The kernels of the chunked scan: states between chunks, and outputs (state space duality, arXiv 2405.21060, section 6).

Shape letters: Q rows of a chunk, H heads, P head dim, N state, G groups.
"""

from __future__ import annotations

import triton
import triton.language as tl

from intarsia.ops.triton.scan_tools import PRECISION, decays_between, load_tile, prefix_sums, segments_of


@triton.jit
def states_kernel(
    values, keys, dt, A, segments, start, states, end,
    length, chunks, heads, per_group, size, width, v_batch, v_step, k_batch, k_step,
    REVERSE: tl.constexpr, Q: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Chunk by chunk, one block of one head's state: the state before every chunk, and the last one.

    With values x and keys B, state <- decay of the chunk * state + sum_j (decay from j to the end) dt_j x_j B_j^T.
    REVERSE, with values dy and keys C, is the same from the end for the gradient of the state behind every chunk:
    gradient <- decay of the chunk * gradient + sum_i (decay from the start to i) dy_i C_i^T.
    A block (P, N) is independent of the others, so that few heads still make many programs.
    """
    across = tl.cdiv(width, BLOCK_N)
    p = tl.program_id(0) // across * BLOCK_P + tl.arange(0, BLOCK_P)
    n = tl.program_id(0) % across * BLOCK_N + tl.arange(0, BLOCK_N)
    h, b = tl.program_id(1), tl.program_id(2).to(tl.int64)
    values += b * v_batch + h * size
    keys += b * k_batch + h // per_group * width
    dt += b * length * heads + h
    if segments is not None:
        segments += b * length
    here = p[:, None] * width + n[None, :]
    inside = (p < size)[:, None] & (n < width)[None, :]
    state = tl.zeros((BLOCK_P, BLOCK_N), tl.float32)
    if start is not None:
        state += tl.load(start + (b * heads + h) * size * width + here, inside, 0.0)
    rate = tl.load(A + h)
    for step in range(chunks):
        chunk = tl.cast(chunks - 1 - step if REVERSE else step, tl.int64)
        first = chunk * Q
        row = first + tl.arange(0, Q)
        tl.store(states + ((b * chunks + chunk) * heads + h) * size * width + here, state, inside)
        steps = tl.load(dt + row * heads, row < length, 0.0)
        high, low, all_high, all_low = prefix_sums(steps, rate)
        weight = tl.exp(high) if REVERSE else tl.exp((all_high - high) + (all_low - low)) * steps
        decay = tl.exp(all_high)
        if segments is not None:
            own, coming, leaving = segments_of(segments, row, first, length, Q)
            weight = tl.where(own == (coming if REVERSE else leaving), weight, 0.0)
            decay = tl.where(coming == leaving, decay, 0.0)
        value = load_tile(values, row, v_step, p, length, size)
        key = load_tile(keys, row, k_step, n, length, width)
        scaled = (value * weight[:, None]).to(key.dtype)
        state = tl.dot(tl.trans(scaled), key, state * decay, input_precision=PRECISION)
    tl.store(end + (b * heads + h) * size * width + here, state, inside)


@triton.jit
def outputs_kernel(
    x, B, C, dt, A, D, segments, states, y,
    length, heads, per_group, size, width, x_batch, x_step, b_batch, b_step, c_batch, c_step,
    Q: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """One chunk of one head: y_i = sum_{j<=i} (C_i . B_j) decay_ij dt_j x_j + (decay from the start to i) S C_i + D x_i."""
    h, chunk, b = tl.program_id(0), tl.program_id(1).to(tl.int64), tl.program_id(2).to(tl.int64)
    group, first, here = h // per_group, chunk * Q, tl.arange(0, Q)
    row, p = first + here, tl.arange(0, BLOCK_P)
    B += b * b_batch + group * width
    C += b * c_batch + group * width
    states += ((b * tl.num_programs(1) + chunk) * heads + h) * size * width
    scores = tl.zeros((Q, Q), tl.float32)
    out = tl.zeros((Q, BLOCK_P), tl.float32)
    for n_first in range(0, width, BLOCK_N):
        n = n_first + tl.arange(0, BLOCK_N)
        queries = load_tile(C, row, c_step, n, length, width)
        keys = load_tile(B, row, b_step, n, length, width)
        state = load_tile(states, p, width, n, size, width).to(queries.dtype)
        scores = tl.dot(queries, tl.trans(keys), scores, input_precision=PRECISION)
        out = tl.dot(queries, tl.trans(state), out, input_precision=PRECISION)

    steps = tl.load(dt + (b * length + row) * heads + h, row < length, 0.0)
    high, low, _, _ = prefix_sums(steps, tl.load(A + h))
    inward = tl.exp(high)
    seen = here[:, None] >= here[None, :]
    if segments is not None:
        own, coming, _ = segments_of(segments + b * length, row, first, length, Q)
        inward = tl.where(own == coming, inward, 0.0)
        seen &= own[:, None] == own[None, :]
    scores *= decays_between(high[:, None], low[:, None], high[None, :], low[None, :], seen) * steps[None, :]
    value = load_tile(x + b * x_batch + h * size, row, x_step, p, length, size)
    out = tl.dot(scores.to(value.dtype), value, out * inward[:, None], input_precision=PRECISION)
    if D is not None:
        out += tl.load(D + h).to(tl.float32) * value.to(tl.float32)
    y += (b * length + row)[:, None] * (heads * size) + (h * size + p)[None, :]
    tl.store(y, out.to(y.dtype.element_ty), (row < length)[:, None] & (p < size)[None, :])
