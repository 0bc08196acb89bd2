"""`ops.packed` on native code."""

from __future__ import annotations

import ctypes

import torch

from intarsia.ops.native import library
from intarsia.ops.native.library import DTYPES, pointer
from intarsia.ops.packed import ALIGNED, KINDS, Packed


class PackedStruct(ctypes.Structure):
    """`Packed` of cpp/packed.h. The tensors must outlive it."""

    _fields_ = [
        *((name, ctypes.c_void_p) for name in ("codes", "scales", "bias", "outliers")),
        *((name, ctypes.c_long) for name in ("outputs", "columns", "inputs", "kind", "each")),
    ]


def struct(packed: Packed) -> PackedStruct:
    outputs, columns = (-(-n // ALIGNED) * ALIGNED for n in (packed.outputs, packed.inputs))
    tensors = (pointer(t) for t in (packed.codes, packed.scales, packed.bias, packed.outliers))
    each, kind = (0, packed.kind) if packed.outliers is None else (packed.outliers.shape[1], "int4")
    return PackedStruct(*tensors, outputs, columns, packed.inputs, KINDS.index(kind), each)


def packed_linear(x: torch.Tensor, packed: Packed) -> torch.Tensor:
    """`ops.packed.packed_linear`. Against int8 and int4 x is rounded too, to 16 bits up to 16 rows and to 8 bits above
    where the processor has dot products of bytes and no tiles (cpp/bytes.h); int4+ rounds it to bfloat16 there."""
    rows = x.reshape(-1, x.shape[-1])
    rows = rows if rows.stride(1) == 1 else rows.contiguous()
    like = struct(packed)
    y = torch.empty(*x.shape[:-1], like.outputs, dtype=x.dtype)
    library.loaded.code.packed_linear(
        DTYPES[x.dtype], ctypes.byref(like), rows.data_ptr(), rows.stride(0), y.data_ptr(), len(rows),
        torch.get_num_threads(),
    )  # fmt: skip
    return y[..., : packed.outputs]
