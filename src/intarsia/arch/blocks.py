"""The blocks that may stand on the residual stream: `x <- x + mixer(norm(x))`.

A block knows its own widths; nothing about it is global except the width D of the stream. A removed block is simply
absent from the list, so there is no class for it.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

from intarsia.base.errors import IntarsiaError


@dataclass(frozen=True)
class Attention:
    """Grouped-query self-attention: `num_heads` queries share `num_kv_heads` keys and values of `head_dim`."""

    num_heads: int
    num_kv_heads: int
    head_dim: int
    qkv_bias: bool = False
    out_bias: bool = False
    qk_norm: bool = False  # RMSNorm over head_dim of queries and keys before the rotation (Qwen3)
    sliding_window: int | None = None  # a token sees itself and the window - 1 tokens before it

    def __post_init__(self) -> None:
        if min(self.num_heads, self.num_kv_heads, self.head_dim) < 1 or self.num_heads % self.num_kv_heads:
            raise IntarsiaError(
                f"attention with {self.num_heads} heads over {self.num_kv_heads} KV heads of width {self.head_dim} "
                "is not possible: the number of heads must be a positive multiple of the number of KV heads."
            )

    @property
    def group(self) -> int:
        """Query heads per KV head."""
        return self.num_heads // self.num_kv_heads

    @property
    def label(self) -> str:
        window = f" w{self.sliding_window}" if self.sliding_window else ""
        return f"attention {self.num_heads}q/{self.num_kv_heads}kv{window}"


@dataclass(frozen=True)
class FeedForward:
    """Gated (`down(act(gate(x)) * up(x))`) or plain (`down(act(up(x)))`) FFN of `intermediate_size` channels."""

    intermediate_size: int
    activation: str = "silu"  # silu, gelu, gelu_tanh, relu2
    gated: bool = True
    bias: bool = False

    def __post_init__(self) -> None:
        if self.intermediate_size < 1:
            raise IntarsiaError(f"an FFN of {self.intermediate_size} channels is not possible: leave it out instead.")

    @property
    def label(self) -> str:
        return f"ffn {self.intermediate_size}"


@dataclass(frozen=True)
class Linear:
    """One square linear layer on the normalised stream: the cheapest thing that is not nothing (Puzzle 2.1)."""

    bias: bool = False

    @property
    def label(self) -> str:
        return "linear"


Block = Attention | FeedForward | Linear
_KINDS: dict[str, type] = {"attention": Attention, "ffn": FeedForward, "linear": Linear}


def kind(block: Block) -> str:
    """`attention`, `ffn` or `linear`."""
    return next(name for name, cls in _KINDS.items() if type(block) is cls)


def block_to_dict(block: Block) -> dict[str, Any]:
    """A JSON-able dict with `kind` and every field that differs from its default."""
    fields = {
        f.name: getattr(block, f.name)
        for f in dataclasses.fields(block)
        if f.default is dataclasses.MISSING or getattr(block, f.name) != f.default
    }
    return {"kind": kind(block), **fields}


def block_from_dict(data: dict[str, Any]) -> Block:
    """The inverse of `block_to_dict`. Raises `IntarsiaError` on an unknown kind or field."""
    data = dict(data)
    name = data.pop("kind", None)
    if name not in _KINDS:
        raise IntarsiaError(f"a block of kind {name!r} is not known; known kinds: {', '.join(_KINDS)}.")
    try:
        return _KINDS[name](**data)
    except TypeError as error:
        raise IntarsiaError(f"a block of kind {name!r} cannot be made from {data}: {error}.") from error
