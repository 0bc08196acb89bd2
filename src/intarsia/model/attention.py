"""The attention mixer.

Shape letters: B batch, L length, T tokens in all, D model, H query heads, K KV heads, P head dim.
"""

from __future__ import annotations

import torch
from torch import nn

from intarsia.arch import Attention
from intarsia.model.cache import Memory
from intarsia.model.parts import Scale, Tables
from intarsia.model.rows import Rows
from intarsia.ops.attention import attend
from intarsia.ops.linear import Projection
from intarsia.ops.norm import rms_norm
from intarsia.ops.rope import rotate


class GroupedAttention(nn.Module):
    """Grouped-query attention, with rotary positions or without. q (H*P, D), k and v (K*P, D), o (D, H*P)."""

    def __init__(self, spec: Attention, hidden_size: int, norm_eps: float, dtype: torch.dtype, device=None):
        super().__init__()
        self.spec, self.eps = spec, norm_eps
        wide, narrow = spec.num_heads * spec.head_dim, spec.num_kv_heads * spec.head_dim
        like = {"dtype": dtype, "device": device}
        self.q = Projection(hidden_size, wide, bias=spec.qkv_bias, **like)
        self.k = Projection(hidden_size, narrow, bias=spec.qkv_bias, **like)
        self.v = Projection(hidden_size, narrow, bias=spec.qkv_bias, **like)
        self.o = Projection(wide, hidden_size, bias=spec.out_bias, **like)
        if spec.qk_norm:
            self.q_norm = Scale(spec.head_dim, **like)
            self.k_norm = Scale(spec.head_dim, **like)

    def heads(
        self, x: torch.Tensor, tables: Tables | None, cache: Memory | None, index: int, rows: Rows | None = None
    ) -> torch.Tensor:
        """What every query head reads, (B, H, L, P), before the output projection."""
        q, k, v = (_split(layer(x), self.spec.head_dim) for layer in (self.q, self.k, self.v))
        if self.spec.qk_norm:
            q, k = rms_norm(q, self.q_norm.weight, self.eps), rms_norm(k, self.k_norm.weight, self.eps)
        if tables is not None and self.spec.rope:
            q, k = rotate(q, *tables), rotate(k, *tables)
        window = self.spec.sliding_window
        if cache is not None:
            return cache.attend(index, q, k, v, window, rows)
        return attend(q, k, v, window, None if rows is None else rows.mask(window))

    def forward(
        self,
        x: torch.Tensor,
        tables: Tables | None = None,
        cache: Memory | None = None,
        index: int = 0,
        rows: Rows | None = None,
    ) -> torch.Tensor:
        """x (B, L, D), already normalised -> (B, L, D)."""
        return self.o(self.heads(x, tables, cache, index, rows).transpose(1, 2).flatten(2))


def _split(x: torch.Tensor, head_dim: int) -> torch.Tensor:
    """(B, L, H*P) -> (B, H, L, P)."""
    return x.unflatten(-1, (-1, head_dim)).transpose(1, 2)
