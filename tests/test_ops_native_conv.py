"""The native convolution and gated norm against their definitions in float64, forward and backward, on every level."""

import pytest
import torch

from intarsia.ops.native.conv import causal_conv, causal_conv_step
from intarsia.ops.native.gated_norm import gated_norm
from intarsia.ops.reference import conv_reference, gated_norm_reference
from native_levels import BOUND, check, distance, documents, level  # noqa: F401

DTYPES = list(BOUND)


@pytest.fixture(autouse=True)
def seeded(level):  # noqa: F811
    torch.manual_seed(0)


def draw(length, channels, width, dtype, bias=True, state=True, batch=2):
    return {
        "x": torch.randn(batch, length, channels).to(dtype),
        "weight": torch.randn(channels, width).to(dtype),
        "bias": torch.randn(channels).to(dtype) if bias else None,
        "state": torch.randn(batch, width - 1, channels).to(dtype) if state else None,
    }


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("length", [1, 2, 3, 31, 32, 33, 65])
@pytest.mark.parametrize("cut", [False, True])
def test_conv(length, cut, dtype):
    segments = None
    if cut:
        row = documents(*[1, 2, 1, 20, 3, 8, 30][: length // 2], 99)[:length]
        segments = torch.stack([row, torch.zeros_like(row)])
    check(causal_conv, conv_reference, draw(length, 37, 4, dtype), BOUND[dtype], segments=segments)


@pytest.mark.parametrize("width", [1, 2, 3, 4, 6])  # the last has no native code
@pytest.mark.parametrize("activation", [False, True])
def test_conv_of_other_widths(width, activation):
    inputs = draw(40, 16, width, torch.float32, bias=False, state=False)
    check(causal_conv, conv_reference, inputs, 1e-5, activation=activation)
    check(causal_conv, conv_reference, inputs, 1e-5, activation=activation,
          segments=documents(3, 17, 20).expand(2, -1))  # fmt: skip


@pytest.mark.parametrize("dtype", DTYPES)
def test_conv_reads_a_view_and_float32_parameters(dtype):
    wide = torch.randn(2, 70, 101).to(dtype)
    weight, bias = torch.randn(33, 4), torch.randn(33)
    for x in (wide[:, 5:60, 7:40], wide.transpose(1, 2)[:, :60, :33], wide[:, ::2, 1:34]):
        y, state = causal_conv(x, weight, bias)
        wanted, last = conv_reference(x, weight, bias)
        assert distance(y, wanted) < BOUND[dtype] and torch.equal(state.double(), last)


def test_conv_of_extreme_inputs():
    x = torch.tensor([0.0, 1e-30, -1e3, 1e3, 3e37, -3e37, 90.0, -90.0])[None, :, None].expand(1, 8, 20)
    weight = torch.eye(20, 4).mul(0) + torch.tensor([0.0, 0.0, 0.0, 1.0])
    y, _ = causal_conv(x, weight)
    assert torch.allclose(y.double(), torch.nn.functional.silu(x.double()), rtol=1e-5, atol=1e-30)
    x = x.clone()
    x[0, 3, 5] = float("nan")
    y, _ = causal_conv(x, weight)
    assert y[0, 3, 5].isnan() and y[0, 7, 5].isfinite() and y[..., 6].isfinite().all()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("width", [1, 2, 4, 6])
def test_conv_step(width, dtype):
    inputs = draw(9, 37, width, dtype)
    wanted, last = conv_reference(**{k: v.double() for k, v in inputs.items()})
    x, state = inputs.pop("x"), inputs.pop("state")
    y = torch.stack([causal_conv_step(x[:, t], **inputs, state=state) for t in range(9)], 1)
    assert distance(y, wanted) < BOUND[dtype]
    assert torch.equal(state.double(), last)


def test_conv_step_in_a_state_that_is_not_contiguous():
    inputs = draw(1, 20, 4, torch.float32)
    wanted, last = conv_reference(**inputs)
    held = inputs["state"].mT.contiguous().mT
    y = causal_conv_step(inputs["x"][:, 0], inputs["weight"], inputs["bias"], held)
    assert distance(y, wanted[:, 0]) < 1e-5 and torch.equal(held.double(), last)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("channels, groups", [(96, 1), (96, 4), (70, 2), (5, 5)])
def test_gated_norm(channels, groups, dtype):
    inputs = {"y": torch.randn(3, 7, channels), "z": torch.randn(3, 7, channels), "weight": torch.randn(channels)}
    inputs = {k: v.to(dtype) for k, v in inputs.items()}
    check(gated_norm, gated_norm_reference, inputs, BOUND[dtype], groups=groups, eps=1e-5)


def test_gated_norm_reads_views_and_keeps_small_rows_apart_from_zero():
    wide = torch.randn(2, 9, 100)
    y, z, weight = wide[..., 3:43], wide[:, :, 50:90], torch.randn(40)
    assert distance(gated_norm(y, z, weight, 2, 1e-5), gated_norm_reference(y, z, weight, 2, 1e-5)) < 1e-5
    z = z * torch.logspace(-20, 2, 9)[:, None]
    got, wanted = gated_norm(y, z, weight, 2, 1e-5), gated_norm_reference(y, z, weight, 2, 1e-5)
    for row in range(9):
        assert distance(got[:, row], wanted[:, row]) < 1e-5
