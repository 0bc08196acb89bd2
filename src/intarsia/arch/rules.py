"""The design rules of Nemotron-H (arXiv 2504.03624, section 2.1): checked, and used to make models of any size."""

from __future__ import annotations

import math
from itertools import pairwise

from intarsia.arch.architecture import Architecture
from intarsia.arch.blocks import Attention, Experts, FeedForward, Mamba2, kind
from intarsia.arch.pattern import parse_pattern
from intarsia.base.errors import IntarsiaError

ATTENTION_SHARE = 0.08
NEAR = 0.02  # the published models have shares of 7.1 to 9.7 %


def check_nemotron_h(arch: Architecture) -> list[str]:
    """A sentence for every design rule that a model breaks; empty when it keeps them all."""
    broken, blocks = [], arch.blocks
    if not blocks:
        return ["The model has no blocks."]
    if not isinstance(blocks[0], Mamba2):
        broken.append(f"The first block is {_named(blocks[0])}; it should be Mamba-2.")
    if not _is_ffn(blocks[-1]):
        broken.append(f"The last block is {_named(blocks[-1])}; it should be an FFN.")
    for index, (block, follower) in enumerate(pairwise(blocks)):
        if isinstance(block, Attention) and not _is_ffn(follower):
            broken.append(f"Attention at {index} is followed by {_named(follower)}; it should stand before an FFN.")
    return broken + _shares(arch) + _dispersion(arch)


def _shares(arch: Architecture) -> list[str]:
    broken, total = [], len(arch.blocks)
    attentions = len(arch.attentions)
    mambas = sum(isinstance(b, Mamba2) for b in arch.blocks)
    ffns = sum(map(_is_ffn, arch.blocks))
    few = abs(attentions - ATTENTION_SHARE * total) <= 1  # an even split of the rest allows every other number
    if abs(attentions / total - ATTENTION_SHARE) > NEAR and not few:
        share = 100 * attentions / total
        broken.append(f"{attentions} of {total} blocks are attention, {share:.1f} %; about 8 % should be.")
    if mambas != ffns:
        broken.append(f"There are {mambas} Mamba-2 blocks and {ffns} FFNs; there should be as many of both.")
    return broken


def _dispersion(arch: Architecture) -> list[str]:
    """Attention should cut the model into parts of about one length; twice or half of the mean is too far off."""
    places = [index for index, block in enumerate(arch.blocks) if isinstance(block, Attention)]
    if not places:
        return []
    mean = len(arch.blocks) / (len(places) + 1)
    parts = [after - before for before, after in pairwise([0, *places, len(arch.blocks)])]
    if min(parts) >= mean / 2 and max(parts) <= 1.5 * mean:
        return []
    return [
        f"Attention is not evenly dispersed: it cuts the {len(arch.blocks)} blocks into parts of {min(parts)} to "
        f"{max(parts)} blocks, {mean:.0f} on average."
    ]


def _is_ffn(block: object) -> bool:
    return isinstance(block, (FeedForward, Experts))


def _named(block: object) -> str:
    return {"mamba2": "Mamba-2", "mamba1": "Mamba-1", "ffn": "an FFN", "linear": "a linear layer"}.get(
        kind(block), kind(block)
    )


def nemotron_h_pattern(num_layers: int, attentions: int | None = None) -> str:
    """The pattern that the rules make: `num_layers` letters, about 8 % of them attention unless a number is given.

    It is the published one for Nemotron-H 4B, 8B and 56B and, with 6 attentions, for Nemotron Nano 2 12B. Raises
    `IntarsiaError` when the other blocks cannot be split evenly.
    """
    if attentions is None:
        wanted = ATTENTION_SHARE * num_layers
        possible = range(num_layers % 2, num_layers // 3 + 1, 2)  # an attention for each M- at most
        attentions = min(possible, key=lambda n: abs(n - wanted), default=0)
    pairs, left = divmod(num_layers - attentions, 2)
    if left or not 0 <= attentions <= pairs or pairs < 1:
        raise IntarsiaError(
            f"{num_layers} layers with {attentions} attentions cannot follow the rules of Nemotron-H: the rest is "
            "split evenly into Mamba-2 and FFN, and each attention needs an FFN of its own behind it."
        )
    chosen = {math.floor((n + 1) * pairs / (attentions + 1)) - 1 for n in range(attentions)}
    return "".join("M*-" if pair in chosen else "M-" for pair in range(pairs))


def nemotron_h(
    num_layers: int,
    hidden_size: int,
    *,
    attentions: int | None = None,
    intermediate_size: int | None = None,
    vocab_size: int = 131_072,
    mamba_heads: int | None = None,
    mamba_head_dim: int = 64,
    state_size: int = 128,
    num_groups: int = 8,
    num_heads: int | None = None,
    num_kv_heads: int | None = None,
    head_dim: int = 128,
    max_positions: int = 8192,
    tied_embeddings: bool = False,
) -> Architecture:
    """A Nemotron-H of any size by the paper's rules.

    What is not given follows the 56B: FFNs of 4 D channels, Mamba-2 of 2 D channels, attention as wide as the stream
    with at most 8 KV heads. Raises `IntarsiaError` when the sizes do not divide.
    """
    mamba_heads = mamba_heads or 2 * hidden_size // mamba_head_dim
    num_heads = num_heads or hidden_size // head_dim
    kv_heads = num_kv_heads or max((n for n in range(1, 9) if num_heads % n == 0), default=1)
    blocks = {
        "M": Mamba2(mamba_heads, mamba_head_dim, state_size, num_groups),
        "-": FeedForward(intermediate_size or 4 * hidden_size, activation="relu2", gated=False),
        "*": Attention(num_heads, kv_heads, head_dim, rope=False),
    }
    return Architecture(
        hidden_size=hidden_size, vocab_size=vocab_size, rope=None, tied_embeddings=tied_embeddings,
        blocks=parse_pattern(nemotron_h_pattern(num_layers, attentions), blocks),
        max_positions=max_positions, family="nemotron_h",
    )  # fmt: skip
