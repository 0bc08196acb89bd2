"""The scan of Mamba-2 in chunks, in torch, with its own backward (state space duality, arXiv 2405.21060, section 6).

Inside a chunk the recurrence is a masked matrix product; between chunks it passes one state. Chunks are computed a
block at a time, so that what is large (decays and scores, H x Q x Q a chunk) lives in the processor's cache and is
gone after it. The backward pass keeps the inputs and the state before every block, and makes the rest again.

Decays are sums of nonpositive numbers, never differences of two running sums: a difference has lost the small terms
beside the large ones. The first token of a document decays by -inf: whatever crosses it is multiplied by zero.

Shape letters: B batch, L length, H heads, P head dim, G groups, R = H / G heads of a group, N state, Q tokens of a
chunk, K chunks of a block, T = K * Q tokens of a block. "low" is x's dtype, in which matrices are multiplied; "wide"
is float32 (float64 for float64), in which decays and states are kept.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch.autograd.function import once_differentiable

CHUNK = 64  # measured: scores cost in proportion to it, states inversely
BLOCK = 2**20  # decays (H x Q x Q a chunk) of a block: enough to hide the calls, little enough for the cache
_TILE = 8  # tokens whose decays `segment_sums` adds one by one


def segment_sums(a: torch.Tensor) -> torch.Tensor:
    """a (..., Q) -> (..., Q, Q): a[j+1] + ... + a[i] at [i, j], 0 on the diagonal and -inf above it.

    Q is a multiple of 8, or less than 8. Every entry is a sum of its own terms: within a tile one by one; between
    tiles (tokens to the end of j's tile) + (whole tiles between) + (tokens from the start of i's tile).
    """
    if a.shape[-1] <= _TILE:
        return _sums_one_by_one(a)
    tiles = a.unflatten(-1, (-1, _TILE))
    inside = _sums_one_by_one(tiles)
    between = F.pad(_sums_one_by_one(tiles.sum(-1))[..., :-1, :], (0, 0, 1, 0), value=-torch.inf)
    to_start = (between[..., None] + inside[..., None, :, -1, :]).flatten(-2)  # of i's tile, (..., tiles, Q)
    sums = tiles.cumsum(-1)[..., None] + to_start[..., None, :]  # (..., tiles, 8, Q)
    sums.unflatten(-1, (-1, _TILE)).diagonal(dim1=-4, dim2=-2).copy_(inside.movedim(-3, -1))
    return sums.flatten(-3, -2)


def _exp(sums: torch.Tensor) -> torch.Tensor:
    """exp in place, 0 below about 1e-35 (1e-304 in float64): next to the smallest numbers a processor is a hundred
    times slower, in the exponential and in every product after it."""
    least = -80.0 if sums.dtype == torch.float32 else -700.0
    return F.threshold_(sums.clamp_min_(least).exp_(), 2 * math.exp(least), 0.0)


def _sums_one_by_one(a: torch.Tensor) -> torch.Tensor:
    size = a.shape[-1]
    above = torch.ones(size, size, dtype=torch.bool, device=a.device).triu()
    terms = a[..., None].expand(*a.shape, size).masked_fill(above, 0)
    return terms.cumsum(-2).masked_fill_(above.triu(1), -torch.inf)


class ChunkedScan(torch.autograd.Function):
    """`ops.ssd.ssd` as (x, dt, A, B, C, D, state, segments) -> (y, state)."""

    @staticmethod
    def forward(ctx, x, dt, A, B, C, D, state, segments):
        wide = torch.promote_types(x.dtype, torch.float32)
        batch, _, heads, size = x.shape
        S = x.new_zeros(batch, heads, size, B.shape[3], dtype=wide) if state is None else state.to(wide)
        y, kept = torch.empty(x.shape, dtype=x.dtype, device=x.device), []
        for part in _blocks(x):
            kept.append(S)
            block = _Block(x, dt, A, B, C, segments, part)
            before, S = block.states(S)
            y[:, part] = block.output(before, D)
        if any(ctx.needs_input_grad):
            ctx.save_for_backward(x, dt, A, B, C, D, state, segments, *kept)
        return y, S.clone() if S is state else S

    @staticmethod
    @once_differentiable
    def backward(ctx, dy, dS):
        x, dt, A, B, C, D, state, segments, *kept = ctx.saved_tensors
        grads = _Gradients(x, dt, A, B, C, D)
        for part, S in reversed(list(zip(_blocks(x), kept))):
            block = _Block(x, dt, A, B, C, segments, part)
            before, _ = block.states(S)
            dS = block.backward(before, dy, dS, D, grads)
        return *grads.results(), None if state is None else dS.to(state.dtype), None


def _blocks(x: torch.Tensor) -> list[slice]:
    """The stretches of tokens that are computed together."""
    batch, length, heads = x.shape[:3]
    step = CHUNK * max(4, BLOCK // (batch * heads * CHUNK**2))  # a state is kept a block: not too many
    return [slice(first, min(first + step, length)) for first in range(0, length, step)]


class _Gradients:
    """What the blocks write into: gradients of the tokens' inputs by slices, of A and D by sums."""

    def __init__(self, x, dt, A, B, C, D):
        self.inputs = (x, dt, A, B, C, D)
        self.x, self.dt, self.B, self.C = (torch.empty(t.shape, dtype=t.dtype, device=t.device) for t in (x, dt, B, C))
        wide = torch.promote_types(x.dtype, torch.float32)
        self.A = torch.zeros(A.shape, dtype=wide, device=x.device)
        self.D = torch.zeros(A.shape, dtype=wide, device=x.device)

    def results(self) -> tuple[torch.Tensor | None, ...]:
        A, D = self.inputs[2], self.inputs[5]
        return self.x, self.dt, self.A.to(A.dtype), self.B, self.C, None if D is None else self.D.to(D.dtype)


