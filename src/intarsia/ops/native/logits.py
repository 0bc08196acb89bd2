"""`ops.logits` on native code. Shape letters: n rows, V vocabulary."""

from __future__ import annotations

import torch

from intarsia.ops.native import library
from intarsia.ops.native.library import DTYPES, dense, pointer

Rows = tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]


def kl_rows(p: torch.Tensor, q: torch.Tensor, gradient: bool) -> Rows:
    """`ops.logits.kl_rows`; the gradient takes the place of q."""
    p, q = dense(p, q.dtype), dense(q)
    return _run(library.loaded.code.kl_rows, p, q, q if gradient else None)


def nll_rows(logits: torch.Tensor, targets: torch.Tensor, gradient: bool) -> Rows:
    """`ops.logits.nll_rows`; the gradient takes the place of the logits."""
    logits = dense(logits)
    return _run(library.loaded.code.nll_rows, logits, dense(targets, torch.int64), logits if gradient else None)


def _run(code, first: torch.Tensor, second: torch.Tensor, gradient: torch.Tensor | None) -> Rows:
    nats, flags = torch.empty(len(first)), torch.empty(len(first), dtype=torch.bool)
    pointers = (pointer(t) for t in (first, second, gradient, nats, flags))
    code(DTYPES[first.dtype], *pointers, *first.shape, torch.get_num_threads())
    return nats, flags, gradient
