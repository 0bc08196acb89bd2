"""What the kernels of the scan have in common: reading a chunk, its decays, its document boundaries.

Shape letters: Q rows of a chunk, P head dim, N state. Decays between two rows of a chunk are needed to the accuracy of
float32 whatever the rows before them: a row whose decay is exp(-1000) must not cost those behind it their digits, as
it does where two float32 prefix sums are subtracted. A prefix sum here is a pair of float32 numbers, the second what
the first has lost, taken from a float64 sum of Q terms; their difference is as good as a sum over the rows between.
"""

from __future__ import annotations

import triton
import triton.language as tl

# exp(-128) is zero in float32. No decay under it has to be told apart, and so no prefix sum exceeds 128 Q.
LOWEST = tl.constexpr(-128.0)
# Products of float32 operands in three passes through the TF32 units, as accurate as float32; bfloat16 is exact anyway.
PRECISION = tl.constexpr("tf32x3")


@triton.jit
def tile(row, step, col, rows, cols):
    """Offsets (Q, P) or (Q, N) into a matrix with `step` between rows, and which of them are inside it.

    They are 32 bits wide and count from the chunk's first row: a pointer for every element would fill the registers.
    """
    return row[:, None] * step + col[None, :], (row < rows)[:, None] & (col < cols)[None, :]


@triton.jit
def load_tile(start, row, step, col, rows, cols):
    """The elements of that tile, zero outside the matrix."""
    offsets, inside = tile(row, step, col, rows, cols)
    return tl.load(start + offsets, inside, 0.0)


@triton.jit
def log_decays(dt, rate):
    """(Q,) float64."""
    return tl.maximum(dt * rate, LOWEST).to(tl.float64)


@triton.jit
def prefix_sums(dt, rate, before):
    """Log decays summed up to each row, from `before` on: (Q,) high and low; and over all rows: high and low."""
    decays = log_decays(dt, rate)
    sums = before + tl.cumsum(decays, 0)
    total = before + tl.sum(decays, 0)
    high, all_high = sums.to(tl.float32), total.to(tl.float32)
    return high, (sums - high).to(tl.float32), all_high, (total - all_high).to(tl.float32)


@triton.jit
def decays_between(later_high, later_low, high, low, seen):
    """exp of the log decays from earlier rows (not counted) to later rows (counted), zero where nothing is seen."""
    return tl.exp(tl.where(seen, (later_high - high) + (later_low - low), float("-inf")))


@triton.jit
def segments_of(segments, first, here, rest, Q: tl.constexpr):
    """(Q,) the rows' segments; that of the state which comes into the chunk at row `first`; that of the one leaving.

    `here` counts from the chunk's first row, and `rest` is how many rows the sequence still has from there.
    """
    segments += first
    own = tl.load(segments + tl.minimum(here, rest - 1))
    coming = tl.load(segments - tl.minimum(first, 1))
    return own, coming, tl.load(segments + tl.minimum(Q, rest) - 1)
