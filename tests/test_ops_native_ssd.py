"""The native scan, its step and the matrix-vector product against float64, on every level of processor."""

import pytest
import torch

from intarsia.base.errors import IntarsiaError
from intarsia.ops import backends
from intarsia.ops.linear import linear
from intarsia.ops.native.matvec import matvec
from intarsia.ops.native.ssd import ssd, ssd_step
from intarsia.ops.reference import ssd_reference
from native_levels import BOUND, check, distance, documents, level  # noqa: F401

DTYPES = list(BOUND)


@pytest.fixture(autouse=True)
def seeded(level):  # noqa: F811
    torch.manual_seed(0)


def draw(length, heads=4, size=16, groups=2, width=32, dtype=torch.float32, batch=2):
    return {
        "x": torch.randn(batch, length, heads, size).to(dtype),
        "dt": torch.nn.functional.softplus(torch.randn(batch, length, heads) - 2),
        "A": -torch.rand(heads) * 8,
        "B": torch.randn(batch, length, groups, width).to(dtype),
        "C": torch.randn(batch, length, groups, width).to(dtype),
        "D": torch.randn(heads),
        "state": torch.randn(batch, heads, size, width),
    }


def assert_right(inputs, segments=None, bound=None):
    bound = bound or BOUND[inputs["x"].dtype]
    y, last = ssd(**inputs, segments=segments)
    wanted, end = ssd_reference(**inputs, segments=segments)
    assert y.dtype == inputs["x"].dtype and last.dtype == torch.float32
    assert distance(y, wanted) < bound and distance(last, end) < bound


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("length", [1, 31, 32, 33, 63, 64, 65, 129, 200])
def test_every_length(length, dtype):
    assert_right(draw(length, dtype=dtype))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    "heads, size, groups, width", [(3, 64, 1, 128), (6, 7, 3, 5), (2, 17, 2, 33), (1, 1, 1, 1), (20, 8, 1, 16)]
)
def test_odd_shapes(heads, size, groups, width, dtype):
    assert_right(draw(70, heads, size, groups, width, dtype))


@pytest.mark.parametrize("dtype", DTYPES)
def test_documents_and_absent_inputs(dtype):
    inputs = draw(150, dtype=dtype)
    ids = torch.stack([documents(1, 62, 1, 1, 60, 25), documents(64, 86)])
    assert_right(inputs, ids)
    assert_right({**inputs, "D": None, "state": None}, ids)
    assert_right({**inputs, "D": None, "state": None})


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("case", ["no time", "all time", "mixed", "slow", "fast"])
def test_adversarial_time_steps(case, dtype):
    inputs = draw(130, dtype=dtype)
    dt = inputs["dt"]
    if case == "mixed":
        dt[torch.rand(dt.shape) < 0.3] = 0.0
        dt[torch.rand(dt.shape) < 0.3] = 1e3
    elif case in ("slow", "fast"):
        inputs["A"].fill_(-1e-6 if case == "slow" else -1e4)
    else:
        dt.fill_(0.0 if case == "no time" else 1e3)
    assert_right(inputs)


def chain(*lengths):
    return torch.stack([documents(*lengths), torch.zeros(sum(lengths), dtype=torch.int32)])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    "length, heads, size, groups, width", [(1, 2, 16, 1, 32), (65, 3, 16, 1, 32), (130, 4, 7, 2, 5), (70, 18, 4, 1, 3)]
)
def test_gradients(length, heads, size, groups, width, dtype):
    check(ssd, ssd_reference, draw(length, heads, size, groups, width, dtype), 2 * BOUND[dtype])


@pytest.mark.parametrize("dtype", DTYPES)
def test_gradients_of_documents_and_absent_inputs(dtype):
    inputs, ids = draw(150, dtype=dtype), chain(1, 62, 1, 1, 60, 25)
    check(ssd, ssd_reference, inputs, 2 * BOUND[dtype], segments=ids)
    check(ssd, ssd_reference, {**inputs, "D": None, "state": None}, 2 * BOUND[dtype], segments=ids)


@pytest.mark.parametrize("case", ["no time", "mixed", "slow"])
def test_gradients_of_adversarial_time_steps(case):
    inputs = draw(130)
    if case == "slow":
        inputs["A"].fill_(-1e-6)
    else:
        inputs["dt"][torch.rand(inputs["dt"].shape) < (1.0 if case == "no time" else 0.3)] = 0.0
    if case == "mixed":
        inputs["dt"][torch.rand(inputs["dt"].shape) < 0.3] = 1e3
    check(ssd, ssd_reference, inputs, 1e-5)


