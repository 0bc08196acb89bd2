"""The kernels behind the chunked scan, from the states before and their gradients behind every chunk.

Shape letters: Q rows of a chunk, H heads, P head dim, N state, G groups. Row i reads, row j was read; matrices are
kept as (j, i). With scores_ij = B_j . C_i, decay_ij = exp(sum_{j<k<=i} a_k), a = dt A, and m_ij = scores_ij decay_ij:
    dx_j = dt_j u_j + D dy_j and ddt_j = x_j . u_j + A da_j, where u_j = sum_i m_ij dy_i + (decay from j on) G B_j
    da_k = sum_{j<k<=i} (dy_i . x_j) dt_j m_ij, and what passes row k on the way in from S and on the way out to G
    dB_j = sum_i w_ij C_i + (decay from j on) dt_j G^T x_j, where w_ij = (dy_i . x_j) dt_j decay_ij; dC_i likewise
"""

from __future__ import annotations

import triton
import triton.language as tl

from intarsia.ops.triton.scan_tools import PRECISION, decays_between, load_tile, prefix_sums, segments_of, tile


@triton.jit
def inputs_kernel(
    x, B, C, dt, A, D, segments, states, dstates, dy, dx, ddt, dA, dD,
    length, heads, per_group, size, width, x_batch, x_step, b_batch, b_step, c_batch, c_step,
    Q: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """One chunk of one head: dx, ddt, and its part of dA and dD."""
    h, chunk, b = tl.program_id(0), tl.program_id(1).to(tl.int64), tl.program_id(2).to(tl.int64)
    group, first, here, p = h // per_group, chunk * Q, tl.arange(0, Q), tl.arange(0, BLOCK_P)
    rest = (length - first).to(tl.int32)
    x += b * x_batch + first * x_step + h * size
    B += b * b_batch + first * b_step + group * width
    C += b * c_batch + first * c_step + group * width
    row, part = (b * length + first) * heads + h, (b * tl.num_programs(1) + chunk) * heads + h
    states += part * size * width
    dstates += part * size * width
    scores, out, read, passing = _over_states(
        B, C, states, dstates, b_step, c_step, rest, size, width, Q, BLOCK_P, BLOCK_N
    )
    steps = tl.load(dt + row + here * heads, here < rest, 0.0)
    rate = tl.load(A + h)
    high, low, all_high, all_low = prefix_sums(steps, rate, 0.0)
    inward = tl.exp(high)
    outward = tl.exp((all_high - high) + (all_low - low))
    passing *= tl.exp(all_high)
    read_by = here[:, None] <= here[None, :]
    if segments is not None:
        own, coming, leaving = segments_of(segments + b * length, first, here, rest, Q)
        inward = tl.where(own == coming, inward, 0.0)
        outward = tl.where(own == leaving, outward, 0.0)
        passing = tl.where(coming == leaving, passing, 0.0)
        read_by &= own[:, None] == own[None, :]
    scores *= decays_between(high[None, :], low[None, :], high[:, None], low[:, None], read_by)

    value = load_tile(x, here, x_step, p, rest, size)
    at, inside = tile(here, heads * size, p, rest, size)
    delta = tl.load(dy + row * size + at, inside, 0.0)
    read = tl.sum(read * delta, 1) * inward
    out *= outward[:, None]
    outgoing = tl.sum(out * value, 1) * steps
    out = tl.dot(scores.to(delta.dtype), delta, out, input_precision=PRECISION)

    scores *= tl.dot(value, tl.trans(delta), input_precision=PRECISION) * steps[:, None]
    dsteps = tl.sum(out * value, 1)
    da = _decay_gradients(scores, outgoing, here, Q) + tl.cumsum(read, 0, reverse=True) + passing
    tl.store(ddt + row + here * heads, dsteps + rate * da, here < rest)
    tl.store(dA + part, tl.sum(da * steps))
    out *= steps[:, None]
    if D is not None:
        out += tl.load(D + h).to(tl.float32) * delta.to(tl.float32)
        tl.store(dD + part, tl.sum(value.to(tl.float32) * delta.to(tl.float32)))
    tl.store(dx + row * size + at, out.to(dx.dtype.element_ty), inside)


@triton.jit
def _over_states(
    B, C, states, dstates, b_step, c_step, rest, size, width, Q: tl.constexpr, BLOCK_P: tl.constexpr,
    BLOCK_N: tl.constexpr,
):  # fmt: skip
    """What is a sum over the N states: scores (j, i), G B_j (Q, P), S C_i (Q, P) and <G, S>."""
    here, p = tl.arange(0, Q), tl.arange(0, BLOCK_P)
    scores = tl.zeros((Q, Q), tl.float32)
    out = tl.zeros((Q, BLOCK_P), tl.float32)
    read = tl.zeros((Q, BLOCK_P), tl.float32)
    passing = 0.0
    for n_first in range(0, width, BLOCK_N):
        n = n_first + tl.arange(0, BLOCK_N)
        queries = load_tile(C, here, c_step, n, rest, width)
        keys = load_tile(B, here, b_step, n, rest, width)
        state = load_tile(states, p, width, n, size, width)
        dstate = load_tile(dstates, p, width, n, size, width)
        passing += tl.sum(state.to(tl.float32) * dstate.to(tl.float32))
        scores = tl.dot(keys, tl.trans(queries), scores, input_precision=PRECISION)
        out = tl.dot(keys, tl.trans(dstate), out, input_precision=PRECISION)
        read = tl.dot(queries, tl.trans(state), read, input_precision=PRECISION)
    return scores, out, read, passing


@triton.jit
def _decay_gradients(terms, outgoing, here, Q: tl.constexpr):
    """da_k = sum_{j<k<=i} terms_ij + sum_{j<k} outgoing_j, where only positive distances are added up.

    Row sums less column sums would be cheaper, but leave rounding errors where a strong decay makes da zero, and those
    are multiplied by the large dt that caused it. What leaves the chunk at j has been read by all rows behind k, like
    the terms of the last row, so it is added to those.
    """
    later = here[:, None] < here[None, :]
    terms = tl.where(later, terms, 0.0) + tl.where(here == Q - 1, 1.0, 0.0)[None, :] * outgoing[:, None]
    behind = tl.sum(tl.where(later, tl.cumsum(terms, 0), 0.0), 1)  # at j: da of row j + 1
    return tl.sum(tl.where(here[:, None] + 1 == here[None, :], behind[:, None], 0.0), 0)


@triton.jit
def groups_kernel(
    x, B, C, dt, A, segments, states, dstates, dy, dB, dC,
    chunks, length, heads, per_group, size, width, x_batch, x_step, b_batch, b_step, c_batch, c_step,
    SHARE: tl.constexpr, Q: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """One chunk and BLOCK_N states of one group: the part of dB and dC that SHARE of its heads have.

    Parts lie one after the other, (parts, B, L, G, N) float32.
    """
    parts = tl.cdiv(per_group, SHARE)
    group, part = tl.program_id(1) // parts, tl.program_id(1) % parts
    b, chunk = (tl.program_id(0) // chunks).to(tl.int64), (tl.program_id(0) % chunks).to(tl.int64)
    first, here, p = chunk * Q, tl.arange(0, Q), tl.arange(0, BLOCK_P)
    rest = (length - first).to(tl.int32)
    x += b * x_batch + first * x_step
    dt += (b * length + first) * heads
    dy += (b * length + first) * heads * size
    n = tl.program_id(2) * BLOCK_N + tl.arange(0, BLOCK_N)
    weights = tl.zeros((Q, Q), tl.float32)  # (j, i)
    dkeys = tl.zeros((Q, BLOCK_N), tl.float32)
    dqueries = tl.zeros((Q, BLOCK_N), tl.float32)
    read_by = here[:, None] <= here[None, :]
    stays, leaves = here >= 0, here >= 0
    if segments is not None:
        own, coming, leaving = segments_of(segments + b * length, first, here, rest, Q)
        stays, leaves = own == coming, own == leaving
        read_by &= own[:, None] == own[None, :]
    for h in range(group * per_group + part * SHARE, group * per_group + tl.minimum((part + 1) * SHARE, per_group)):
        steps = tl.load(dt + here * heads + h, here < rest, 0.0)
        high, low, all_high, all_low = prefix_sums(steps, tl.load(A + h), 0.0)
        value = load_tile(x + h * size, here, x_step, p, rest, size)
        delta = load_tile(dy + h * size, here, heads * size, p, rest, size)
        decays = decays_between(high[None, :], low[None, :], high[:, None], low[:, None], read_by)
        weights += tl.dot(value, tl.trans(delta), input_precision=PRECISION) * steps[:, None] * decays
        part_of = ((b * chunks + chunk) * heads + h) * size * width
        state = load_tile(states + part_of, p, width, n, size, width)
        dstate = load_tile(dstates + part_of, p, width, n, size, width)
        inward = tl.where(stays, tl.exp(high), 0.0)
        outward = tl.where(leaves, tl.exp((all_high - high) + (all_low - low)) * steps, 0.0)
        dkeys = tl.dot((value * outward[:, None]).to(value.dtype), dstate, dkeys, input_precision=PRECISION)
        dqueries = tl.dot((delta * inward[:, None]).to(value.dtype), state, dqueries, input_precision=PRECISION)
    keys = load_tile(B + b * b_batch + first * b_step + group * width, here, b_step, n, rest, width)
    queries = load_tile(C + b * c_batch + first * c_step + group * width, here, c_step, n, rest, width)
    weights = weights.to(keys.dtype)
    dkeys = tl.dot(weights, queries, dkeys, input_precision=PRECISION)
    dqueries = tl.dot(tl.trans(weights), keys, dqueries, input_precision=PRECISION)
    out_step = heads // per_group * width
    out = ((part * (tl.num_programs(0) // chunks) + b) * length + first) * out_step + group * width
    at, inside = tile(here, out_step, n, rest, width)
    tl.store(dB + out + at, dkeys, inside)
    tl.store(dC + out + at, dqueries, inside)
