"""The width of the residual stream: which of its channels matter, and the model without the others.

All blocks read and write the same channels, so one ranking holds for the whole model: the mean of what the norms give
in a channel (Minitron, arXiv 2407.14679, section 2.2). A channel that leaves is a column of every matrix that reads the
stream, a row of every matrix that writes it, and an entry of every norm.

Shape letters: D model.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable

import torch

from intarsia.arch import Architecture
from intarsia.formats.names import our_shapes
from intarsia.model import Decoder
from intarsia.ops.norm import rms_norm
from intarsia.ops.precise import exact_products


@torch.inference_mode()
def stream_power(
    model: Decoder, batches: Iterable[torch.Tensor], advance: Callable[[int], None] = lambda tokens: None
) -> torch.Tensor:
    """(D,) float32: mean of |norm output| over all norms of the stream, the final one included, and the tokens of
    `batches` of ids (B, L)."""
    total, count = torch.zeros(model.arch.hidden_size), 0
    with exact_products(model.dtype):
        for ids in batches:
            x, rope = model.embed_tokens(ids), model.rope_tables(0, ids.shape[1])
            for index, block in enumerate(model.blocks):
                total += _size(rms_norm(x, block.norm.weight, block.eps))
                x = model.run(x, index, index + 1, rope=rope)
            total += _size(model.final_norm(x))
            count += ids.numel() * (len(model.blocks) + 1)
            advance(ids.numel())
    return total / count


def _size(n: torch.Tensor) -> torch.Tensor:
    return n.flatten(0, 1).float().abs().sum(0)


def stream_axes(arch: Architecture) -> dict[str, tuple[int, ...]]:
    """The parameters that know the width of the stream, by name, and along which of their dimensions."""
    here, wider = our_shapes(arch), our_shapes(arch.replace(hidden_size=arch.hidden_size + 1))
    axes = {name: tuple(n for n, size in enumerate(shape) if wider[name][n] != size) for name, shape in here.items()}
    return {name: found for name, found in axes.items() if found}


@torch.no_grad()
def narrow_stream(model: Decoder, keep: torch.Tensor) -> Decoder:
    """A model of the stream's channels `keep` (D',) alone, in that order; its parameters are its own.

    It is the model whose every write to the other channels is zero, but for the epsilon of its norms: a norm divides by
    the mean over the channels that there are, so its weights make up for those that are not.
    """
    axes, wide = stream_axes(model.arch), model.arch.hidden_size
    child = Decoder(model.arch.replace(hidden_size=len(keep)), model.dtype, model.device)
    for name, parameter in child.named_parameters():
        source = model.get_parameter(name)
        for axis in axes.get(name, ()):
            source = source.index_select(axis, keep)
        if name in axes and name.endswith("norm.weight"):
            source = source.float() * math.sqrt(wide / len(keep))
        parameter.copy_(source)
    return child.eval().requires_grad_(False)
