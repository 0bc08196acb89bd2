"""In which numbers a training computes: the dtype, and FP8 in the linear layers where it is asked for.

Whatever it is, what is learned lives in float32 masters (optimizer.py), and A_log, D and dt_bias of every scan are
float32 in the forward pass as well (`model.parts.Float32Parameters`): they feed exponentials.
"""

from __future__ import annotations

import torch

from intarsia.formats import native_bfloat16
from intarsia.train.recipe import Precision


def compute_dtype(precision: Precision, device: torch.device) -> torch.dtype:
    """`auto` is bfloat16 on a GPU and on a processor that multiplies it natively, float32 elsewhere."""
    if precision.dtype != "auto":
        return getattr(torch, precision.dtype)
    return torch.bfloat16 if device.type != "cpu" or native_bfloat16() else torch.float32
