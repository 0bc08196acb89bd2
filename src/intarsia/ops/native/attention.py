"""`ops.attention.attend` on native code. Shape letters: B batch, H query heads, K KV heads, L queries, T keys, P head
dim."""

from __future__ import annotations

import torch

from intarsia.ops.native import library
from intarsia.ops.native.paged_attention import paged_attention


def attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, window: int | None = None) -> torch.Tensor:
    """`ops.attention.attend` without a mask, in bfloat16: blocks of a prompt, or one query of every text over pages
    that are whole texts."""
    q, k, v = (t if t.stride(3) == 1 else t.contiguous() for t in (q, k, v))
    (batch, heads, length, size), total = q.shape, k.shape[2]
    if length == 1 and k.stride() == v.stride():
        texts = torch.arange(batch, dtype=torch.int32)
        pages = (t.transpose(1, 2) for t in (k, v))
        return paged_attention(q[:, :, 0], *pages, texts[:, None], torch.full_like(texts, total), window)[:, :, None]
    out = torch.empty(batch, length, heads, size, dtype=q.dtype)
    places = (argument for t in (q, k, v) for argument in (t.data_ptr(), *t.stride()[:3]))
    library.loaded.code.prompt_attention(
        *places, out.data_ptr(), batch, heads, k.shape[1], length, total, size, window or 0, torch.get_num_threads()
    )
    return out.transpose(1, 2)
