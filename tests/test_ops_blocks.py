"""The ops of attention and FFN blocks against their definitions in float64: in torch, and natively on every level."""

import pytest
import torch

from intarsia.arch import Rope
from intarsia.ops import activation, backends, norm, rope
from intarsia.ops.native.activation import relu_squared, silu_mul
from intarsia.ops.native.norm import rms_norm
from intarsia.ops.native.rope import rotate
from intarsia.ops.reference import (
    relu_squared_reference,
    rms_norm_reference,
    rotate_reference,
    silu_mul_reference,
)
from native_levels import BOUND, check, distance, level  # noqa: F401

DTYPES = list(BOUND)


@pytest.fixture(autouse=True)
def seeded(level):  # noqa: F811
    torch.manual_seed(0)


@pytest.mark.parametrize("op", [rms_norm, norm.rms_norm_torch], ids=["native", "torch"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rows, channels", [(1, 37), (3, 64), (130, 16), (65, 1)])
def test_rms_norm(rows, channels, dtype, op):
    inputs = {"x": torch.randn(2, rows, channels).to(dtype), "weight": torch.randn(channels).to(dtype)}
    check(op, rms_norm_reference, inputs, BOUND[dtype], eps=1e-5)


@pytest.mark.parametrize("op", [silu_mul, activation.silu_mul_torch], ids=["native", "torch"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(1,), (2, 3, 37), (3, 8192)])
def test_silu_mul(shape, dtype, op):
    inputs = {"gate": 3 * torch.randn(shape), "up": torch.randn(shape)}
    check(op, silu_mul_reference, {k: t.to(dtype) for k, t in inputs.items()}, BOUND[dtype])


@pytest.mark.parametrize("op", [relu_squared, activation.relu_squared_torch], ids=["native", "torch"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(2, 3, 37), (3, 8192)])
def test_relu_squared(shape, dtype, op):
    check(op, relu_squared_reference, {"x": torch.randn(shape).to(dtype)}, BOUND[dtype])


def tables(length, size, dtype, rows=None):
    cos, sin = rope.tables(Rope(), size, 99, 3, length)
    if rows is not None:
        cos, sin = (torch.stack([t.roll(i, 0) for i in range(rows)])[:, None] for t in (cos, sin))
    return {"cos": cos.to(dtype), "sin": sin.to(dtype)}


@pytest.mark.parametrize("op", [rotate, rope.rotate_torch], ids=["native", "torch"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rows", [None, 2], ids=["one table", "a table a row"])
@pytest.mark.parametrize("size", [6, 64])
def test_rotate(size, rows, dtype, op):
    x = torch.randn(2, 5, 3, size).to(dtype).transpose(1, 2)  # as projections leave it: (B, L, H, P) in memory
    check(op, rotate_reference, {"x": x}, BOUND[dtype], **tables(5, size, dtype, rows))


def test_rotation_leaves_gradients_as_the_projection_wants_them():
    x = torch.randn(2, 5, 3, 8).transpose(1, 2).requires_grad_()
    seen = []
    x.register_hook(lambda g: seen.append(g.transpose(1, 2).is_contiguous()))
    rotate(x, *tables(5, 8, torch.float32).values()).sum().backward()
    assert seen == [True]


def test_views_and_weights_of_another_dtype():
    wide, weight = torch.randn(2, 7, 50), torch.randn(33)
    for x in (wide[..., 5:38], wide[:, ::2, :33], wide.transpose(1, 2)[:, :33].transpose(1, 2)[..., :33]):
        assert distance(rms_norm(x.bfloat16(), weight, 1e-5), rms_norm_reference(x.bfloat16(), weight, 1e-5)) < 1e-2
        gate, up = x, torch.randn(x.shape)
        assert distance(silu_mul(gate, up), silu_mul_reference(gate, up)) < 1e-5


@pytest.mark.parametrize("scale", [0.0, 1e-15, 1e15])
def test_extreme_sizes(scale):
    x = scale * torch.randn(3, 40)
    torch.testing.assert_close(
        rms_norm(x, torch.ones(40), 1e-5).double(), rms_norm_reference(x, torch.ones(40), 1e-5), rtol=1e-5, atol=0
    )
    assert silu_mul(torch.tensor([-1e4, 1e4, 0.0]), torch.full((3,), 2.0)).tolist() == [0, 2e4, 0]
    assert relu_squared(torch.tensor([-3.0, torch.nan])).isnan().tolist() == [False, True]


def test_a_native_backend_takes_bfloat16_and_leaves_exact_rotations_to_torch(monkeypatch):
    monkeypatch.delenv("INTARSIA_OPS", raising=False)
    sample = torch.empty(0, dtype=torch.bfloat16)
    assert all(backends.choose(op, sample) == "native" for op in ("rms_norm", "silu_mul", "relu_squared", "rotate"))
    assert backends.choose("rotate", sample.float()) == "torch"
    one, many = sample.new_empty(1, 1, 64), sample.new_empty(1, 64, 64)
    for op in ("silu_mul", "relu_squared", "rotate"):
        assert backends.choose(op, one) == "torch" and backends.choose(op, one, training=True) == "native"
        assert backends.choose(op, many) == "native"
    assert backends.choose("rms_norm", sample.double()) == "torch"
