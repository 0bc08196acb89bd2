"""A decoder whose matrices are packed for inference: bfloat16, int8, int4, int4+ or sparse.

The modules stay what they are and compute as before; only their matrices change, and where native code can decode the
whole model, `Decoder.native` does. There are no gradients any more, and
nothing that could be saved: pack what a checkpoint gave, after loading it.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping, Sequence

import torch
from torch import nn

from intarsia.arch import Architecture, Block, Mamba1, Mamba2
from intarsia.base.errors import IntarsiaError
from intarsia.model.decode import NativeDecoder, refusal
from intarsia.model.decoder import Decoder, ResidualBlock
from intarsia.model.fp8 import Fp8Linear
from intarsia.ops.linear import Projection
from intarsia.ops.packed import KINDS, Packed, pack, packed_bytes, packed_linear, packed_rows, unpack

# What the embedding and the head are packed as: in int4 they would cost a large part of the quality that is lost.
OUTER = {"bf16": "bf16", "int8": "int8", "int4": "int8", "sparse": "bf16", "int4+": "int8"}

# And what four bits would harm most: the first block, through which every token's meaning goes, and the blocks whose
# errors stay in a state. Of a hybrid's loss in int4 they were nine tenths and more, in a seventh of its bytes.
FRAGILE = {"int4": "int8", "int4+": "int8"}

# Of the matrices of a block, by names such as "mixer.q": what a squared error at each input matters, (I,) float32.
Importance = Mapping[str, torch.Tensor]


def kinds_of(arch: Architecture, kind: str) -> list[str]:
    """As what each block of a model is packed that is to be `kind`."""
    tender = FRAGILE.get(kind, kind)
    return [tender if index == 0 or isinstance(block, (Mamba1, Mamba2)) else kind
            for index, block in enumerate(arch.blocks)]  # fmt: skip


class PackedProjection(nn.Module):
    """What `Projection` computes, from a packed matrix."""

    def __init__(self, packed: Packed):
        super().__init__()
        self.packed = packed
        self.whole: Packed | None = None  # this matrix and those joined behind it (`decode`)

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
def pack_weights(
    model: Decoder, kind: str | Sequence[str], importance: Mapping[int, Importance] | None = None
) -> Decoder:
    """Pack the matrices of a model in place, one after the other, and return it; `kind` is one of `ops.packed.KINDS`,
    or one for every block, and then the embedding and the head are bf16. With int4 or int4+ alone, embedding, head, the
    first block and Mamba blocks are int8. `importance` of blocks by their index is for int4 and int4+; where it is
    not given all inputs are alike.

    The experts of a mixture stay as they are. Raises `IntarsiaError` for a kind that is not known, a model that is
    packed already, or one that is not on a CPU.
    """
    kinds = kinds_of(model.arch, kind) if isinstance(kind, str) else list(kind)
    unknown = next((name for name in ([kind] if isinstance(kind, str) else kinds) if name not in KINDS), None)
    if unknown is not None:
        raise IntarsiaError(f"weights of kind {unknown!r} are not known; known: {', '.join(KINDS)}.")
    if len(kinds) != len(model.blocks):
        raise IntarsiaError(f"{len(kinds)} kinds of weights are given for {len(model.blocks)} blocks: give one each.")
    if model.device.type != "cpu":
        raise IntarsiaError(f"weights are packed for CPUs, and this model is on {model.device.type}.")
    if isinstance(model.embed, PackedEmbedding):
        raise IntarsiaError(f"this model is packed already, as {model.embed.packed.kind}: load it again to pack it.")
    for index, (block, each) in enumerate(zip(model.blocks, kinds)):
        pack_block(block, each, (importance or {}).get(index))
    dtype, outer = model.dtype, OUTER[kind] if isinstance(kind, str) else "bf16"
    model.embed = PackedEmbedding(pack(model.embed.weight, outer), dtype)
    if not model.arch.tied_embeddings:
        model.head = PackedProjection(pack(model.head.weight, outer))
    return ready(model)


def pack_block(block: nn.Module, kind: str, importance: Importance | None = None) -> None:
    """Pack the matrices of a block in place."""
    for name, matrix in list(matrices(block)):
        packed = pack(matrix.weight, kind, matrix.bias, (importance or {}).get(name))
        block.set_submodule(name, PackedProjection(packed))


def ready(model: Decoder) -> Decoder:
    """A model of packed blocks, embedding and head, decoding in native code where it can."""
    model.native = None if refusal(model) else NativeDecoder(model)
    return model


@torch.no_grad()
def quantised(block: ResidualBlock, kind: str, importance: Importance | None = None) -> ResidualBlock:
    """A copy of a block that holds what its packed matrices would stand for, rounded to the block's own dtype."""
    twin = copy.deepcopy(block)
    for name, matrix in matrices(twin):
        matrix.weight.copy_(unpack(pack(matrix.weight, kind, importance=(importance or {}).get(name))))
    return twin


def matrices(block: nn.Module) -> Iterator[tuple[str, Projection]]:
    """The layers of a block that packing takes, with their names in it."""
    return ((name, module) for name, module in block.named_modules() if isinstance(module, Projection))


def packed_block_bytes(spec: Block, arch: Architecture, kind: str, dtype: torch.dtype) -> int:
    """Bytes of a packed block, counted without making it."""
    block = ResidualBlock(spec, arch, dtype, "meta")
    layers = [layer for _, layer in matrices(block)]
    inside = {id(p) for layer in layers for p in layer.parameters()}
    rest = sum(p.numel() * p.element_size() for p in block.parameters() if id(p) not in inside)
    return rest + sum(packed_bytes(*m.weight.shape, kind, m.bias is not None) for m in layers)


def packed_outer_bytes(arch: Architecture, dtype: torch.dtype) -> int:
    """Bytes of a packed model's embedding, head and final norm beside blocks of several kinds."""
    matrix = packed_bytes(arch.vocab_size, arch.hidden_size, "bf16")
    return matrix * (1 if arch.tied_embeddings else 2) + arch.hidden_size * dtype.itemsize


def weight_bytes(model: nn.Module) -> int:
    """Bytes of everything that a model computes from, packed, in FP8, or as it was."""
    packed = sum(m.packed.bytes for m in model.modules() if isinstance(m, PackedProjection))
    held = [*model.parameters(), *(t for m in model.modules() if isinstance(m, Fp8Linear) for t in m.buffers(False))]
    return packed + sum(t.numel() * t.element_size() for t in held)
