"""A whole model as data: the stream, its blocks in order, positions, vocabulary."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from typing import Any

from intarsia.arch.blocks import Attention, Block, Experts, FeedForward, Linear, block_from_dict, block_to_dict
from intarsia.base.errors import IntarsiaError


@dataclass(frozen=True)
class Rope:
    """Rotary positions. `scaling` is None or the Hugging Face dict with `rope_type` linear, llama3 or yarn."""

    theta: float = 10_000.0
    scaling: dict[str, Any] | None = field(default=None, hash=False)


@dataclass(frozen=True)
class Architecture:
    """`blocks` stand on one residual stream of width `hidden_size` (D), then a final norm and a head.

    `rope` is None for models without positions. `family` names the Hugging Face family the weights came from
    (`llama`, `qwen2`, `nemotron_h`, ...), or `intarsia` for a model that no stock family can express.
    """

    hidden_size: int
    vocab_size: int
    blocks: tuple[Block, ...]
    norm_eps: float = 1e-5
    rope: Rope | None = field(default_factory=Rope)
    tied_embeddings: bool = False
    max_positions: int = 2048
    family: str = "llama"

    def replace(self, **changes: Any) -> Architecture:
        """A copy with some fields changed."""
        return dataclasses.replace(self, **changes)

    @property
    def attentions(self) -> list[Attention]:
        return [b for b in self.blocks if isinstance(b, Attention)]

    @property
    def feed_forwards(self) -> list[FeedForward]:
        return [b for b in self.blocks if isinstance(b, FeedForward)]

    def to_dict(self) -> dict[str, Any]:
        """JSON-able; `from_dict` inverts it exactly."""
        data = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        data["blocks"] = [block_to_dict(b) for b in self.blocks]
        data["rope"] = None if self.rope is None else {"theta": self.rope.theta, "scaling": self.rope.scaling}
        return data

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> Architecture:
        data = dict(data)
        try:
            data["blocks"] = tuple(block_from_dict(b) for b in data["blocks"])
            data["rope"] = None if data.get("rope") is None else Rope(**data["rope"])
            return cls(**data)
        except (KeyError, TypeError) as error:
            raise IntarsiaError(f"this is no architecture of Intarsia: {error}.") from error

    @classmethod
    def transformer(cls, num_layers: int, attention: Attention, ffn: FeedForward, **rest: Any) -> Architecture:
        """The usual uniform Transformer: attention and FFN alternate, `num_layers` times."""
        return cls(blocks=(attention, ffn) * num_layers, **rest)


def pair_layers(blocks: tuple[Block, ...]) -> list[tuple[int | None, int | None]]:
    """Fold a list of blocks into Transformer layers: (attention slot, FFN slot) as block indices, None where absent.

    Formats that think in layers need it. Mamba blocks take the attention slot, experts the FFN slot, and a `Linear`
    fits either; the folding is greedy and therefore shortest.
    """
    layers: list[tuple[int | None, int | None]] = []
    waiting: int | None = None
    for index, block in enumerate(blocks):
        if not isinstance(block, (FeedForward, Experts, Linear)) or (isinstance(block, Linear) and waiting is None):
            if waiting is not None:
                layers.append((waiting, None))
            waiting = index
        else:
            layers.append((waiting, index))
            waiting = None
    if waiting is not None:
        layers.append((waiting, None))
    return layers
