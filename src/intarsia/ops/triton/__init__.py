"""The Mamba ops, squared ReLU and attention in decoding as Triton kernels for GPUs. `ops.backends` imports this package
when a tensor asks for it.

The kernels do not tune themselves: block sizes are data, in `launcher.CONFIG`. With TRITON_INTERPRET=1 set before
Python starts, they run on CPU tensors through Triton's interpreter, slowly, which is how they are tested without a
GPU; its matrix products are wrong in bfloat16, so only float32 is taken there.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

try:
    import triton
except ImportError as error:
    raise ImportError("Triton is not installed (pip install 'intarsia[gpu]', on Linux)") from error

from intarsia.ops.triton.activation import relu_squared
from intarsia.ops.triton.conv import causal_conv, causal_conv_step
from intarsia.ops.triton.gated_norm import gated_norm
from intarsia.ops.triton.paged_attention import paged_attention
from intarsia.ops.triton.scan import ssd, ssd_step

OPS: dict[str, Callable] = {
    "causal_conv": causal_conv,
    "causal_conv_step": causal_conv_step,
    "gated_norm": gated_norm,
    "paged_attention": paged_attention,
    "relu_squared": relu_squared,
    "ssd": ssd,
    "ssd_step": ssd_step,
}


def refuses(op: str, tensor: torch.Tensor, training: bool) -> str:
    """Why `op` does not take a call whose first tensor is this one; "" when it does."""
    interpreted = triton.knobs.runtime.interpret
    if tensor.device.type != "cuda" and not interpreted:
        return f"its kernels run on GPUs, not on {tensor.device.type}"
    known = (torch.float32,) if interpreted else (torch.float32, torch.bfloat16)
    if tensor.dtype not in known:
        return f"it computes in {' and '.join(str(d).removeprefix('torch.') for d in known)}, not in {tensor.dtype}"
    return ""
