"""What the native library has: its ops for `ops.backends`, which calls it takes, and what runs."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch

from intarsia.ops.native import library
from intarsia.ops.native.activation import relu_squared, silu_mul
from intarsia.ops.native.attention import attend
from intarsia.ops.native.conv import causal_conv, causal_conv_step
from intarsia.ops.native.decode import decode_step
from intarsia.ops.native.gated_norm import gated_norm
from intarsia.ops.native.logits import kl_rows, nll_rows
from intarsia.ops.native.matvec import MOST_ROWS, linear
from intarsia.ops.native.norm import rms_norm
from intarsia.ops.native.packed import packed_linear
from intarsia.ops.native.paged_attention import paged_attention
from intarsia.ops.native.rope import rotate
from intarsia.ops.native.selective import selective_scan, selective_step
from intarsia.ops.native.ssd import ssd, ssd_step

BF16, ANY = (torch.bfloat16,), tuple(library.DTYPES)
_INFERENCE = "it has no backward"
_EXACT = "; float32 is rounded step by step, as transformers does"  # their logits are compared to 1e-4


class Takes(NamedTuple):
    """An op, and which calls it takes: dtypes of the first tensor, with and without a backward pass, and rows of it."""

    call: Callable
    inference: tuple[torch.dtype, ...] = ANY
    training: tuple[torch.dtype, ...] = ANY
    rows: int | None = None
    over: int = 0  # rows up to which torch's op takes less than the call, where nothing is trained
    why: str = ""  # a dtype is missing


_TABLE = {
    "attend": Takes(attend, BF16, ()),
    "causal_conv": Takes(causal_conv),
    "causal_conv_step": Takes(causal_conv_step, training=()),
    "decode_step": Takes(decode_step, BF16, ()),
    "gated_norm": Takes(gated_norm),
    "kl_rows": Takes(kl_rows),
    "linear": Takes(linear, BF16, (), rows=MOST_ROWS),
    "nll_rows": Takes(nll_rows),
    "packed_linear": Takes(packed_linear, training=()),
    "paged_attention": Takes(paged_attention, BF16, ()),
    "relu_squared": Takes(relu_squared, over=4),
    "rms_norm": Takes(rms_norm, inference=BF16, why=_EXACT),
    "rotate": Takes(rotate, BF16, BF16, over=32, why=_EXACT),
    "selective_scan": Takes(selective_scan),
    "selective_step": Takes(selective_step, training=()),
    "silu_mul": Takes(silu_mul, inference=BF16, over=4, why=_EXACT),
    "ssd": Takes(ssd),
    "ssd_step": Takes(ssd_step, training=()),
}
OPS: dict[str, Callable] = {op: takes.call for op, takes in _TABLE.items()}


def refuses(op: str, tensor: torch.Tensor, training: bool) -> str:
    """Why `op` does not take a call whose first tensor is this one; "" when it does."""
    takes = _TABLE[op]
    known = takes.training if training else takes.inference
    if tensor.device.type != "cpu":
        return f"its code runs on CPUs, not on {tensor.device.type}"
    if not known:
        return _INFERENCE
    if tensor.dtype not in known:
        given, *possible = (str(d).removeprefix("torch.") for d in (tensor.dtype, *known))
        return f"it computes in {' and '.join(possible)}, not in {given}{takes.why}"
    if takes.rows is not None and tensor.numel() > takes.rows * tensor.shape[-1]:
        return f"it takes up to {takes.rows} rows"
    if not training and 0 < tensor.numel() <= takes.over * tensor.shape[-1]:
        return f"up to {takes.over} rows are faster in torch"
    return ""


def describe() -> str:
    """Which level of the library runs, and why."""
    return f"{library.loaded.level} ({library.reason})"
