"""What a chunk of logits is reduced to, a figure a row, with the gradient of its sum where one is wanted.

Shape letters: n rows, V vocabulary. The logits may be overwritten: they are the largest tensors there are. All in
float32 (float64 for float64); the gradient is rounded to the dtype of the logits.
"""

from __future__ import annotations

import torch

from intarsia.ops import backends

Rows = tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]


def kl_rows(p: torch.Tensor, q: torch.Tensor, gradient: bool = False) -> Rows:
    """KL(softmax(p) || softmax(q)) in nats (n,), whether both are largest at one place (n,), and with `gradient`
    softmax(q) - softmax(p), else None. p, q (n, V); a tie at the top counts as one place."""
    return backends.pick("kl_rows", kl_rows_torch, q)(p, q, gradient)


def nll_rows(logits: torch.Tensor, targets: torch.Tensor, gradient: bool = False) -> Rows:
    """-log softmax(logits)[target] in nats (n,), whether the target is the largest (n,), and with `gradient`
    softmax(logits) - onehot(target), else None. logits (n, V), targets (n,) int64."""
    return backends.pick("nll_rows", nll_rows_torch, logits)(logits, targets, gradient)


def kl_rows_torch(p: torch.Tensor, q: torch.Tensor, gradient: bool = False) -> Rows:
    # Two comparisons are far quicker than one argmax.
    same = (p.eq(p.amax(-1, keepdim=True)) & q.eq(q.amax(-1, keepdim=True))).any(-1)
    log_p, log_q = (t.to(_wide(t)).log_softmax(-1) for t in (p, q))
    probs = log_p.exp()
    nats = log_p.sub_(log_q).mul_(probs).sum(-1)
    return nats, same, log_q.exp_().sub_(probs).to(q.dtype) if gradient else None


def nll_rows_torch(logits: torch.Tensor, targets: torch.Tensor, gradient: bool = False) -> Rows:
    index = targets[:, None]
    hits = (logits.gather(-1, index) == logits.amax(-1, keepdim=True)).squeeze(-1)
    log_p = logits.to(_wide(logits)).log_softmax(-1)
    nats = -log_p.gather(-1, index).squeeze(-1)
    if not gradient:
        return nats, hits, None
    return nats, hits, log_p.exp_().scatter_add_(-1, index, log_p.new_full(index.shape, -1.0)).to(logits.dtype)


def _wide(t: torch.Tensor) -> torch.dtype:
    return torch.promote_types(t.dtype, torch.float32)
