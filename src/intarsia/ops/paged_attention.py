"""Attention of single queries over keys and values that lie in pages: the decode step of many sequences.

Shape letters: n queries, H query heads, K KV heads, P head dim, T tokens of a page.
"""

from __future__ import annotations

import torch

from intarsia.ops.attention import attend
from intarsia.ops.backends import pick


def paged_attention(
    q: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    tables: torch.Tensor,
    lengths: torch.Tensor,
    window: int | None = None,
) -> torch.Tensor:
    """q (n, H, P); keys and values (pages, T, K, P); tables (n, most) int32: the pages of each query's sequence in
    order, token t in slot t mod T of page t // T; lengths (n,) int32: how many tokens a query sees, itself the last of
    them, or the last `window` of those. Returns (n, H, P), scaled by 1/sqrt(P).

    What a query gets does not depend on its neighbours. Pages that lie wholly before the window are not read.
    """
    return pick("paged_attention", paged_attention_torch, q)(q, keys, values, tables, lengths, window)


def paged_attention_torch(
    q: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    tables: torch.Tensor,
    lengths: torch.Tensor,
    window: int | None = None,
) -> torch.Tensor:
    """`paged_attention`, a query at a time."""
    out = torch.empty_like(q)
    for row, (table, length) in enumerate(zip(tables.tolist(), lengths.tolist())):
        first = 0 if window is None else max(0, length - window)
        k, v = (gather_pages(held, table, first, length) for held in (keys, values))
        out[row] = attend(q[row, :, None][None], k, v)[0, :, 0]
    return out


def gather_pages(held: torch.Tensor, table: list[int], first: int, last: int) -> torch.Tensor:
    """Tokens first .. last-1 of a sequence whose pages `table` lists: (pages, T, K, P) -> (1, K, last - first, P).

    A view where those pages lie one after the other, else a copy of the same layout.
    """
    size = held.shape[1]
    pages = table[first // size : -(-last // size)]
    start = first % size
    if pages[-1] - pages[0] == len(pages) - 1 and pages == list(range(pages[0], pages[-1] + 1)):
        taken = held[pages[0] : pages[-1] + 1]
    else:
        taken = held[torch.tensor(pages, device=held.device)]
    return taken.flatten(0, 1)[None, start : start + last - first].transpose(1, 2)
