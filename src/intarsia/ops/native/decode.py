"""The structures of cpp/decode.cpp, and its one call: a token of many sequences through a whole decoder.

`model.decode` fills them. Pointers do not keep their tensors alive: whoever fills a structure does.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence

import torch

from intarsia.ops.native import library
from intarsia.ops.native.packed import PackedStruct

MIXERS = ("attention", "ffn", "mamba2")
ACTIVATIONS = ("silu", "gelu", "gelu_tanh", "relu2")
NO_BOUND = 3.4e38


def _fields(**kinds: str) -> list[tuple[str, type]]:
    """`longs="a b"` -> [("a", c_long), ("b", c_long)], in the order given."""
    types = {"l": ctypes.c_long, "p": ctypes.c_void_p, "f": ctypes.c_float, "w": PackedStruct, "i": ctypes.c_int}
    return [(name, types[kind[0]]) for kind, names in kinds.items() for name in names.split()]


class BlockStruct(ctypes.Structure):
    _fields_ = _fields(
        l1="mixer", p1="norm", w1="first second",
        l2="heads kv_heads dim at_key at_value rope window table", p2="q_norm k_norm",
        l3="activation at_up",
        l4="state groups kernel norm_groups", p4="conv conv_bias A D dt_bias gate_norm", f4="dt_min dt_max",
    )  # fmt: skip


class ModelStruct(ctypes.Structure):
    _fields_ = _fields(l="width vocabulary count", p="blocks norm embedding head", f="eps")


class MemoryStruct(ctypes.Structure):
    _fields_ = _fields(p="first second", l="first_page second_page token head size")


class StepStruct(ctypes.Structure):
    _fields_ = _fields(p="ids lengths slots tables table_rows cos sin", l="count", i="threads")


def decode_step(
    model: ModelStruct,
    memory: ctypes.Array,
    ids: torch.Tensor,
    lengths: torch.Tensor,
    slots: torch.Tensor,
    tables: Sequence[torch.Tensor],
    rope: tuple[torch.Tensor, torch.Tensor] | None,
    outputs: int,
) -> torch.Tensor:
    """ids (S,) int64, lengths and slots (S,) int32, a table (S, most) int32 for every window, cos and sin
    (positions, P) bfloat16 -> logits (S, outputs) float32, `outputs` as the head is packed."""
    ids, logits = ids.contiguous(), torch.empty(len(ids), outputs)
    pointers = (ctypes.c_void_p * max(1, len(tables)))(*(t.data_ptr() for t in tables))
    rows = (ctypes.c_long * max(1, len(tables)))(*(t.stride(0) for t in tables))
    cos, sin = (None, None) if rope is None else (t.data_ptr() for t in rope)
    step = StepStruct(
        ids.data_ptr(), lengths.data_ptr(), slots.data_ptr(), ctypes.addressof(pointers), ctypes.addressof(rows),
        cos, sin, len(ids), torch.get_num_threads(),
    )  # fmt: skip
    library.loaded.code.decode_step(ctypes.byref(model), memory, ctypes.byref(step), logits.data_ptr())
    return logits
