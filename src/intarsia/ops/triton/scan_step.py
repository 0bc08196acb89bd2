"""The kernel of one step of the scan, for decoding: it reads and writes the state once, and little else.

Shape letters: H heads, P head dim, N state, G groups.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def step_kernel(
    x, dt, A, B, C, D, state, y, heads, per_group, size, width, x_batch, b_batch, c_batch,
    BLOCK_P: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """BLOCK_P rows of one head's state <- exp(dt A) state + dt x B^T, and y = state C + D x."""
    p = tl.program_id(0) * BLOCK_P + tl.arange(0, BLOCK_P)
    h, b = tl.program_id(1), tl.program_id(2).to(tl.int64)
    n, at = tl.arange(0, BLOCK_N), b * heads + h
    state += (at * size + p[:, None]) * width + n[None, :]
    inside = (p < size)[:, None] & (n < width)[None, :]
    own = h // per_group * width + n
    step = tl.load(dt + at).to(tl.float32)
    value = tl.load(x + b * x_batch + h * size + p, p < size, 0.0).to(tl.float32)
    key = tl.load(B + b * b_batch + own, n < width, 0.0).to(tl.float32)
    query = tl.load(C + b * c_batch + own, n < width, 0.0).to(tl.float32)
    now = tl.load(state, inside, 0.0) * tl.exp(step * tl.load(A + h)) + (value * step)[:, None] * key[None, :]
    tl.store(state, now, inside)
    out = tl.sum(now * query[None, :], 1)
    if D is not None:
        out += tl.load(D + h).to(tl.float32) * value
    tl.store(y + at * size + p, out.to(y.dtype.element_ty), p < size)
