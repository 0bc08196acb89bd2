"""Packed weights: what they stand for, and the native products against float64 on every level of processor."""

import pytest
import torch
import torch.nn.functional as F

from intarsia.base.errors import IntarsiaError
from intarsia.ops import backends
from intarsia.ops.native.packed import packed_linear as native_linear
from intarsia.ops.packed import (
    CODED,
    KINDS,
    join,
    pack,
    packed_bytes,
    packed_linear,
    packed_linear_torch,
    packed_rows,
    sparsified,
    unpack,
)
from native_levels import distance, level  # noqa: F401

ROUNDING = {torch.float32: 5e-5, torch.bfloat16: 6e-3}  # int8 and int4 keep 16 bits of a group of x
BYTES = ("avx512bf16",)  # levels on which they keep 8 bits of more than 16 rows


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


@pytest.mark.parametrize("outputs, inputs", [(64, 64), (77, 300), (1, 1)])
def test_what_packing_costs(outputs, inputs):
    weight = torch.randn(outputs, inputs)
    assert torch.equal(unpack(pack(weight.bfloat16(), "bf16")), weight.bfloat16().float())
    assert distance(unpack(pack(weight, "int8")), weight) < 6e-3
    assert distance(unpack(pack(weight, "int4")), weight) < 0.08
    assert pack(torch.randn(64, 64), "int4").bytes * 8 == 5 * 64 * 64
    assert not unpack(pack(torch.zeros(3, 40), "int4")).any() and not unpack(pack(torch.zeros(3, 40), "int8")).any()


@pytest.mark.parametrize("outputs, inputs", [(64, 64), (77, 302), (1, 1)])
def test_sparse_keeps_the_two_largest_of_four(outputs, inputs):
    weight = torch.randn(outputs, inputs).bfloat16()
    weight[:, ::5] = 0.5  # equals: the first stays
    weight[0] = 0
    wanted = weight.clone()
    for row in wanted:
        for quad in row.split(4):
            for i in sorted(range(len(quad)), key=lambda i: (-abs(float(quad[i])), i))[2:]:
                quad[i] = 0
    assert torch.equal(sparsified(weight), wanted)
    packed = pack(weight, "sparse")
    assert torch.equal(unpack(packed), wanted.float())
    assert pack(torch.randn(64, 64), "sparse").bytes * 8 == 9 * 64 * 64 == packed_bytes(64, 64, "sparse") * 8


def test_int4_finds_the_grid_that_a_weight_came_from():
    scale, least = torch.rand(8, 4, 1).bfloat16(), torch.randn(8, 4, 1).bfloat16()
    codes = torch.randint(1, 15, (8, 4, 32)).float()
    codes[..., 0], codes[..., 1] = 0, 15
    weight = (codes * scale.float() + least.float()).flatten(1)
    assert distance(unpack(pack(weight, "int4")), weight) < 4e-3


@pytest.mark.parametrize("kind", KINDS)
def test_rows_are_those_of_the_weight(kind):
    packed, rows = pack(torch.randn(77, 300), kind), torch.tensor([[3, 76, 0], [15, 16, 3]])
    assert torch.equal(packed_rows(packed, rows), unpack(packed)[rows])


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", list(ROUNDING))
@pytest.mark.parametrize("outputs, inputs", [(77, 300), (192, 64)])
def test_products(outputs, inputs, dtype, kind, level):  # noqa: F811
    packed = pack(torch.randn(outputs, inputs), kind, torch.randn(outputs))
    exact = unpack(packed).double()
    for rows in (1, 2, 7, 8, 9, 16, 17, 32, 33, 70):
        x = torch.randn(rows, inputs).to(dtype)
        wanted = x.double() @ exact.T + packed.bias[:outputs].double()
        got = native_linear(x, packed)
        few = kind in CODED and rows <= 16  # else float32 is rounded to bfloat16 on its way
        assert got.dtype == dtype and distance(got, wanted) < ROUNDING[dtype if few else torch.bfloat16]
    alone = torch.cat([native_linear(row[None], packed) for row in x])
    assert all(torch.equal(native_linear(x[:n], packed), alone[:n]) for n in range(1, 17))
    if kind in ("bf16", "sparse"):  # else more rows are another kind of sum
        assert torch.equal(native_linear(x, packed), alone)


