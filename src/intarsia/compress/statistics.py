"""One calibration pass of the parent: the second moments that importance, surgery and refitting all need.

Sums of products over tokens (Gram matrices) are enough: every squared error of a block that is linear in its last
matrix (`down` of an FFN, `o` of attention, `out_proj` of Mamba-2) is a quadratic form in them. So one pass over the
text serves every ranking, every width and every closed-form fit, and nothing is kept per token.

Shape letters: D model, C inner channels (I of an FFN, H*P of attention and Mamba-2), E experts, K KV heads, P head
dim, G groups, N state.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from dataclasses import dataclass

import torch

from intarsia.arch import Attention, Experts, FeedForward, Mamba2
from intarsia.model import Decoder, ResidualBlock
from intarsia.model.experts import Routed
from intarsia.model.mamba import Mamba2Mixer
from intarsia.ops.norm import rms_norm
from intarsia.ops.precise import exact_products

MARKS = 10  # channels that a token marks (CMoE, arXiv 2502.04416)


@dataclass
class Statistics:
    """Of one block, in float32, summed over `tokens` tokens. x is the normalised input, c the inner channels that the
    last matrix reads (a mixture of experts has no such), y = c W^T what the block adds to the stream (without the last
    bias)."""

    tokens: int
    inputs: torch.Tensor  # (D, D)  sum x x^T
    cross: torch.Tensor  # (D, D)  sum x y^T
    power: float  # sum |y|^2
    channels: torch.Tensor | None = None  # (C, C)  sum c c^T
    keys: torch.Tensor | None = None  # (K*P, K*P)  sum k k^T before rotation, attention only
    values: torch.Tensor | None = None  # (K*P, K*P)  sum v v^T, attention only
    total: torch.Tensor | None = None  # (D,)  sum x, attention and Mamba-2
    writes: torch.Tensor | None = None  # (G*N,)  sum B * B after the convolution, Mamba-2 only
    reads: torch.Tensor | None = None  # (G*N,)  sum C * C, Mamba-2 only
    states: torch.Tensor | None = None  # (G*N,)  sum h * h over the group's heads at the end of each text, Mamba-2 only
    experts: torch.Tensor | None = None  # (E,)  sum over its tokens of weight x |output|, experts only
    marks: torch.Tensor | None = None  # (I, I)  tokens to whose output both channels add most, FFN where asked

    def tensors(self) -> dict[str, torch.Tensor]:
        """Every tensor by name, for a safetensors file."""
        named = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        return {name: value for name, value in named.items() if isinstance(value, torch.Tensor)}


@torch.inference_mode()
def collect(
    model: Decoder, batches: Iterable[torch.Tensor], advance=lambda tokens: None, marks: bool = False
) -> dict[int, Statistics]:
    """Run `batches` of token ids (B, L) through the parent; statistics for every attention, Mamba-2, FFN and experts
    block, by index. `marks`: those of FFN channels too, which cutting an FFN into experts needs.

    Errors compound over nothing here: every block sees exactly the stream that the parent gives it.
    """
    totals: dict[int, Statistics] = {}
    with exact_products(model.dtype):
        for ids in batches:
            _collect_batch(model, ids, totals, marks)
            advance(ids.numel())
    return totals


def _collect_batch(model: Decoder, ids: torch.Tensor, totals: dict[int, Statistics], marks: bool) -> None:
    x = model.embed_tokens(ids)
    rope = model.rope_tables(0, ids.shape[1])
    for index, block in enumerate(model.blocks):
        if isinstance(block.spec, (Attention, Experts, FeedForward, Mamba2)):
            update, found = _observe(block, x, rope.get(getattr(block.spec, "head_dim", 0)), marks)
            totals[index] = found if index not in totals else _add(totals[index], found)
        else:
            update = block.update(x)
        x = x + update


def _observe(block: ResidualBlock, x: torch.Tensor, tables, marks: bool) -> tuple[torch.Tensor, Statistics]:
    mixer, n = block.mixer, rms_norm(x, block.norm.weight, block.eps)
    more: dict[str, torch.Tensor] = {}
    if isinstance(block.spec, Experts):
        routed = list(mixer.routed(n.flatten(0, 1)))
        update = mixer.combined(n, routed)
        flat_x, flat_y = n.flatten(0, 1).float(), update.flatten(0, 1).float()
        power = float(flat_y.square().sum())
        shares = contributions(routed, block.spec.num_experts)
        return update, Statistics(len(flat_x), flat_x.T @ flat_x, flat_x.T @ flat_y, power, experts=shares)
    if isinstance(block.spec, Attention):
        inner, last = mixer.heads(n, tables, None, 0).transpose(1, 2).flatten(2), mixer.o
        more = {"keys": _gram(mixer.k(n)), "values": _gram(mixer.v(n)), "total": n.flatten(0, 1).float().sum(0)}
    elif isinstance(block.spec, Mamba2):
        kept = _States(block.spec, n)
        inner, last = mixer.channels(n, kept), mixer.out_proj
        more = {"total": n.flatten(0, 1).float().sum(0), "states": kept.energy()} | _written_and_read(mixer, n)
    else:
        inner, last = mixer.channels(n), mixer.down
        more = {"marks": _marked(inner, last.weight)} if marks else {}
    update = last(inner)
    y = update if last.bias is None else update - last.bias
    flat_x, flat_y = n.flatten(0, 1).float(), y.flatten(0, 1).float()
    power = float(flat_y.square().sum())
    found = Statistics(len(flat_x), flat_x.T @ flat_x, flat_x.T @ flat_y, power, _gram(inner), **more)
    return update, found


def contributions(routed: Iterable[Routed], num_experts: int) -> torch.Tensor:
    """(E,): sum over the tokens of every expert of its weight times the norm of its output, so how often it is used,
    how much it counts and how much it says (Minitron and REAP, puzzle.md 4.3)."""
    found = torch.zeros(num_experts)
    for expert, _, weights, answers in routed:
        found[expert] = (weights[:, 0] * answers.float().norm(dim=-1)).sum()
    return found


def _marked(channels: torch.Tensor, down: torch.Tensor) -> torch.Tensor:
    """(I, I): tokens that mark both channels. Each marks the `MARKS` that add most to its output, |c_i| |W_i|: other
    than |c_i| alone this stays what it is where a channel is made larger and its column smaller."""
    sizes = channels.flatten(0, 1).float().abs() * down.float().norm(dim=0)
    most = sizes.topk(min(MARKS, sizes.shape[1]), -1).indices
    return _gram(torch.zeros_like(sizes).scatter_(-1, most, 1.0)[None])


class _States:
    """What a Mamba-2 block remembers at the end of every text of one batch, as a mixer wants to be asked for it."""

    def __init__(self, spec: Mamba2, n: torch.Tensor):
        self.groups = spec.num_groups
        held = n.new_zeros(len(n), spec.conv_kernel - 1, spec.conv_size)
        wide = torch.promote_types(n.dtype, torch.float32)
        self.pair = held, n.new_zeros(len(n), spec.num_heads, spec.head_dim, spec.state_size, dtype=wide)

    def scan(self, index: int, run, *tokens: torch.Tensor) -> torch.Tensor:
        return run(*tokens, self.pair)

    def energy(self) -> torch.Tensor:
        """(G*N,): squares, over texts, heads of the group and their channels."""
        return self.pair[1].square().unflatten(1, (self.groups, -1)).sum((0, 2, 3)).flatten().float()


def _written_and_read(mixer: Mamba2Mixer, n: torch.Tensor) -> dict[str, torch.Tensor]:
    """Sums of the squares of B and C, (G*N,) each, of a normalised input (B, L, D)."""
    spec = mixer.spec
    width = spec.num_groups * spec.state_size
    convolved, _ = mixer.conv(mixer.in_proj(n)[..., spec.inner_size : spec.inner_size + spec.conv_size], None, None)
    _, b, c = convolved.float().split([spec.inner_size, width, width], -1)
    return {"writes": b.square().sum((0, 1)), "reads": c.square().sum((0, 1))}


def _gram(x: torch.Tensor) -> torch.Tensor:
    flat = x.flatten(0, 1).float()
    return flat.T @ flat


def _add(a: Statistics, b: Statistics) -> Statistics:
    for name, value in b.tensors().items():
        getattr(a, name).add_(value)
    a.tokens, a.power = a.tokens + b.tokens, a.power + b.power
    return a
