"""Attention of single queries over pages on GPUs: `ops.paged_attention` says what it computes.

A program takes the query heads of one sequence that share a KV head, and goes through their keys in blocks with running
sums, so that nothing as long as the text is kept.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from intarsia.ops.triton import launcher
from intarsia.ops.triton.launcher import config, padded, rows


def paged_attention(
    q: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    tables: torch.Tensor,
    lengths: torch.Tensor,
    window: int | None = None,
) -> torch.Tensor:
    """q (n, H, P); keys, values (pages, T, K, P); tables (n, most), lengths (n,) int32, on any device -> (n, H, P)."""
    count, heads, dim = q.shape
    page, kv_heads = keys.shape[1:3]
    q, tables, lengths = rows(q, 2), tables.to(q.device), lengths.to(q.device)
    out = torch.empty_like(q, memory_format=torch.contiguous_format)
    sizes = (dim**-0.5, window or 0, heads // kv_heads, dim, page)
    steps = (q.stride(0), tables.stride(0), *keys.stride()[:3], *values.stride()[:3])
    tile = config("paged_attention", q.dtype) | {"BLOCK_G": padded(heads // kv_heads, 16), "BLOCK_P": padded(dim, 16)}
    launcher.launch(_kernel, (count, kv_heads), q, keys, values, tables, lengths, out, *sizes, *steps, **tile)
    return out


@triton.jit
def _kernel(
    q, keys, values, tables, lengths, out, scale, window, group, dim, page, q_step, table_step,
    k_page, k_token, k_head, v_page, v_token, v_head,
    BLOCK_T: tl.constexpr, BLOCK_G: tl.constexpr, BLOCK_P: tl.constexpr,
):  # fmt: skip
    s, k = tl.program_id(0).to(tl.int64), tl.program_id(1)
    g, p = tl.arange(0, BLOCK_G), tl.arange(0, BLOCK_P)
    length = tl.load(lengths + s)
    first = tl.where(window > 0, tl.maximum(length - window, 0), 0)
    inside = (g < group)[:, None] & (p < dim)[None, :]
    own = (k * group + g)[:, None] * dim + p[None, :]
    query = tl.load(q + s * q_step + own, inside, 0.0)
    most = tl.full((BLOCK_G,), float("-inf"), tl.float32)
    total = tl.zeros((BLOCK_G,), tl.float32)
    sums = tl.zeros((BLOCK_G, BLOCK_P), tl.float32)
    for begin in range(first // BLOCK_T * BLOCK_T, length, BLOCK_T):
        t = begin + tl.arange(0, BLOCK_T)
        seen = (t >= first) & (t < length)
        place = tl.load(tables + s * table_step + t // page, seen, 0).to(tl.int64)
        mask = seen[:, None] & (p < dim)[None, :]
        key = tl.load(keys + (place * k_page + t % page * k_token + k * k_head)[:, None] + p[None, :], mask, 0.0)
        scores = tl.dot(query, tl.trans(key), input_precision="ieee") * scale
        scores = tl.where(seen[None, :], scores, float("-inf"))
        now = tl.maximum(most, tl.max(scores, 1))
        weights, shrink = tl.exp(scores - now[:, None]), tl.exp(most - now)
        value = tl.load(values + (place * v_page + t % page * v_token + k * v_head)[:, None] + p[None, :], mask, 0.0)
        found = tl.dot(weights.to(value.dtype), value, input_precision="ieee")
        sums = sums * shrink[:, None] + found
        total = total * shrink + tl.sum(weights, 1)
        most = now
    heads = group * tl.num_programs(1)
    tl.store(out + s * heads * dim + own, (sums / total[:, None]).to(out.dtype.element_ty), inside)
