"""KL to a model of which only the largest logits of every token are kept: what an offline teacher says.

Everything that was left out is one event, whose probability is kept. So the KL is that of a coarser distribution: never
above the full one (the data-processing inequality), and equal to it where all logits are kept.

Shape letters: N tokens (any leading shape), D hidden width, V vocabulary, k logits of a token.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from intarsia.ops.losses import CHUNK, LEARNING, Buffers, Gradients, chunks


@dataclass(frozen=True)
class TopLogits:
    """`gaps` (N, k) float16: how far each logit lies below the largest (0, then negative); `ids` (N, k) int32: its
    token; `tail` (N,) float32: the probability of all other tokens together."""

    gaps: torch.Tensor
    ids: torch.Tensor
    tail: torch.Tensor

    def __getitem__(self, rows: slice) -> TopLogits:
        return TopLogits(self.gaps[rows], self.ids[rows], self.tail[rows])


@torch.no_grad()
def top_logits(hidden: torch.Tensor, head: torch.Tensor, k: int, chunk: int = CHUNK) -> TopLogits:
    """The k largest logits of hidden (N, D) read by a head (V, D), largest first."""
    rows = hidden.flatten(0, -2)
    gaps = torch.empty(len(rows), k, dtype=torch.float16, device=rows.device)
    ids = torch.empty(len(rows), k, dtype=torch.int32, device=rows.device)
    tail = torch.empty(len(rows), device=rows.device)
    room = Buffers(head, min(chunk, len(rows)), 1)
    for part in chunks(len(rows), chunk):
        logits = room.logits(0, rows[part], head).float()
        values, places = logits.topk(k, dim=-1)
        rest = logits.scatter(-1, places, -torch.inf).logsumexp(-1)
        gaps[part], ids[part] = values - values[:, :1], places
        tail[part] = (rest - logits.logsumexp(-1)).exp()
    shape = hidden.shape[:-1]
    return TopLogits(gaps.view(*shape, k), ids.view(*shape, k), tail.view(shape))


def top_kl(
    parent: TopLogits, child_hidden: torch.Tensor, child_head: torch.Tensor, chunk: int = LEARNING
) -> torch.Tensor:
    """KL(parent || child) over the kept tokens and all others as one, in nats: the mean over tokens, a float32 scalar.

    child_hidden (N, D) after the final norm, child_head (V, D); differentiable in both.
    """
    k = parent.gaps.shape[-1]
    flat = TopLogits(parent.gaps.reshape(-1, k), parent.ids.reshape(-1, k), parent.tail.flatten())
    return _TopKL.apply(flat, child_hidden.flatten(0, -2), child_head, chunk)


def top_kl_rows(
    parent: TopLogits, q: torch.Tensor, gradient: bool = False
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """The KL (n,) to logits q (n, V) and, with `gradient`, softmax(q) - p, where p shares the tail out as q does."""
    log_q, ids = q.float().log_softmax(-1), parent.ids.long()
    top = parent.gaps.float().log_softmax(-1) + torch.log1p(-parent.tail)[:, None]
    rest = log_q.scatter(-1, ids, -torch.inf).logsumexp(-1)
    none = torch.full_like(rest, -torch.inf)
    shift = torch.where(parent.tail > 0, parent.tail.log() - rest, none)  # log p - log q of every token of the tail
    apart = top.exp() * (top.clamp_min(-1e4) - log_q.gather(-1, ids))  # a gap that float16 cannot hold is no mass
    nats = apart.sum(-1) + torch.where(parent.tail > 0, parent.tail * shift, 0.0)
    if not gradient:
        return nats, None
    p = (log_q + shift[:, None]).exp_().scatter_(-1, ids, top.exp())
    return nats, log_q.exp_().sub_(p).to(q.dtype)


class _TopKL(torch.autograd.Function):
    @staticmethod
    def forward(ctx, parent, hidden, head, chunk):
        grads = Gradients(ctx, hidden, head, ctx.needs_input_grad[1], ctx.needs_input_grad[2], "mean")
        out = torch.empty(len(hidden), device=hidden.device)
        room = Buffers(head, min(chunk, len(hidden)), 1)
        for part in chunks(len(hidden), chunk):
            out[part], dq = top_kl_rows(parent[part], room.logits(0, hidden[part], head), grads.wanted)
            if grads.wanted:
                grads.add(part, dq)
        grads.keep()
        return out.mean()

    @staticmethod
    def backward(ctx, upstream):
        return None, *Gradients.scaled(ctx, upstream), None
