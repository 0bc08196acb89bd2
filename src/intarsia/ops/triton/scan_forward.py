"""The kernels of the chunked scan (state space duality, arXiv 2405.21060, section 6): states between chunks, outputs.

Shape letters: Q rows of a chunk, H heads, P head dim, N state, G groups.
"""

from __future__ import annotations

import triton
import triton.language as tl

from intarsia.ops.triton.scan_tools import (
    PRECISION,
    decays_between,
    load_tile,
    log_decays,
    prefix_sums,
    segments_of,
    tile,
)


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
    at, inside = tile(p, width, n, size, width)
    state = tl.zeros((BLOCK_P, BLOCK_N), tl.float32)
    if start is not None:
        state += tl.load(start + (b * heads + h) * size * width + at, inside, 0.0)
    rate, here = tl.load(A + h), tl.arange(0, Q)
    for step in range(chunks):
        chunk = tl.cast(chunks - 1 - step if REVERSE else step, tl.int64)
        first = chunk * Q
        rest = (length - first).to(tl.int32)
        kept = states + ((b * chunks + chunk) * heads + h) * size * width + at
        tl.store(kept, state.to(states.dtype.element_ty), inside)
        steps = tl.load(dt + first * heads + here * heads, here < rest, 0.0)
        high, low, all_high, all_low = prefix_sums(steps, rate, 0.0)
        weight = tl.exp(high) if REVERSE else tl.exp((all_high - high) + (all_low - low)) * steps
        decay = tl.exp(all_high)
        if segments is not None:
            own, coming, leaving = segments_of(segments, first, here, rest, Q)
            weight = tl.where(own == (coming if REVERSE else leaving), weight, 0.0)
            decay = tl.where(coming == leaving, decay, 0.0)
        value = load_tile(values + first * v_step, here, v_step, p, rest, size)
        key = load_tile(keys + first * k_step, here, k_step, n, rest, width)
        scaled = (value * weight[:, None]).to(key.dtype)
        state = tl.dot(tl.trans(scaled), key, state * decay, input_precision=PRECISION)
    tl.store(end + (b * heads + h) * size * width + at, state, inside)


@triton.jit
def outputs_kernel(
    x, B, C, dt, A, D, segments, states, y,
    length, heads, per_group, size, x_batch, x_step, b_batch, b_step, c_batch, c_step,
    WIDTH: tl.constexpr, Q: tl.constexpr, BLOCK_Q: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """BLOCK_Q rows i of one chunk of one head, from the state before the chunk and the rows j up to them in it.

    y_i = sum_{j<=i} (C_i . B_j) decay_ij dt_j x_j + (decay from the start to i) S C_i + D x_i
    """
    h, chunk, b = tl.program_id(0) // (Q // BLOCK_Q), tl.program_id(1).to(tl.int64), tl.program_id(2).to(tl.int64)
    i_first, first, group = tl.program_id(0) % (Q // BLOCK_Q) * BLOCK_Q, chunk * Q, h // per_group
    rest = (length - first).to(tl.int32)
    x += b * x_batch + first * x_step + h * size
    B += b * b_batch + first * b_step + group * WIDTH
    C += b * c_batch + first * c_step + group * WIDTH
    dt += (b * length + first) * heads + h
    y += ((b * length + first) * heads + h) * size
    states += ((b * tl.num_programs(1) + chunk) * heads + h) * size * WIDTH
    p, rate = tl.arange(0, BLOCK_P), tl.load(A + h)

    out = tl.zeros((BLOCK_Q, BLOCK_P), tl.float32)
    i = i_first + tl.arange(0, BLOCK_Q)
    for n_first in tl.static_range(0, WIDTH, BLOCK_N):
        n = n_first + tl.arange(0, BLOCK_N)
        queries = load_tile(C, i, c_step, n, rest, WIDTH)
        state = load_tile(states, p, WIDTH, n, size, WIDTH)
        out = tl.dot(queries, tl.trans(state), out, input_precision=PRECISION)
    here = tl.arange(0, Q)
    before = tl.sum(log_decays(tl.load(dt + here * heads, here < tl.minimum(i_first, rest), 0.0), rate), 0)
    high, low, _, _ = prefix_sums(tl.load(dt + i * heads, i < rest, 0.0), rate, before)
    inward = tl.exp(high)
    if segments is not None:
        own, coming, _ = segments_of(segments + b * length, first, i, rest, Q)
        inward = tl.where(own == coming, inward, 0.0)
    out *= inward[:, None]

    before *= 0.0
    for j_first in range(0, i_first + BLOCK_Q, BLOCK_Q):
        j = j_first + tl.arange(0, BLOCK_Q)
        scores = tl.zeros((BLOCK_Q, BLOCK_Q), tl.float32)
        for n_first in tl.static_range(0, WIDTH, BLOCK_N):
            n = n_first + tl.arange(0, BLOCK_N)
            queries = load_tile(C, i, c_step, n, rest, WIDTH)
            keys = load_tile(B, j, b_step, n, rest, WIDTH)
            scores = tl.dot(queries, tl.trans(keys), scores, input_precision=PRECISION)
        steps = tl.load(dt + j * heads, j < rest, 0.0)
        j_high, j_low, _, _ = prefix_sums(steps, rate, before)
        before += tl.sum(log_decays(steps, rate), 0)
        seen = i[:, None] >= j[None, :]
        if segments is not None:
            theirs, _, _ = segments_of(segments + b * length, first, j, rest, Q)
            seen &= own[:, None] == theirs[None, :]
        decays = decays_between(high[:, None], low[:, None], j_high[None, :], j_low[None, :], seen)
        value = load_tile(x, j, x_step, p, rest, size)
        out = tl.dot((scores * decays * steps[None, :]).to(value.dtype), value, out, input_precision=PRECISION)

    if D is not None:
        out += tl.load(D + h).to(tl.float32) * load_tile(x, i, x_step, p, rest, size).to(tl.float32)
    at, inside = tile(i, heads * size, p, rest, size)
    tl.store(y + at, out.to(y.dtype.element_ty), inside)
