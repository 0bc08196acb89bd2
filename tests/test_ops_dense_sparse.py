"""int4+: what stands apart, scales by what matters, bytes; the native products are in test_ops_packed.py."""

import pytest
import torch

from intarsia.base.errors import IntarsiaError
from intarsia.ops import int4
from intarsia.ops.native.packed import packed_linear as native_linear
from intarsia.ops.packed import DENSE_SPARSE, Packed, join, pack, packed_bytes, packed_rows, unpack
from native_levels import distance, level  # noqa: F401

SHAPES = [(64, 64), (77, 300), (48, 416), (1, 1)]


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


def unpacked_by_hand(packed: Packed) -> torch.Tensor:
    """The weight in float64, entry by entry as the layout says."""
    weight = torch.zeros(packed.outputs, packed.inputs, dtype=torch.float64)
    for o in range(packed.outputs):
        panel, lane = divmod(o, 16)
        for i in range(packed.inputs):
            both = int(packed.codes[panel, i // 4, lane, i % 2])
            code = both >> 4 if i // 2 % 2 else both & 15
            scale, least = (float(t[lane]) for t in packed.scales[panel, i // 32])
            weight[o, i] = code * scale + least
        for word in packed.outliers[panel, :, lane].tolist():
            high, low = divmod(word & 0xFFFFFFFF, 1 << 16)
            weight[o, high] += float(torch.tensor(low).to(torch.uint16).view(torch.bfloat16))
    return weight


@pytest.mark.parametrize("outputs, inputs", SHAPES)
def test_dense_and_sparse_add_up(outputs, inputs):
    weight, importance = torch.randn(outputs, inputs), torch.rand(inputs)
    packed = pack(weight, DENSE_SPARSE, importance=importance)
    exact = unpacked_by_hand(packed)
    assert (unpack(packed) - exact).abs().max() < 1e-6 and distance(exact, weight) < 0.08
    rows = torch.arange(outputs).flip(0)
    assert torch.equal(packed_rows(packed, rows), unpack(packed)[rows])
    inside, added = int4.entries(packed.outliers)
    assert bool((inside < inputs).all()) and all(len(set(row)) == len(row) for p in inside.tolist() for row in zip(*p))
    apart = torch.zeros(outputs, inputs, dtype=torch.bool)
    apart.scatter_(1, inside.transpose(1, 2).flatten(0, 1)[:outputs], True)
    assert apart.sum(1).eq(int4.apart(-(-inputs // 32) * 32)).all()
    off = (exact - weight).abs()  # apart: but for one rounding of what is added
    assert bool((off[apart] <= 2**-8 * added.abs().max()).all())
    assert off[apart].max() < 0.1 * off.max() or inputs == 1


def test_what_stands_apart_does_most_harm():
    weight, importance = torch.randn(32, 384), torch.randn(384).exp()
    weight[torch.arange(32), torch.arange(32) * 10] = 40.0
    packed, groups = pack(weight, DENSE_SPARSE, importance=importance), weight.view(32, 12, 32)
    places = int4.entries(packed.outliers)[0].transpose(1, 2).flatten(0, 1)
    error = ((unpack(packed) - weight).square() * importance).sum()
    for _ in range(5):
        others = torch.rand(32, 384).topk(2).indices
        kept = torch.ones(32, 384, dtype=torch.bool).scatter(1, others, False).view_as(groups)
        dense = int4.decoded(*int4.quantise_by(groups, importance.view(12, 32), kept))
        assert error < 0.9 * ((dense - groups).square() * importance.view(12, 32) * kept).sum()
    four = ((unpack(pack(weight, "int4")) - weight).square() * importance).sum()
    assert places.shape == (32, 2) and error < 0.9 * four


@pytest.mark.parametrize("weighed", [False, True], ids=["alike", "weighed"])
@pytest.mark.parametrize("kind", ["int4", DENSE_SPARSE])
def test_what_was_packed_once_is_found_again(kind, weighed):
    """Also where a group uses no more than nine to sixteen of its codes, wherever among them, as after a training: all
    but the rounding of its least number."""
    codes = torch.randint(0, 16, (64, 6, 32))
    fewest, most = torch.randint(0, 5, (64, 6, 1)), torch.randint(12, 16, (64, 6, 1))
    lines = torch.stack([torch.rand(64, 6) + 0.5, torch.randn(64, 6)], -1).bfloat16().float()
    weight = int4.decoded(torch.maximum(torch.minimum(codes, most), fewest), lines).flatten(1)
    if kind == DENSE_SPARSE:
        weight[torch.arange(64), torch.randint(0, 192, (64,))] += 30.0
    packed = pack(weight, kind, importance=torch.rand(192) if weighed else None)
    assert distance(unpack(packed), weight) < 2**-8


@pytest.mark.parametrize("outputs, inputs", [*SHAPES, (96, 2048), (33, 193)])
@pytest.mark.parametrize("bias", [False, True])
def test_bytes_by_arithmetic(outputs, inputs, bias):
    packed = pack(torch.randn(outputs, inputs), DENSE_SPARSE, torch.randn(outputs) if bias else None)
    held = sum(t.numel() * t.element_size() for t in packed.tensors)
    assert packed.bytes == held == packed_bytes(outputs, inputs, DENSE_SPARSE, bias)
    if inputs == 2048:
        assert held < 1.04 * packed_bytes(outputs, inputs, "int4", bias)


@pytest.mark.parametrize("share", [0.0, 0.05])
def test_weighed_errors_are_never_above_those_of_the_unweighed_choice(share):
    groups = torch.randn(40, 6, 32) * torch.randn(40, 6, 1).exp()
    groups[3] = 0.25
    importance, kept = torch.randn(6, 32).mul(2).exp(), torch.rand(40, 6, 32) >= share
    kept[5, 2] = False
    errors = []
    for counts in (importance, None):
        codes, lines = int4.quantise_by(groups, counts, kept)
        assert torch.equal(codes, codes.round()) and codes.min() >= 0 and codes.max() <= 15
        assert torch.equal(lines, lines.bfloat16().float()) and lines.isfinite().all()
        off = (int4.decoded(codes, lines) - groups).double().square() * importance * kept
        errors.append(off.sum(-1))
    assert bool((errors[0] <= errors[1] * (1 + 1e-5)).all())
    assert errors[0].sum() < 0.8 * errors[1].sum()


@pytest.mark.parametrize("outputs, inputs", [(64, 64), (77, 300), (33, 193)])
def test_plain_int4_is_fitted_to_what_matters_too(outputs, inputs):
    """For no bytes more, and where nothing is known it is what it was."""
    weight, importance = torch.randn(outputs, inputs), torch.randn(inputs).mul(2).exp()
    plain, fitted, even = (pack(weight, "int4", importance=each) for each in (None, importance, torch.ones(inputs)))
    assert fitted.bytes == plain.bytes == packed_bytes(outputs, inputs, "int4") and fitted.outliers is None
    errors = [((unpack(p).double() - weight).square() * importance).sum() for p in (plain, fitted)]
    assert errors[1] < 0.8 * errors[0]
    squares = [(unpack(p).double() - weight).square().sum() for p in (plain, fitted, even)]
    assert squares[1] > squares[0] and squares[2] <= squares[0] * (1 + 1e-6)


def test_only_how_inputs_compare_matters():
    """The sum over outputs of a sensitivity is as good as its size in every output: a row is fitted by itself."""
    weight, importance = torch.randn(32, 192), torch.rand(192)
    wanted = unpack(pack(weight, DENSE_SPARSE, importance=importance))
    assert torch.equal(unpack(pack(weight, DENSE_SPARSE, importance=importance * 2.0**20)), wanted)
    assert not torch.equal(unpack(pack(weight, DENSE_SPARSE)), wanted)
    dead = unpack(pack(weight, DENSE_SPARSE, importance=torch.zeros(192)))
    assert distance(dead, weight) < 0.08


def test_places_above_a_sign_bit(level):  # noqa: F811
    weight, x = torch.zeros(32, 40_000), torch.randn(18, 40_000)
    weight[:, 33_000:] = torch.randn(32, 7000).pow(5)
    packed = pack(weight, DENSE_SPARSE)
    assert int4.entries(packed.outliers)[0].min() >= 33_000
    wanted = x.double() @ unpack(packed).double().T
    assert distance(native_linear(x[:3], packed), wanted[:3]) < 1e-4
    assert distance(native_linear(x, packed), wanted) < 1e-2
    with pytest.raises(IntarsiaError, match="up to 65,536 inputs, not 65,537: take int4"):
        pack(torch.zeros(1, 65_537), DENSE_SPARSE)


def test_parts_keep_what_stands_apart(level):  # noqa: F811
    parts = [pack(torch.randn(n, 400), DENSE_SPARSE, importance=torch.rand(400)) for n in (64, 40)]
    whole, views = join(parts)
    assert whole.outliers.shape == (8, 3, 16) and views[1].outliers.data_ptr() == whole.outliers[4].data_ptr()
    x = torch.randn(20, 400)
    for rows in (1, 20):
        assert torch.equal(native_linear(x[:rows], whole)[:, 64:104], native_linear(x[:rows], parts[1]))
