"""A bfloat16 weight times a few rows, as fast as memory gives the weight."""

from __future__ import annotations

import torch

from intarsia.base.errors import IntarsiaError
from intarsia.ops.native import library
from intarsia.ops.native.library import DTYPES, dense, pointer

MOST_ROWS = 8  # with more of them a matrix product is faster


def linear(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    """`ops.linear.linear` for a few rows of bfloat16."""
    return matvec(x, weight, bias)


def matvec(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None, dtype: torch.dtype | None = None
) -> torch.Tensor:
    """x (..., I) times weight (O, I) plus bias (O,), all bfloat16 on the CPU -> (..., O) in `dtype`, bfloat16 unless
    told; float32 sums. The weight is read once for every 8 rows of x, and a row of y does not depend on the other rows.
    No gradients.
    """
    dtype = dtype or x.dtype
    if x.dtype != torch.bfloat16 or weight.dtype != torch.bfloat16 or dtype not in DTYPES:
        raise IntarsiaError(
            f"matvec was given {x.dtype} x {weight.dtype} -> {dtype}; it multiplies bfloat16 by bfloat16, "
            "to bfloat16 or float32."
        )
    rows = dense(x.reshape(-1, x.shape[-1]))
    weight = weight if weight.stride(1) == 1 else weight.contiguous()
    bias = dense(bias, torch.bfloat16)
    outputs, columns = weight.shape
    y = torch.empty(*x.shape[:-1], outputs, dtype=dtype)
    library.loaded.code.matvec_bf16(
        DTYPES[dtype], weight.data_ptr(), weight.stride(0), rows.data_ptr(), columns, pointer(bias), y.data_ptr(),
        len(rows), outputs, columns, torch.get_num_threads(),
    )  # fmt: skip
    return y
