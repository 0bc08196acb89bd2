"""Attention and RMSNorm against their definitions in float64."""

import pytest
import torch

from intarsia.ops.attention import attend, attend_reference, visible
from intarsia.ops.norm import rms_norm


def draw(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("heads, kv_heads", [(4, 4), (4, 2), (6, 1)])
@pytest.mark.parametrize("length, total", [(9, 9), (1, 9), (4, 9)])
@pytest.mark.parametrize("window", [None, 1, 3, 20])
def test_attention_equals_its_definition(heads, kv_heads, length, total, window):
    q, k, v = draw(2, heads, length, 8), draw(2, kv_heads, total, 8, seed=1), draw(2, kv_heads, total, 8, seed=2)
    torch.testing.assert_close(attend(q, k, v, window).double(), attend_reference(q, k, v, window), atol=1e-6, rtol=0)


def test_padding_changes_nothing_and_makes_no_nan():
    q, k, v = draw(1, 4, 7, 8), draw(1, 2, 7, 8, seed=1), draw(1, 2, 7, 8, seed=2)
    keep = torch.tensor([[False, False, False, True, True, True, True]])
    places = keep.long().cumsum(1) - 1
    out = attend(q, k, v, mask=visible(places, places, None, keep))
    assert out.isfinite().all()
    alone = attend(q[:, :, 3:], k[:, :, 3:], v[:, :, 3:])
    torch.testing.assert_close(out[:, :, 3:], alone, atol=1e-6, rtol=0)


@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 1e-6), (torch.bfloat16, 2e-2)])
def test_rms_norm_equals_its_definition(dtype, tolerance):
    x, weight = draw(2, 5, 16).to(dtype), draw(16, seed=1).to(dtype)
    wanted = x.double() / (x.double().square().mean(-1, keepdim=True) + 1e-5).sqrt() * weight.double()
    out = rms_norm(x, weight, 1e-5)
    assert out.dtype == dtype
    torch.testing.assert_close(out.double(), wanted, atol=tolerance, rtol=tolerance)