def test_split_anywhere():
    inputs = draw(100)
    whole, end = ssd(**inputs)
    tokens = ("x", "dt", "B", "C")
    for cut in (1, 37, 64, 99):
        first = {k: v[:, :cut] if k in tokens else v for k, v in inputs.items()}
        y1, state = ssd(**first)
        second = {k: v[:, cut:] if k in tokens else v for k, v in inputs.items()}
        y2, last = ssd(**{**second, "state": state})
        assert distance(torch.cat([y1, y2], 1), whole.double()) < 1e-5 and distance(last, end.double()) < 1e-5


@pytest.mark.parametrize("dtype", DTYPES)
def test_views_and_other_layouts(dtype):
    inputs = draw(70, dtype=dtype)
    wanted, _ = ssd_reference(**inputs)
    row = torch.cat([inputs[k].flatten(2) for k in "xBC"], 2)  # as the model has them: parts of one row
    x, B, C = row.split([64, 64, 64], 2)
    views = {"x": x.unflatten(2, (4, 16)), "B": B.unflatten(2, (2, 32)), "C": C.unflatten(2, (2, 32))}
    assert distance(ssd(**{**inputs, **views})[0], wanted) < BOUND[dtype]
    turned = {k: inputs[k].transpose(1, 2).contiguous().transpose(1, 2) for k in ("x", "dt", "B", "C")}
    turned["state"] = inputs["state"].mT.contiguous().mT
    assert distance(ssd(**{**inputs, **turned})[0], wanted) < BOUND[dtype]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("heads, size, groups, width", [(4, 16, 2, 32), (3, 7, 1, 5), (6, 64, 2, 128)])
def test_step_by_step(heads, size, groups, width, dtype):
    inputs = draw(6, heads, size, groups, width, dtype)
    inputs["dt"][:, 2] = 0.0
    inputs["dt"][:, 4] = 1e3
    wanted, end = ssd_reference(**inputs)
    state = inputs.pop("state")
    x, dt, B, C = (inputs.pop(k) for k in ("x", "dt", "B", "C"))
    y = [ssd_step(x[:, t], dt[:, t], B=B[:, t], C=C[:, t], **inputs, state=state) for t in range(6)]
    assert distance(torch.stack(y, 1), wanted) < BOUND[dtype] and distance(state, end) < 1e-5


def test_step_in_a_state_that_is_not_contiguous():
    inputs = draw(1)
    wanted, end = ssd_reference(**inputs)
    held = torch.empty(2, 4, 32, 16).mT
    held.copy_(inputs.pop("state"))
    x, dt, B, C = (inputs.pop(k)[:, 0] for k in ("x", "dt", "B", "C"))
    y = ssd_step(x, dt, B=B, C=C, **inputs, state=held)
    assert distance(y, wanted[:, 0]) < 1e-5 and distance(held, end) < 1e-5


@pytest.mark.parametrize("rows", [1, 2, 3, 5, 8, 11])
@pytest.mark.parametrize("columns", [1, 31, 64, 300])
def test_matvec(rows, columns):
    x, weight = torch.randn(rows, columns).bfloat16(), torch.randn(77, columns + 5).bfloat16()[:, 2 : columns + 2]
    wanted = x.double() @ weight.double().T
    assert distance(matvec(x, weight, dtype=torch.float32), wanted) < 1e-5
    assert matvec(x, weight).dtype == torch.bfloat16 and distance(matvec(x, weight), wanted) < 1e-2
    assert matvec(x[0], weight).shape == (77,)


def test_a_row_of_a_matvec_does_not_depend_on_the_others():
    x, weight = torch.randn(11, 300).bfloat16(), torch.randn(77, 300).bfloat16()
    alone = torch.stack([matvec(row, weight, dtype=torch.float32) for row in x])
    assert all(torch.equal(matvec(x[:n], weight, dtype=torch.float32), alone[:n]) for n in range(1, 12))


def test_linear_takes_a_few_rows_and_leaves_the_rest_to_torch():
    weight, bias = torch.randn(40, 64).bfloat16().requires_grad_(), torch.randn(40).bfloat16()
    x = torch.randn(9, 64).bfloat16()
    with torch.no_grad():
        assert distance(linear(x[:3], weight, bias), x[:3].double() @ weight.double().T + bias.double()) < 1e-2
        chosen = [backends.choose("linear", rows) for rows in (x[:8], x, x[:8].float())]
    assert chosen == ["native", "torch", "torch"] and backends.choose("linear", x[:1], training=True) == "torch"
    assert linear(x[:3], weight, bias).requires_grad


def test_matvec_of_other_dtypes_is_refused():
    with pytest.raises(IntarsiaError, match="bfloat16"):
        matvec(torch.randn(3), torch.randn(4, 3))
