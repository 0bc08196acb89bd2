"""Causal grouped-query attention over a cache, with an optional window.

Shape letters: B batch, H query heads, K KV heads, L new tokens, T tokens in all (T - L of them cached), P head dim.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

from intarsia.ops.backends import pick


def causal_mask(length: int, total: int, window: int | None, device: torch.device) -> torch.Tensor:
    """Boolean (L, T): may new token i (position T - L + i) see token j? Itself and earlier, at most `window` in all."""
    query = torch.arange(total - length, total, device=device)[:, None]
    key = torch.arange(total, device=device)[None, :]
    seen = key <= query
    return seen if window is None else seen & (key > query - window)


def visible(
    queries: torch.Tensor,
    keys: torch.Tensor,
    window: int | None = None,
    keep: torch.Tensor | None = None,
    segments: tuple[torch.Tensor, torch.Tensor] | None = None,
) -> torch.Tensor:
    """Boolean (B, 1, L, T): may a query at a position (B, L) see a key at a position (B, T)?

    The last L keys are the queries' own. `keep` (B, T) False hides a key, `segments` ((B, L), (B, T)) hide other
    documents. A padded token still sees itself: a softmax over nothing would be NaN, and NaN spreads.
    """
    query, key = queries[:, :, None], keys[:, None, :]
    seen = key <= query
    if window is not None:
        seen = seen & (key > query - window)
    if segments is not None:
        seen = seen & (segments[0][:, :, None] == segments[1][:, None, :])
    if keep is not None:
        length, total = queries.shape[1], keys.shape[1]
        itself = torch.eye(total, dtype=torch.bool, device=keys.device)[total - length :]
        seen = (seen & keep[:, None, :]) | itself
    return seen[:, None]


def attend(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    window: int | None = None,
    mask: torch.Tensor | None = None,
) -> torch.Tensor:
    """q (B, H, L, P), k and v (B, K, T, P), H a multiple of K -> (B, H, L, P), scaled by 1/sqrt(P).

    The L queries are the last L of T positions in order, unless a boolean `mask` (B or 1, 1, L, T) says all that is to
    be said of who sees whom (then `window` is ignored).
    """
    if mask is None:
        return pick("attend", attend_torch, q, k, v)(q, k, v, window)
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, enable_gqa=q.shape[1] != k.shape[1])


def attend_torch(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, window: int | None = None) -> torch.Tensor:
    """`attend` without a mask, in torch."""
    length, total = q.shape[2], k.shape[2]
    grouped = q.shape[1] != k.shape[1]
    if window is None or window >= total:
        if length == 1:
            return F.scaled_dot_product_attention(q, k, v, enable_gqa=grouped)
        if length == total and _plain_is_faster(q):
            return _attend_plain(q, k, v)
        if length == total:
            return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=grouped)
    mask = causal_mask(length, total, window, q.device)
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, enable_gqa=grouped)


def _plain_is_faster(q: torch.Tensor) -> bool:
    """Training on short rows on a CPU: the backward pass of torch's fused kernel takes twice as long as its matrix
    products (measured at L = 256; even at 512)."""
    return q.requires_grad and q.device.type == "cpu" and q.dtype == torch.bfloat16 and q.shape[2] <= 256


def _attend_plain(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    """Causal attention as two batched products and a softmax; the queries of a KV head are one long matrix."""
    batch, heads, length, size = q.shape
    grouped = (batch, k.shape[1], -1, size)
    scores = (q * size**-0.5).reshape(grouped) @ k.transpose(-1, -2)
    hidden = torch.full((length, length), -torch.inf, dtype=q.dtype, device=q.device).triu(1)
    weights = (scores.view(batch, heads, length, length) + hidden).softmax(-1)
    return (weights.view(*scores.shape) @ v).view(batch, heads, length, size)


def attend_reference(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, window: int | None = None) -> torch.Tensor:
    """The definition, token by token, in float64: the ground truth of `attend`."""
    q, k, v = q.double(), k.double(), v.double()
    group, offset = q.shape[1] // k.shape[1], k.shape[2] - q.shape[2]
    out = torch.zeros_like(q)
    for head in range(q.shape[1]):
        keys, values = k[:, head // group], v[:, head // group]
        for i in range(q.shape[2]):
            last = offset + i + 1
            first = 0 if window is None else max(0, last - window)
            scores = (keys[:, first:last] @ q[:, head, i, :, None]).squeeze(-1) / q.shape[3] ** 0.5
            out[:, head, i] = (scores.softmax(-1)[:, None] @ values[:, first:last]).squeeze(1)
    return out
