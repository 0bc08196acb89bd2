"""The mixers: what stands inside a residual block, between its norm and the addition.

Shape letters: B batch, L length, D model, H query heads, K KV heads, P head dim, I intermediate channels.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import nn

from intarsia.arch import Attention, Block, FeedForward, Linear
from intarsia.base.errors import IntarsiaError
from intarsia.model.cache import Cache
from intarsia.ops.attention import attend
from intarsia.ops.linear import Projection
from intarsia.ops.norm import rms_norm
from intarsia.ops.rope import rotate

Tables = tuple[torch.Tensor, torch.Tensor]

ACTIVATIONS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "silu": F.silu,
    "gelu": F.gelu,
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
    "relu2": lambda x: F.relu(x).square(),
}


class GroupedAttention(nn.Module):
    """Grouped-query attention with rotary positions. q (H*P, D), k and v (K*P, D), o (D, H*P)."""

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
            self.q_norm = _Scale(spec.head_dim, **like)
            self.k_norm = _Scale(spec.head_dim, **like)

    def heads(self, x: torch.Tensor, tables: Tables | None, cache: Cache | None, index: int) -> torch.Tensor:
        """What every query head reads, (B, H, L, P), before the output projection."""
        q, k, v = (_split(layer(x), self.spec.head_dim) for layer in (self.q, self.k, self.v))
        if self.spec.qk_norm:
            q, k = rms_norm(q, self.q_norm.weight, self.eps), rms_norm(k, self.k_norm.weight, self.eps)
        if tables is not None:
            q, k = rotate(q, *tables), rotate(k, *tables)
        if cache is not None:
            k, v = cache.extend(index, k, v)
        return attend(q, k, v, self.spec.sliding_window, cache.keep if cache is not None else None)

    def forward(
        self, x: torch.Tensor, tables: Tables | None = None, cache: Cache | None = None, index: int = 0
    ) -> torch.Tensor:
        """x (B, L, D), already normalised -> (B, L, D)."""
        return self.o(self.heads(x, tables, cache, index).transpose(1, 2).flatten(2))


class _Scale(nn.Module):
    """A norm's weight alone; the decoder's op does the rest."""

    def __init__(self, size: int, dtype: torch.dtype, device=None):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size, dtype=dtype, device=device))


def _split(x: torch.Tensor, head_dim: int) -> torch.Tensor:
    """(B, L, H*P) -> (B, H, L, P)."""
    return x.unflatten(-1, (-1, head_dim)).transpose(1, 2)


class Mlp(nn.Module):
    """The FFN. up and gate (I, D), down (D, I)."""

    def __init__(self, spec: FeedForward, hidden_size: int, dtype: torch.dtype, device=None):
        super().__init__()
        if spec.activation not in ACTIVATIONS:
            raise IntarsiaError(f"activation {spec.activation!r} is not known; known: {', '.join(ACTIVATIONS)}.")
        self.spec, self.act = spec, ACTIVATIONS[spec.activation]
        like = {"bias": spec.bias, "dtype": dtype, "device": device}
        if spec.gated:
            self.gate = Projection(hidden_size, spec.intermediate_size, **like)
        self.up = Projection(hidden_size, spec.intermediate_size, **like)
        self.down = Projection(spec.intermediate_size, hidden_size, **like)

    def channels(self, x: torch.Tensor) -> torch.Tensor:
        """The intermediate activations (B, L, I) that `down` reads."""
        return self.act(self.gate(x)) * self.up(x) if self.spec.gated else self.act(self.up(x))

    def forward(self, x: torch.Tensor, *_: object) -> torch.Tensor:
        """x (B, L, D), already normalised -> (B, L, D)."""
        return self.down(self.channels(x))


class LinearMixer(nn.Module):
    """One linear layer, proj (D, D)."""

    def __init__(self, spec: Linear, hidden_size: int, dtype: torch.dtype, device=None):
        super().__init__()
        self.spec = spec
        self.proj = Projection(hidden_size, hidden_size, bias=spec.bias, dtype=dtype, device=device)

    def forward(self, x: torch.Tensor, *_: object) -> torch.Tensor:
        """x (B, L, D), already normalised -> (B, L, D)."""
        return self.proj(x)


Mixer = GroupedAttention | Mlp | LinearMixer


def make_mixer(spec: Block, hidden_size: int, norm_eps: float, dtype: torch.dtype, device=None) -> Mixer:
    """An uninitialised mixer for a block."""
    if isinstance(spec, Attention):
        return GroupedAttention(spec, hidden_size, norm_eps, dtype, device)
    if isinstance(spec, FeedForward):
        return Mlp(spec, hidden_size, dtype, device)
    return LinearMixer(spec, hidden_size, dtype, device)
