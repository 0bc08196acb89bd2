"""Which calls the native ops take, and the sentence where they do not."""

import pytest
import torch

from intarsia.ops import backends
from native_levels import MODULE as kernels  # skips where there is no native library

F32, BF16, F64 = torch.float32, torch.bfloat16, torch.float64
STEPS = (
    "attend", "causal_conv_step", "decode_step", "linear", "packed_linear", "paged_attention", "selective_step",
    "ssd_step",
)  # fmt: skip
LOW = ("attend", "decode_step", "linear", "paged_attention")  # bfloat16 alone
EXACT = {"rms_norm": (False,), "silu_mul": (False,), "rotate": (False, True)}  # not in float32, for logits' sake


@pytest.mark.parametrize("op", kernels.OPS)
@pytest.mark.parametrize("training", [False, True])
def test_dtypes(op, training):
    assert op in backends.OPS
    rows = 2 if op == "linear" else 64  # it takes few, others leave few to torch
    said = {dtype: kernels.refuses(op, torch.empty(rows, 8, dtype=dtype), training) for dtype in (F32, BF16, F64)}
    if training and op in STEPS:
        assert set(said.values()) == {"it has no backward"}
        return
    assert said[BF16] == "" and "not in float64" in said[F64]
    refused = op in LOW or training in EXACT.get(op, ())
    assert ("in bfloat16, not in float32" in said[F32]) == bool(said[F32]) == refused
    assert ("as transformers does" in said[F32]) == (refused and op in EXACT)


def test_rows_and_devices():
    assert kernels.refuses("linear", torch.empty(2, 4, 8, dtype=BF16), False) == ""
    assert kernels.refuses("linear", torch.empty(9, 8, dtype=BF16), False) == "it takes up to 8 rows"
    assert kernels.refuses("silu_mul", torch.empty(4, 8, dtype=BF16), False) == "up to 4 rows are faster in torch"
    assert kernels.refuses("silu_mul", torch.empty(4, 8, dtype=BF16), True) == ""
    assert kernels.refuses("gated_norm", torch.empty(900, 8, dtype=BF16), False) == ""
    assert "not on meta" in kernels.refuses("ssd", torch.empty(2, 8, device="meta"), True)
