"""Losses over a large vocabulary, from hidden states, so that the logits of all tokens never exist at once.

Shape letters: N tokens (any leading shape), D hidden width, V vocabulary. A chunk of tokens goes through the head,
is reduced in float32, and, where a gradient is wanted, turns its logits into gradients at once: the backward pass
only scales what the forward pass kept. Products run in the dtype of the head; logits in bfloat16 carry a rounding
error of about 2^-9 of their size, so figures that are reported want float32 heads.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.nn.functional as F

from intarsia.base.errors import IntarsiaError
from intarsia.ops.logits import kl_rows, nll_rows

CHUNK = 128  # tokens: 25 MB of float32 logits at V = 49,152, still in a server's last-level cache
# Tokens where the head learns: its gradient, V x D in float32, is read and written once a chunk, and of 128 tokens that
# takes longer than the product that is added.
LEARNING = 512


def kl_divergence(
    parent_hidden: torch.Tensor,
    child_hidden: torch.Tensor,
    parent_head: torch.Tensor,
    child_head: torch.Tensor,
    reduction: str = "mean",
    chunk: int = LEARNING,
) -> torch.Tensor:
    """Forward KL(parent || child) of the next-token distributions, in nats, float32.

    hidden (..., D) after the final norm, heads (V, D). `mean` is a scalar, `none` one figure a token in the shape
    of hidden without D. Differentiable in the child's hidden states and, with `mean`, in its head; the parent is
    taken as constant.
    """
    _check(reduction, child_head)
    shape = child_hidden.shape[:-1]
    parents, children = parent_hidden.flatten(0, -2), child_hidden.flatten(0, -2)
    rows = _KL.apply(parents, children, parent_head, child_head, reduction, chunk)
    return rows if reduction == "mean" else rows.view(shape)


def cross_entropy(
    hidden: torch.Tensor, head: torch.Tensor, targets: torch.Tensor, reduction: str = "mean", chunk: int = LEARNING
) -> torch.Tensor:
    """-log p(target) in nats, float32; hidden (..., D), head (V, D), targets (...) int64. Differentiable in both."""
    _check(reduction, head)
    rows = _CrossEntropy.apply(hidden.flatten(0, -2), head, targets.flatten(), reduction, chunk)
    return rows if reduction == "mean" else rows.view(targets.shape)


def next_token_loss(
    hidden: torch.Tensor, head: torch.Tensor, targets: torch.Tensor, z: float = 0.0, chunk: int = LEARNING
) -> tuple[torch.Tensor, torch.Tensor]:
    """The loss of pre-training: sum over tokens of -log p(target) + z x (log of the softmax's denominator)^2.

    hidden (..., D), head (V, D), targets (...) int64, negative where a token counts for nothing (its logits are never
    computed). Returns the sum, a float32 scalar that is differentiable in hidden and head, and -log p(target) alone
    for every token (...), float32, 0 where it does not count and without a gradient. The z-loss is that of PaLM
    (arXiv 2204.02311, section 5): it keeps the denominator near 1.
    """
    rows, wanted = hidden.flatten(0, -2), targets.flatten()
    valid = (wanted >= 0).nonzero().squeeze(1)
    if len(valid) < len(wanted):
        rows, wanted = rows[valid], wanted[valid]
    total, nll = _NextToken.apply(rows, head, wanted, z, chunk)
    spread = torch.zeros(targets.numel(), device=nll.device)
    spread[valid] = nll
    return total, spread.view(targets.shape)


def token_nll(
    hidden: torch.Tensor, head: torch.Tensor, targets: torch.Tensor, chunk: int = LEARNING
) -> torch.Tensor:
    """-log p(target) of every token (...), float32, 0 where its target is negative; differentiable in hidden and head.

    hidden (..., D), head (V, D), targets (...) int64. What a token's loss weighs may be known only when all are there
    (preferences weigh whole answers), so the backward pass computes the logits a second time.
    """
    rows, wanted = hidden.flatten(0, -2), targets.flatten()
    valid = (wanted >= 0).nonzero().squeeze(1)
    nll = _TokenNLL.apply(rows[valid], head, wanted[valid], chunk)
    return torch.zeros(targets.numel(), device=nll.device).index_put((valid,), nll).view(targets.shape)


@torch.no_grad()
def kl_and_agreement(
    parent_hidden: torch.Tensor,
    child_hidden: torch.Tensor,
    parent_head: torch.Tensor,
    child_head: torch.Tensor,
    chunk: int = CHUNK,
) -> tuple[torch.Tensor, torch.Tensor]:
    """KL(parent || child) in nats (float32) and whether both name the same likeliest token (bool), per token (...)."""
    shape = child_hidden.shape[:-1]
    parents, children = parent_hidden.flatten(0, -2), child_hidden.flatten(0, -2)
    kl = torch.empty(len(children), device=children.device)
    same = torch.empty(len(children), dtype=torch.bool, device=children.device)
    room = Buffers(child_head, min(chunk, len(children)), 2)
    for part in chunks(len(children), chunk):
        p, q = room.logits(0, parents[part], parent_head), room.logits(1, children[part], child_head)
        kl[part], same[part], _ = kl_rows(p, q)
    return kl.view(shape), same.view(shape)


@torch.no_grad()
def nll_and_hits(
    hidden: torch.Tensor, head: torch.Tensor, targets: torch.Tensor, chunk: int = CHUNK
) -> tuple[torch.Tensor, torch.Tensor]:
    """-log p(target) in nats (float32) and whether the target is the most likely token (bool), per token (...)."""
    rows, wanted = hidden.flatten(0, -2), targets.flatten()
    nll = torch.empty(len(rows), device=rows.device)
    hit = torch.empty(len(rows), dtype=torch.bool, device=rows.device)
    room = Buffers(head, min(chunk, len(rows)), 1)
    for part in chunks(len(rows), chunk):
        nll[part], hit[part], _ = nll_rows(room.logits(0, rows[part], head), wanted[part])
    return nll.view(targets.shape), hit.view(targets.shape)


def normalised_mse(child: torch.Tensor, parent: torch.Tensor) -> torch.Tensor:
    """mse(child, parent) / mse(parent, 0), a float32 scalar; 1 is what a zero output scores (Puzzle, section 3)."""
    parent = parent.float()
    return F.mse_loss(child.float(), parent) / parent.square().mean().clamp_min(1e-12)


def cosine_loss(child: torch.Tensor, parent: torch.Tensor) -> torch.Tensor:
    """1 - cosine similarity over the last dimension, averaged over all others; a float32 scalar."""
    return 1 - F.cosine_similarity(child.float(), parent.float(), dim=-1).mean()


class _KL(torch.autograd.Function):
    @staticmethod
    def forward(ctx, parent_hidden, child_hidden, parent_head, child_head, reduction, chunk):
        grads = Gradients(ctx, child_hidden, child_head, ctx.needs_input_grad[1], ctx.needs_input_grad[3], reduction)
        out = torch.empty(len(child_hidden), device=child_hidden.device)
        room = Buffers(child_head, min(chunk, len(child_hidden)), 2)
        for part in chunks(len(child_hidden), chunk):
            p = room.logits(0, parent_hidden[part], parent_head)
            q = room.logits(1, child_hidden[part], child_head)
            out[part], _, dq = kl_rows(p, q, grads.wanted)
            if grads.wanted:
                grads.add(part, dq)
        grads.keep()
        return out.mean() if reduction == "mean" else out

    @staticmethod
    def backward(ctx, upstream):
        hidden, head = Gradients.scaled(ctx, upstream)
        return None, hidden, None, head, None, None


class _CrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden, head, targets, reduction, chunk):
        grads = Gradients(ctx, hidden, head, ctx.needs_input_grad[0], ctx.needs_input_grad[1], reduction)
        out = torch.empty(len(hidden), device=hidden.device)
        room = Buffers(head, min(chunk, len(hidden)), 1)
        for part in chunks(len(hidden), chunk):
            out[part], _, dlogits = nll_rows(room.logits(0, hidden[part], head), targets[part], grads.wanted)
            if grads.wanted:
                grads.add(part, dlogits)
        grads.keep()
        return out.mean() if reduction == "mean" else out

    @staticmethod
    def backward(ctx, upstream):
        return *Gradients.scaled(ctx, upstream), None, None, None


class _NextToken(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden, head, targets, z, chunk):
        grads = Gradients(ctx, hidden, head, ctx.needs_input_grad[0], ctx.needs_input_grad[1], "sum")
        nll = torch.empty(len(hidden), device=hidden.device)
        squares = torch.zeros((), device=hidden.device)
        room = Buffers(head, min(chunk, len(hidden)), 1)
        for part in chunks(len(hidden), chunk):
            logits = room.logits(0, hidden[part], head)
            if z:
                nll[part], square, dlogits = _with_z(logits, targets[part], z)
                squares += square
            else:
                nll[part], _, dlogits = nll_rows(logits, targets[part], grads.wanted)
            if grads.wanted:
                grads.add(part, dlogits)
        grads.keep()
        ctx.mark_non_differentiable(nll)
        return nll.sum() + z * squares, nll

    @staticmethod
    def backward(ctx, upstream, _):
        return *Gradients.scaled(ctx, upstream), None, None, None


def _with_z(logits: torch.Tensor, targets: torch.Tensor, z: float) -> tuple[torch.Tensor, ...]:
    """-log p(target) of every row, the sum of the squared log-denominators, and the gradient of the sum of both, the
    second times z."""
    wide, index = logits.float(), targets[:, None]
    lse = wide.logsumexp(-1)
    nll = lse - wide.gather(-1, index).squeeze(-1)
    probs = (wide - lse[:, None]).exp_().mul_((1 + 2 * z * lse)[:, None])
    probs.scatter_add_(-1, index, probs.new_full(index.shape, -1.0))
    return nll, lse.square().sum(), probs.to(logits.dtype)


class _TokenNLL(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden, head, targets, chunk):
        ctx.save_for_backward(hidden, head, targets)
        ctx.chunk = chunk
        nll = torch.empty(len(hidden), device=hidden.device)
        room = Buffers(head, min(chunk, len(hidden)), 1)
        for part in chunks(len(hidden), chunk):
            nll[part] = nll_rows(room.logits(0, hidden[part], head), targets[part])[0]
        return nll

    @staticmethod
    def backward(ctx, upstream):
        hidden, head, targets = ctx.saved_tensors
        grads = Gradients(ctx, hidden, head, ctx.needs_input_grad[0], ctx.needs_input_grad[1], "sum")
        room = Buffers(head, min(ctx.chunk, len(hidden)), 1)
        for part in chunks(len(hidden), ctx.chunk):
            _, _, dlogits = nll_rows(room.logits(0, hidden[part], head), targets[part], True)
            grads.add(part, (dlogits * upstream[part, None]).to(head.dtype))
        weight = None if grads.weight is None else grads.weight.to(head.dtype)
        return grads.hidden, weight, None, None


class Gradients:
    """What a forward pass collects chunk by chunk: the gradients of the sum of the rows."""

    def __init__(self, ctx, hidden, head, want_hidden: bool, want_head: bool, reduction: str):
        self.ctx, self.source, self.head, self.reduction = ctx, hidden, head, reduction
        self.hidden = torch.empty_like(hidden) if want_hidden else None
        self.weight = torch.zeros(head.shape, dtype=torch.float32, device=head.device) if want_head else None
        self.wanted = want_hidden or want_head

    def add(self, part: slice, logits: torch.Tensor) -> None:
        """Take the gradient with respect to a chunk's logits (n, V)."""
        if self.hidden is not None:
            self.hidden[part] = logits @ self.head
        if self.weight is not None:
            self.weight += logits.T @ self.source[part].to(self.head.dtype)

    def keep(self) -> None:
        self.ctx.kept, self.ctx.dtype = (self.hidden, self.weight), self.head.dtype
        self.ctx.count = {"mean": len(self.source), "sum": 1, "none": None}[self.reduction]

    @staticmethod
    def scaled(ctx, upstream: torch.Tensor) -> tuple[torch.Tensor | None, torch.Tensor | None]:
        hidden, weight = ctx.kept
        ctx.kept = None  # one backward pass, as with any freed graph
        scale = upstream[:, None] if ctx.count is None else upstream / ctx.count
        hidden = None if hidden is None else (hidden * scale).to(hidden.dtype)
        return hidden, None if weight is None else weight.mul_(scale).to(ctx.dtype)


class Buffers:
    """Room for the logits of one chunk, used by all of them: fresh pages of this size cost a fifth of the time."""

    def __init__(self, head: torch.Tensor, rows: int, count: int):
        self.slots = [torch.empty(rows, len(head), dtype=head.dtype, device=head.device) for _ in range(count)]

    def logits(self, slot: int, hidden: torch.Tensor, head: torch.Tensor) -> torch.Tensor:
        """(n, D), (V, D) -> (n, V) in buffer `slot`."""
        out = self.slots[slot][: len(hidden)]
        return torch.mm(hidden.detach().to(out.dtype), head.detach().to(out.dtype).T, out=out)


def chunks(count: int, size: int) -> Iterator[slice]:
    return (slice(start, min(start + size, count)) for start in range(0, count, size))


def _check(reduction: str, head: torch.Tensor) -> None:
    if reduction not in ("mean", "none"):
        raise IntarsiaError(f"reduction {reduction!r} is not known; known: mean, none.")
    if reduction == "none" and head.requires_grad and torch.is_grad_enabled():
        raise IntarsiaError("reduction 'none' gives no gradient to the head: detach it, or use 'mean'.")