class _Block:
    """K chunks of all rows: the decays and scores in them, and what they do to states, outputs and gradients."""

    def __init__(self, x, dt, A, B, C, segments, part: slice):
        self.part, self.tokens = part, part.stop - part.start
        low, wide = x.dtype, torch.promote_types(x.dtype, torch.float32)
        self.size = Q = min(CHUNK, -(-self.tokens // _TILE) * _TILE)
        self.groups = B.shape[2]
        self.x = self.chunks(x)  # (B, K, H, Q, P), a view
        self.B, self.C = (self.chunks(t).to(low).contiguous() for t in (B, C))  # (B, K, G, Q, N)
        self.A, self.dt = A.to(wide), self.chunks(dt.to(wide)[..., None]).squeeze(-1).contiguous()  # (B, K, H, Q)
        a = self.dt * self.A[:, None]
        if segments is not None:
            a.masked_fill_(self._first_tokens(segments)[:, :, None], -torch.inf)
        self.decay = _exp(segment_sums(a))  # (B, K, H, Q, Q), from the token j to the token i
        self.from_start = _exp(a.cumsum(-1))  # (B, K, H, Q), from the state before the chunk to the token i
        self.to_end = self.decay[..., Q - 1, :]
        self.scores = self.C @ self.B.mT  # (B, K, G, Q, Q), low
        self.added = self.by_group(self.x, self.to_end * self.dt)  # (B, K, G, Q, R*P), low: x as the state gets it

    def chunks(self, t: torch.Tensor) -> torch.Tensor:
        """(B, L, H, P) -> this block's (B, K, H, Q, P), padded with zeros; a view if there is nothing to pad."""
        t = t[:, self.part]
        missing = -self.tokens % self.size
        if missing:
            t = F.pad(t, (0, 0) * (t.dim() - 2) + (0, missing))
        return t.unflatten(1, (-1, self.size)).transpose(2, 3)

    def tokens_of(self, t: torch.Tensor) -> torch.Tensor:
        """(B, K, H, Q, P) -> (B, T, H, P) without the padding."""
        return t.transpose(2, 3).flatten(1, 2)[:, : self.tokens]

    def by_group(self, t: torch.Tensor, factor: torch.Tensor) -> torch.Tensor:
        """t (B, K, H, Q, P) times factor (B, K, H, Q) -> (B, K, G, Q, R*P) low: the heads of a group side by side."""
        t, factor = (v.unflatten(2, (self.groups, -1)).transpose(3, 4) for v in (t, factor[..., None].to(t.dtype)))
        return torch.mul(t, factor, out=t.new_empty(t.shape)).flatten(-2)

    def by_head(self, t: torch.Tensor) -> torch.Tensor:
        """(B, K, G, Q, R*P) -> (B, K, H, Q, P), a view."""
        return t.unflatten(-1, (-1, self.x.shape[-1])).transpose(3, 4).flatten(2, 3)

    def in_groups(self, t: torch.Tensor) -> torch.Tensor:
        """(B, K, H, ...) -> (B, K, G, R, ...)."""
        return t.unflatten(2, (self.groups, -1))

    def _first_tokens(self, segments: torch.Tensor) -> torch.Tensor:
        """(B, K, Q) boolean: does a document begin here? Not at the very first token, whose state is given."""
        starts = F.pad(segments[:, 1:] != segments[:, :-1], (1, 0))
        return self.chunks(starts[:, :, None, None])[:, :, 0, :, 0]

    def states(self, S: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """From the state before the block: those before its chunks (B, K, G, R*P, N), low, and the last, wide."""
        gains = self.added.mT @ self.B  # (B, K, G, R*P, N)
        before = torch.empty_like(gains)
        for k in range(gains.shape[1]):
            before[:, k] = S.view(before[:, k].shape)
            gain = gains[:, k].to(S.dtype).view(S.shape)
            S = torch.addcmul(gain, S, self.from_start[:, k, :, -1, None, None])
        return before, S

    def output(self, before: torch.Tensor, D: torch.Tensor | None) -> torch.Tensor:
        """(B, T, H, P), low: C and B of earlier tokens in the chunk, the state before it, and D."""
        weights = self.weights()
        weights *= self.dt[..., None, :]
        if D is not None:
            weights.diagonal(dim1=-2, dim2=-1).add_(D.to(weights.dtype)[:, None])
        inside = weights.to(self.x.dtype) @ self.x.contiguous()
        across = self.by_head(self.C @ before.mT)
        return self.tokens_of(torch.addcmul(inside, across, self.from_start[..., None].to(inside.dtype)))

    def weights(self) -> torch.Tensor:
        """(B, K, H, Q, Q) wide: how much of the token j's input the token i reads."""
        shape = self.in_groups(self.decay)
        return (shape * self.scores[:, :, :, None].to(self.decay.dtype)).flatten(2, 3)

    def backward(
        self, before: torch.Tensor, dy: torch.Tensor, dS: torch.Tensor, D: torch.Tensor | None, grads: _Gradients
    ) -> torch.Tensor:
        """Write this block's gradients; from that of the state after the block to that of the state before it."""
        dy = self.chunks(dy.to(self.x.dtype))
        x, dy = self.x.contiguous(), dy.contiguous()
        read = self.by_group(dy, self.from_start)  # (B, K, G, Q, R*P): the gradient as the state before gets it
        after, dS = self._state_gradients(read, dS)

        weights = self.weights().to(x.dtype)
        dinput = weights.mT @ dy  # (B, K, H, Q, P), of dt * x
        from_end = self.by_head(self.B @ after.mT)
        dinput.addcmul_(from_end, self.to_end[..., None].to(x.dtype))
        dx = dinput * self.dt[..., None].to(x.dtype)
        if D is not None:
            dx.addcmul_(dy, D.to(x.dtype)[:, None, None])
        ended = _dot(x, from_end).mul_(self.to_end)  # (B, K, H, Q)

        pairs = dy @ x.mT  # (B, K, H, Q, Q): dy_i . x_j
        grads.D += pairs.diagonal(dim1=-2, dim2=-1).sum((0, 1, 3), dtype=self.decay.dtype)
        flow = pairs.to(self.decay.dtype).mul_(self.decay)
        dscores = self.in_groups(flow * self.dt[..., None, :]).sum(3).to(x.dtype)
        self.in_groups(flow).mul_(self.scores[:, :, :, None].to(flow.dtype))
        ddt = flow.sum(-2) + ended

        da = _through(flow.to(x.dtype), self.dt)
        da += _dot(dy, self.by_head(self.C @ before.mT)).mul_(self.from_start).flip(-1).cumsum(-1).flip(-1)
        da += F.pad((ended * self.dt).cumsum(-1)[..., :-1], (1, 0))
        by_state = (*self.dt.shape[:3], -1)
        da += (_dot(before.view(by_state), after.view(by_state)) * self.from_start[..., -1])[..., None]
        grads.A += (da * self.dt).sum((0, 1, 3))

        grads.x[:, self.part] = self.tokens_of(dx)
        grads.dt[:, self.part] = self.tokens_of((ddt + da * self.A[:, None])[..., None])[..., 0]
        grads.B[:, self.part] = self.tokens_of((dscores.mT @ self.C).add_(self.added @ after))
        grads.C[:, self.part] = self.tokens_of((dscores @ self.B).add_(read @ before))
        return dS

    def _state_gradients(self, read: torch.Tensor, dS: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """From the last state's gradient: those after the chunks (B, K, G, R*P, N), low, and the first's, wide."""
        gains = read.mT @ self.C
        after = torch.empty_like(gains)
        for k in reversed(range(gains.shape[1])):
            after[:, k] = dS.view(after[:, k].shape)
            gain = gains[:, k].to(dS.dtype).view(dS.shape)
            dS = torch.addcmul(gain, dS, self.from_start[:, k, :, -1, None, None])
        return after, dS


def _dot(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """Inner products over the last dimension, summed and returned wide."""
    return (a * b).sum(-1).to(torch.promote_types(a.dtype, torch.float32))


def _through(flow: torch.Tensor, dt: torch.Tensor) -> torch.Tensor:
    """flow (..., Q, Q) from j to i, dt (..., Q) -> (..., Q): at k, the sum over i >= k > j of flow[i, j] dt[j], which
    is all that the decay of token k scales.

    Summed as it stands: the difference of a row's and a column's sum would be the noise of the diagonal where decays
    are strong, for the diagonal is in both.
    """
    ones = torch.ones(flow.shape[-2:], dtype=flow.dtype, device=flow.device)
    sums = (ones.triu() @ flow).mul_(ones.tril(-1))  # [k, j]: the sum over i >= k, where j < k
    return (sums @ dt[..., None].to(flow.dtype)).squeeze(-1).to(dt.dtype)
