"""One calibration pass of the parent: the second moments that importance, surgery and refitting all need.

Sums of products over tokens (Gram matrices) are enough: every squared error of a block that is linear in its last
matrix (`down` of an FFN, `o` of attention) is a quadratic form in them. So one pass over the text serves every ranking,
every width and every closed-form fit, and nothing is kept per token.

Shape letters: D model, C inner channels (I of an FFN, H*P of attention), K KV heads, P head dim.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch

from intarsia.arch import Attention, FeedForward
from intarsia.model import Decoder, ResidualBlock
from intarsia.ops.norm import rms_norm
from intarsia.ops.precise import exact_products


@dataclass
class Statistics:
    """Of one block, in float32, summed over `tokens` tokens. x is the normalised input, c the inner channels that the
    last matrix reads, y = c W^T what the block adds to the stream (without the last bias)."""

    tokens: int
    inputs: torch.Tensor  # (D, D)  sum x x^T
    cross: torch.Tensor  # (D, D)  sum x y^T
    power: float  # sum |y|^2
    channels: torch.Tensor  # (C, C)  sum c c^T
    keys: torch.Tensor | None = None  # (K*P, K*P)  sum k k^T before rotation, attention only
    values: torch.Tensor | None = None  # (K*P, K*P)  sum v v^T, attention only
    total: torch.Tensor | None = None  # (D,)  sum x, attention only

    def tensors(self) -> dict[str, torch.Tensor]:
        """Every tensor by name, for a safetensors file."""
        named = {name: getattr(self, name) for name in ("inputs", "cross", "channels", "keys", "values", "total")}
        return {name: value for name, value in named.items() if value is not None}


@torch.inference_mode()
def collect(model: Decoder, batches: Iterable[torch.Tensor], advance=lambda tokens: None) -> dict[int, Statistics]:
    """Run `batches` of token ids (B, L) through the parent; statistics for every attention and FFN block, by index.

    Errors compound over nothing here: every block sees exactly the stream that the parent gives it.
    """
    totals: dict[int, Statistics] = {}
    with exact_products(model.dtype):
        for ids in batches:
            _collect_batch(model, ids, totals)
            advance(ids.numel())
    return totals


def _collect_batch(model: Decoder, ids: torch.Tensor, totals: dict[int, Statistics]) -> None:
    x = model.embed_tokens(ids)
    rope = model.rope_tables(0, ids.shape[1])
    for index, block in enumerate(model.blocks):
        if isinstance(block.spec, (Attention, FeedForward)):
            update, found = _observe(block, x, rope.get(getattr(block.spec, "head_dim", 0)))
            totals[index] = found if index not in totals else _add(totals[index], found)
        else:
            update = block.update(x)
        x = x + update


def _observe(block: ResidualBlock, x: torch.Tensor, tables) -> tuple[torch.Tensor, Statistics]:
    mixer, n = block.mixer, rms_norm(x, block.norm.weight, block.eps)
    keys = values = total = None
    if isinstance(block.spec, Attention):
        inner, last = mixer.heads(n, tables, None, 0).transpose(1, 2).flatten(2), mixer.o
        keys, values, total = _gram(mixer.k(n)), _gram(mixer.v(n)), n.flatten(0, 1).float().sum(0)
    else:
        inner, last = mixer.channels(n), mixer.down
    update = last(inner)
    y = update if last.bias is None else update - last.bias
    flat_x, flat_y = n.flatten(0, 1).float(), y.flatten(0, 1).float()
    power = float(flat_y.square().sum())
    found = Statistics(len(flat_x), flat_x.T @ flat_x, flat_x.T @ flat_y, power, _gram(inner), keys, values, total)
    return update, found


def _gram(x: torch.Tensor) -> torch.Tensor:
    flat = x.flatten(0, 1).float()
    return flat.T @ flat


def _add(a: Statistics, b: Statistics) -> Statistics:
    for name, value in b.tensors().items():
        getattr(a, name).add_(value)
    a.tokens, a.power = a.tokens + b.tokens, a.power + b.power
    return a