@pytest.mark.parametrize("kind", KINDS)
def test_large_and_tiny_numbers(kind, level):  # noqa: F811
    packed, x = pack(torch.randn(32, 96), kind), torch.randn(4, 96)
    x[0], x[1, :32], x[2, 5] = 0, x[1, :32] * 1e6, 1e-30
    wanted = x.double() @ unpack(packed).double().T
    got = native_linear(x, packed)
    assert not got[0].any() and all(distance(g, w) < 6e-3 for g, w in zip(got[1:], wanted[1:]))


def in_bytes(x: torch.Tensor) -> torch.Tensor:
    """x (R, I) as int8 and int4 see many rows, float64: multiples of 1/127 of the largest number of 32."""
    groups = F.pad(x.bfloat16().float(), (0, -x.shape[1] % 32)).unflatten(1, (-1, 32))
    top = groups.abs().amax(-1, keepdim=True)
    up = torch.full_like(top, 127) / top  # `127 / top` is rounded twice
    codes = (groups * up.nan_to_num(posinf=0.0)).round()
    return (codes.double() * top.double() / 127).flatten(1)[:, : x.shape[1]]


@pytest.mark.parametrize("kind", ("int8", "int4"))
@pytest.mark.parametrize("dtype", list(ROUNDING))
@pytest.mark.parametrize("outputs, inputs", [(77, 300), (192, 64)])
def test_many_rows_in_bytes(outputs, inputs, dtype, kind, level):  # noqa: F811
    if level not in BYTES:
        pytest.skip("this level has no products of bytes, or faster tiles")
    packed, x = pack(torch.randn(outputs, inputs), kind, torch.randn(outputs)), torch.randn(70, inputs).to(dtype)
    x[3] = 0
    x[5], x[6, :32], x[7, 5], x[8] = x[5] * 1e6, x[6, :32] * 1e6, 1e-30, x[8] * 1e-20
    for rows in (17, 18, 23, 24, 33, 70):
        wanted = in_bytes(x[:rows]) @ unpack(packed).double().T + packed.bias[:outputs].double()
        got = native_linear(x[:rows], packed)
        bound = 2e-6 if dtype == torch.float32 else 4e-3
        assert all(distance(g, w) < bound for g, w in zip(got, wanted))
        assert torch.equal(got, native_linear(x, packed)[:rows])


@pytest.mark.parametrize("kind", KINDS)
def test_joined_weights_are_their_parts(kind):
    parts = [pack(torch.randn(n, 64), kind, torch.randn(n) if n == 40 else None) for n in (64, 40, 32)]
    whole, views = join(parts)
    x = torch.randn(3, 64)
    for part, view, at in zip(parts, views, (0, 64, 128)):
        assert view.codes.data_ptr() == whole.codes[at // 16].data_ptr() and torch.equal(unpack(view), unpack(part))
        wanted = native_linear(x, part)
        assert torch.equal(native_linear(x, whole)[:, at : at + part.outputs], wanted)


def test_the_choice_of_backend(monkeypatch):
    packed, x = pack(torch.randn(40, 64), "int8"), torch.randn(2, 5, 64).bfloat16()
    monkeypatch.delenv("INTARSIA_OPS", raising=False)
    assert backends.choose("packed_linear", x) == "native"
    assert distance(packed_linear(x, packed), packed_linear_torch(x, packed)) < 1e-2
    with pytest.raises(IntarsiaError, match="'int3' are not known; known: bf16, int8, int4"):
        pack(torch.randn(4, 4), "int3")
