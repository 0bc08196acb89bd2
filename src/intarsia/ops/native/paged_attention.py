"""`ops.paged_attention` on native code. Shape letters: n queries, H query heads, K KV heads, P head dim, T a page."""

from __future__ import annotations

import torch

from intarsia.ops.native import library
from intarsia.ops.native.library import dense


def paged_attention(
    q: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    tables: torch.Tensor,
    lengths: torch.Tensor,
    window: int | None = None,
) -> torch.Tensor:
    """`ops.paged_attention.paged_attention`; keys and values bfloat16, both in the same strides, are read in place."""
    assert keys.stride() == values.stride() and keys.stride(3) == 1, "keys and values lie alike, heads together"
    asked, tables, lengths = dense(q, torch.float32), dense(tables, torch.int32), dense(lengths, torch.int32)
    out = torch.empty_like(asked)
    count, heads, size = q.shape
    library.loaded.code.paged_attention(
        asked.data_ptr(), out.data_ptr(), keys.data_ptr(), values.data_ptr(), tables.data_ptr(), tables.stride(0),
        lengths.data_ptr(), *keys.stride()[:3], keys.shape[1], count, heads, keys.shape[2], size, window or 0,
        torch.get_num_threads(),
    )  # fmt: skip
    return out.to(q.dtype)
