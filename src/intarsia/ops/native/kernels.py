"""What the native library has: its ops for `ops.backends`, which calls it takes, and what runs."""

from __future__ import annotations

from collections.abc import Callable

import torch

from intarsia.ops.native import library
from intarsia.ops.native.activation import relu_squared, silu_mul
from intarsia.ops.native.conv import causal_conv, causal_conv_step
from intarsia.ops.native.decode import decode_step
from intarsia.ops.native.gated_norm import gated_norm
from intarsia.ops.native.logits import kl_rows, nll_rows
from intarsia.ops.native.matvec import MOST_ROWS, linear
from intarsia.ops.native.norm import rms_norm
from intarsia.ops.native.packed import packed_linear
from intarsia.ops.native.paged_attention import paged_attention
from intarsia.ops.native.rope import rotate
from intarsia.ops.native.ssd import ssd, ssd_step

OPS: dict[str, Callable] = {
    "causal_conv": causal_conv,
    "causal_conv_step": causal_conv_step,
    "decode_step": decode_step,
    "gated_norm": gated_norm,
    "linear": linear,
    "packed_linear": packed_linear,
    "paged_attention": paged_attention,
    "kl_rows": kl_rows,
    "nll_rows": nll_rows,
    "relu_squared": relu_squared,
    "rms_norm": rms_norm,
    "rotate": rotate,
    "silu_mul": silu_mul,
    "ssd": ssd,
    "ssd_step": ssd_step,
}
_AS_TRANSFORMERS = ("rms_norm", "rotate", "silu_mul")  # their logits are compared to 1e-4
_NO_BACKWARD = ("causal_conv_step", "linear", "packed_linear", "paged_attention", "ssd_step")


def refuses(op: str, tensor: torch.Tensor, training: bool) -> str:
    """Why `op` does not take a call whose first tensor is this one; "" when it does."""
    if tensor.device.type != "cpu":
        return f"its code runs on CPUs, not on {tensor.device.type}"
    if tensor.dtype not in library.DTYPES:
        known = " and ".join(str(d).removeprefix("torch.") for d in library.DTYPES)
        return f"it computes in {known}, not in {str(tensor.dtype).removeprefix('torch.')}"
    if op == "linear" and tensor.dtype != torch.bfloat16:
        return "its matrices are bfloat16"
    if op == "paged_attention" and tensor.dtype != torch.bfloat16:
        return "its pages are bfloat16"
    if op == "linear" and tensor.numel() > MOST_ROWS * tensor.shape[-1]:
        return f"it takes up to {MOST_ROWS} rows"
    if tensor.dtype == torch.float32 and (op == "rotate" or (op in _AS_TRANSFORMERS and not training)):
        return "float32 is rounded step by step, as transformers does"
    if training and op in _NO_BACKWARD:
        return "a step of decoding has no backward"
    return ""


def describe() -> str:
    """Which level of the library runs, and why."""
    return f"{library.loaded.level} ({library.reason})"
