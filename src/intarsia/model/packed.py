"""A decoder whose matrices are packed for inference: bfloat16, int8 or int4.

The modules stay what they are and compute as before; only their matrices change, and where native code can decode the
whole model, `Decoder.native` does. There are no gradients any more, and
nothing that could be saved: pack what a checkpoint gave, after loading it.
"""

from __future__ import annotations

import torch
from torch import nn

from intarsia.base.errors import IntarsiaError
from intarsia.model.decode import NativeDecoder, refusal
from intarsia.model.decoder import Decoder
from intarsia.ops.linear import Projection
from intarsia.ops.packed import KINDS, Packed, pack, packed_linear, packed_rows, unpack

# What the embedding and the head are packed as: in int4 they would cost a large part of the quality that is lost.
OUTER = {"bf16": "bf16", "int8": "int8", "int4": "int8"}


class PackedProjection(nn.Module):
    """What `Projection` computes, from a packed matrix."""

    def __init__(self, packed: Packed):
        super().__init__()
        self.packed = packed

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return packed_linear(x, self.packed)

    @property
    def weight(self) -> torch.Tensor:
        """The matrix it stands for, (O, I) float32, made anew."""
        return unpack(self.packed)


class PackedEmbedding(PackedProjection):
    """An embedding whose matrix may also be the head's. `dtype` is that of the stream."""

    def __init__(self, packed: Packed, dtype: torch.dtype):
        super().__init__(packed)
        self.dtype = dtype

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        return packed_rows(self.packed, ids).to(self.dtype)

    def project(self, x: torch.Tensor) -> torch.Tensor:
        """The head: x (..., D) -> (..., V)."""
        return packed_linear(x, self.packed)


@torch.no_grad()
def pack_weights(model: Decoder, kind: str) -> Decoder:
    """Pack the matrices of a model in place, one after the other, and return it; `kind` is one of `ops.packed.KINDS`.

    The experts of a mixture stay as they are. Raises `IntarsiaError` for a kind that is not known, a model that is
    packed already, or one that is not on a CPU.
    """
    if kind not in KINDS:
        raise IntarsiaError(f"weights of kind {kind!r} are not known; known: {', '.join(KINDS)}.")
    if model.device.type != "cpu":
        raise IntarsiaError(f"weights are packed for CPUs, and this model is on {model.device.type}.")
    if isinstance(model.embed, PackedEmbedding):
        raise IntarsiaError(f"this model is packed already, as {model.embed.packed.kind}: load it again to pack it.")
    for module in model.blocks.modules():
        for name, child in module.named_children():
            if isinstance(child, Projection):
                setattr(module, name, PackedProjection(pack(child.weight, kind, child.bias)))
    dtype, outer = model.dtype, OUTER[kind]
    model.embed = PackedEmbedding(pack(model.embed.weight, outer), dtype)
    if not model.arch.tied_embeddings:
        model.head = PackedProjection(pack(model.head.weight, outer))
    model.native = None if refusal(model) else NativeDecoder(model)
    return model


def weight_bytes(model: nn.Module) -> int:
    """Bytes of everything that a model computes from, packed or not."""
    packed = sum(m.packed.bytes for m in model.modules() if isinstance(m, PackedProjection))
    return packed + sum(p.numel() * p.element_size() for p in model.parameters())
