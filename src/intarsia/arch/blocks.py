"""The blocks that may stand on the residual stream: `x <- x + mixer(norm(x))`.

A block knows its own widths; nothing about it is global except the width D of the stream. A removed block is simply
absent from the list, so there is no class for it.
"""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass, field
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
    rope: bool = True  # False: this block sees no positions, even where the architecture has them

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
class Mamba2:
    """State space duality (arXiv 2405.21060): `num_heads` heads of `head_dim` channels over a state of `state_size`.

    Heads of one of the `num_groups` groups share B and C, as query heads share keys and values. The gated norm works on
    `norm_groups` groups of channels: as many as `num_groups` when None (Nemotron-H), 1 in the first Mamba-2 models.
    `dt_min` and `dt_max` bound the time step of every token (`time_step_limit`; None is no bound).
    """

    num_heads: int
    head_dim: int
    state_size: int
    num_groups: int = 1
    conv_kernel: int = 4
    chunk_size: int = 128
    conv_bias: bool = True
    proj_bias: bool = False
    norm_groups: int | None = None
    dt_min: float = 0.0
    dt_max: float | None = None

    def __post_init__(self) -> None:
        if self.dt_max == math.inf:
            object.__setattr__(self, "dt_max", None)  # JSON knows no infinity
        sizes = (self.num_heads, self.head_dim, self.state_size, self.num_groups, self.groups_of_norm,
                 self.conv_kernel, self.chunk_size)  # fmt: skip
        if min(sizes) < 1 or self.num_heads % self.num_groups or self.inner_size % self.groups_of_norm:
            raise IntarsiaError(
                f"Mamba-2 with {self.num_heads} heads of width {self.head_dim}, state {self.state_size}, "
                f"{self.num_groups} groups and {self.groups_of_norm} groups of its norm is not possible: every size is "
                "at least 1, the groups divide the heads, and the groups of the norm divide the channels."
            )

    @property
    def inner_size(self) -> int:
        """Channels of x, z and y: heads times head_dim."""
        return self.num_heads * self.head_dim

    @property
    def conv_size(self) -> int:
        """Channels that go through the convolution: x, B and C."""
        return self.inner_size + 2 * self.num_groups * self.state_size

    @property
    def in_size(self) -> int:
        """Rows of the input projection: z, x, B, C and dt, in this order."""
        return self.inner_size + self.conv_size + self.num_heads

    @property
    def groups_of_norm(self) -> int:
        return self.num_groups if self.norm_groups is None else self.norm_groups

    @property
    def label(self) -> str:
        return f"mamba2 {self.num_heads}x{self.head_dim} n{self.state_size}"


@dataclass(frozen=True)
class Mamba1:
    """The selective scan S6 (arXiv 2312.00752): each of `inner_size` channels has its own state of `state_size`.

    The time step of every channel comes through a bottleneck of `time_step_rank`.
    """

    inner_size: int
    state_size: int = 16
    conv_kernel: int = 4
    time_step_rank: int = field(kw_only=True)
    conv_bias: bool = True
    proj_bias: bool = False

    def __post_init__(self) -> None:
        if min(self.inner_size, self.state_size, self.conv_kernel, self.time_step_rank) < 1:
            raise IntarsiaError(
                f"Mamba-1 with {self.inner_size} channels, state {self.state_size}, kernel {self.conv_kernel} and time "
                f"steps of rank {self.time_step_rank} is not possible: every size is at least 1."
            )

    @property
    def label(self) -> str:
        return f"mamba1 {self.inner_size} n{self.state_size}"


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


ROUTERS = ("sigmoid", "neurons")


@dataclass(frozen=True)
class Experts:
    """A mixture of experts: a token goes through `experts_per_token` of `num_experts` FFNs and one shared FFN.

    Scores are sigmoids; a correction bias takes part in the choice and not in the weights (DeepSeek-V3, arXiv
    2412.19437, section 2.1.2; Nemotron 3). The weights are divided by their sum if `normalise`, then multiplied by
    `routed_scale`. With `num_expert_groups` above 1, experts come from the best `groups_per_token` groups only.

    With `router` "neurons" (CMoE, arXiv 2502.04416) an expert is scored by one channel that stands for it, and each
    that is chosen counts fully: so the pieces of a dense FFN, all chosen, are that FFN.
    """

    num_experts: int
    experts_per_token: int
    intermediate_size: int
    shared_size: int = 0  # channels of the shared FFN, 0 for none
    activation: str = "relu2"
    gated: bool = False
    routed_scale: float = 1.0
    normalise: bool = True
    num_expert_groups: int = 1
    groups_per_token: int = 1
    router: str = "sigmoid"  # sigmoid, neurons

    def __post_init__(self) -> None:
        if self.router not in ROUTERS:
            raise IntarsiaError(f"a router of kind {self.router!r} is not known; known: {', '.join(ROUTERS)}.")
        groups, per_token = self.num_expert_groups, self.groups_per_token
        possible = (
            min(self.num_experts, self.intermediate_size, groups) >= 1
            and self.shared_size >= 0
            and self.num_experts % groups == 0
            and 1 <= per_token <= groups
            and 1 <= self.experts_per_token <= self.num_experts // groups * per_token
        )
        if not possible:
            raise IntarsiaError(
                f"{self.experts_per_token} of {self.num_experts} experts of {self.intermediate_size} channels, from "
                f"{per_token} of {groups} groups, is not possible: the groups divide the experts, and the groups that "
                "a token may use hold at least the experts that it uses."
            )

    @property
    def label(self) -> str:
        return f"experts {self.experts_per_token}/{self.num_experts} x {self.intermediate_size}"


@dataclass(frozen=True)
class Linear:
    """One square linear layer on the normalised stream: the cheapest thing that is not nothing (Puzzle 2.1)."""

    bias: bool = False

    @property
    def label(self) -> str:
        return "linear"


Block = Attention | Mamba2 | Mamba1 | FeedForward | Experts | Linear
_KINDS: dict[str, type] = {
    "attention": Attention, "mamba2": Mamba2, "mamba1": Mamba1,
    "ffn": FeedForward, "experts": Experts, "linear": Linear,
}  # fmt: skip


def kind(block: Block) -> str:
    """`attention`, `mamba2`, `mamba1`, `ffn`, `experts` or `linear`."""
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
