"""Float32 results of bfloat16 operands, at the speed of bfloat16.

A product of two bfloat16 numbers is exact in float32. So a float32 matrix product whose operands were bfloat16 before
may be computed in bfloat16 units with float32 sums (AMX, AVX512-BF16, tensor cores) and loses nothing, while a product
that is *returned* in bfloat16 is rounded to 8 bits, which is more than a small KL can bear.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch


@contextlib.contextmanager
def exact_products(dtype: torch.dtype) -> Iterator[None]:
    """Inside, float32 products may use bfloat16 units if `dtype`, that of the operands' origin, is bfloat16."""
    before = torch.get_float32_matmul_precision()
    if dtype == torch.bfloat16:
        torch.set_float32_matmul_precision("medium")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)
