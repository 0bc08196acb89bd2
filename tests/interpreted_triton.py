"""The Triton kernels against the float64 references, under Triton's interpreter; `test_ops_triton_interpreter` runs it.

Not collected by itself: the interpreter has to be asked for before Triton is first imported, so this needs a process
of its own. Shape letters: B batch, L length, C channels, K width, H heads, P head dim, G groups, N state.
"""

import pytest
import torch

from intarsia.ops import activation, conv, gated_norm, paged_attention, reference, ssd
from intarsia.ops.triton import OPS, launcher


@pytest.fixture(autouse=True)
def seeded(monkeypatch):
    monkeypatch.setenv("INTARSIA_OPS", "triton")  # so that the public functions come here, on the CPU too
    torch.manual_seed(0)


def segments_of(*lengths: int) -> torch.Tensor:
    return torch.repeat_interleave(torch.arange(len(lengths), dtype=torch.int32), torch.tensor(lengths))


def distance(got: torch.Tensor, wanted: torch.Tensor) -> float:
    assert got.shape == wanted.shape
    got = got.detach()
    return float((got.double() - wanted).norm() / wanted.norm().clamp_min(1e-30))


def check(op, ref, inputs: dict, rest: dict, bound: float = 1e-5):
    """Outputs and the gradients of every tensor in `inputs`, against the reference, from random output gradients."""
    mine = {k: v.clone().requires_grad_() for k, v in inputs.items() if v is not None}
    exact = {k: v.double().clone().requires_grad_() for k, v in inputs.items() if v is not None}
    got, wanted = op(**mine, **rest), ref(**exact, **rest)
    got, wanted = (out if isinstance(out, tuple) else (out,) for out in (got, wanted))
    seeds = [torch.randn_like(out) for out in got]
    torch.autograd.backward(got, seeds)
    torch.autograd.backward(wanted, [seed.double() for seed in seeds])
    for g, w in zip(got, wanted, strict=True):
        assert distance(g, w.detach()) < bound
    for name, tensor in mine.items():
        assert tensor.grad.dtype == tensor.dtype
        assert distance(tensor.grad, exact[name].grad) < bound, f"gradient of {name}"


@pytest.mark.parametrize(
    "length, channels, width, state, segments, activation",
    [
        (21, 70, 4, True, segments_of(3, 1, 10, 7), True),
        (21, 7, 4, False, None, True),
        (33, 5, 3, True, None, False),
        (1, 9, 4, True, None, True),
        (2, 9, 4, False, segments_of(1, 1), True),
        (5, 3, 1, False, None, True),
        (20, 3, 10, True, None, True),
    ],
)
def test_conv(length, channels, width, state, segments, activation):
    batch = 2
    inputs = {
        "x": torch.randn(batch, length, channels),
        "weight": torch.randn(channels, width),
        "bias": torch.randn(channels) if activation else None,
        "state": torch.randn(batch, width - 1, channels) if state else None,
    }
    ids = None if segments is None else torch.stack([segments, torch.zeros_like(segments)])
    check(conv.causal_conv, reference.conv_reference, inputs, {"segments": ids, "activation": activation})


def test_conv_of_a_slice_and_split_in_two():
    wide = torch.randn(2, 40, 50)
    x, weight, bias = wide[..., 10:40], torch.randn(30, 4), torch.randn(30)
    whole, last = conv.causal_conv(x, weight, bias)
    first, state = conv.causal_conv(x[:, :17], weight, bias)
    second, end = conv.causal_conv(x[:, 17:], weight, bias, state)
    assert torch.equal(torch.cat([first, second], 1), whole)
    assert torch.equal(end, last) and torch.equal(last, x[:, -3:])


@pytest.mark.parametrize("width", [4, 2, 1])
def test_conv_step_by_step(width):
    x, weight, bias = torch.randn(2, 6, 300), torch.randn(300, width), torch.randn(300)
    wanted, last = reference.conv_reference(x, weight, bias)
    state = torch.zeros(2, width - 1, 300)
    steps = [conv.causal_conv_step(x[:, t], weight, bias, state) for t in range(6)]
    assert distance(torch.stack(steps, 1), wanted) < 1e-6
    assert torch.equal(state.double(), last)


@pytest.mark.parametrize("shape, groups", [((3, 7, 60), 4), ((5, 96), 1), ((2, 1, 33), 11), ((1, 2, 2050), 1)])
def test_gated_norm(shape, groups):
    def call(op):
        return lambda y, z, weight: op(y, z, weight, groups, 1e-5)

    inputs = {"y": torch.randn(shape), "z": torch.randn(shape) * 2, "weight": torch.randn(shape[-1])}
    check(call(gated_norm.gated_norm), call(reference.gated_norm_reference), inputs, {})


@pytest.mark.parametrize("shape", [(3, 7, 60), (1,), (2, 2049)])
def test_relu_squared(shape):
    check(activation.relu_squared, reference.relu_squared_reference, {"x": torch.randn(shape)}, {})
    wide = torch.randn(4, 50)
    assert distance(activation.relu_squared(wide[:, 5:30]), wide[:, 5:30].double().relu().square()) < 1e-6
    assert activation.relu_squared(torch.tensor([-3.0, torch.nan])).isnan().tolist() == [False, True]


def test_gated_norm_of_slices_and_small_values():
    wide = torch.randn(2, 9, 100)
    y, z, weight = torch.randn(2, 9, 40) * 1e-4, wide[..., 20:60], torch.randn(40)
    wanted = reference.gated_norm_reference(y, z, weight, 2, 1e-5)
    assert distance(gated_norm.gated_norm(y, z, weight, 2, 1e-5), wanted) < 1e-6


def scan_inputs(batch=1, length=21, heads=4, size=6, groups=2, width=10, state=True, D=True) -> dict:
    return {
        "x": torch.randn(batch, length, heads, size),
        "dt": torch.rand(batch, length, heads) * 0.2,
        "A": -torch.rand(heads) * 15 - 0.5,
        "B": torch.randn(batch, length, groups, width),
        "C": torch.randn(batch, length, groups, width),
        "D": torch.randn(heads) if D else None,
        "state": torch.randn(batch, heads, size, width) if state else None,
    }


@pytest.mark.parametrize(
    "shape",
    [
        {"batch": 2},
        {"length": 1, "state": False},
        {"length": 16, "groups": 1, "heads": 3, "D": False},
        {"length": 33, "heads": 2, "groups": 2, "size": 20, "width": 33},
        {"length": 15, "state": False, "heads": 1, "groups": 1, "size": 1, "width": 1},
    ],
    ids=str,
)
def test_scan(shape):
    check(ssd.ssd, reference.ssd_reference, scan_inputs(**shape), {"chunk_size": 16})


@pytest.mark.parametrize("chunk_size", [16, 32])
def test_scan_over_segments(chunk_size):
    inputs = scan_inputs(batch=3, length=40, heads=1, groups=1)
    ids = torch.stack([segments_of(3, 1, 20, 16), segments_of(16, 16, 8), segments_of(39, 1)])
    check(ssd.ssd, reference.ssd_reference, inputs, {"segments": ids, "chunk_size": chunk_size})


STEPS = {
    "none": torch.zeros(40),
    "large": torch.full((40,), 100.0),
    "one huge among small": torch.where(torch.arange(40) % 13 == 5, 1e4, 1e-3),
    "large and none": torch.where(torch.arange(40) % 2 == 0, 50.0, 0.0),
    "strong, then weak": torch.cat([torch.full((20,), 60.0), torch.full((20,), 1e-2)]),
    "tiny": torch.full((40,), 1e-6),
    "all sizes": torch.logspace(-6, 3, 40)[torch.randperm(40, generator=torch.Generator().manual_seed(1))],
}


@pytest.mark.parametrize("name", STEPS)
def test_scan_with_adversarial_steps(name):
    inputs = scan_inputs(length=40, heads=2, groups=1) | {"A": torch.tensor([-1.0, -16.0])}
    inputs["dt"] = STEPS[name][None, :, None].repeat(1, 1, 2)
    check(ssd.ssd, reference.ssd_reference, inputs, {"chunk_size": 32})


def test_scan_with_gradients_through_the_state_alone():
    inputs = scan_inputs(length=20, heads=2, groups=1)
    check(lambda **kw: ssd.ssd(**kw)[1], lambda **kw: reference.ssd_reference(**kw)[1],
          {k: v for k, v in inputs.items() if k not in "CD"}, {"C": inputs["C"], "chunk_size": 16})  # fmt: skip


def test_scan_of_slices_of_a_projection():
    wide = torch.randn(2, 21, 3 * 8 + 2 * 16)
    x, B, C = wide[..., :24].unflatten(-1, (3, 8)), wide[..., 24:40].unsqueeze(2), wide[..., 40:].unsqueeze(2)
    dt, A = torch.rand(2, 21, 3), -torch.rand(3)
    got, wanted = (op(x, dt, A, B, C, chunk_size=16) for op in (ssd.ssd, reference.ssd_reference))
    assert all(distance(g, w) < 1e-6 for g, w in zip(got, wanted))


def test_many_heads_share_a_group_in_parts(monkeypatch):
    monkeypatch.setitem(launcher.CONFIG["scan_groups"], "SHARE", 2)
    inputs = scan_inputs(length=18, heads=5, groups=1, size=2, width=3)
    check(ssd.ssd, reference.ssd_reference, inputs, {"chunk_size": 16})


def test_scan_step_by_step():
    inputs = scan_inputs(length=7, size=20)
    wanted, last = reference.ssd_reference(**inputs)
    state, (x, dt, A, B, C, D) = inputs["state"], (inputs[k] for k in ("x", "dt", "A", "B", "C", "D"))
    steps = [ssd.ssd_step(x[:, t], dt[:, t], A, B[:, t], C[:, t], D, state) for t in range(7)]
    assert distance(torch.stack(steps, 1), wanted) < 1e-6
    assert distance(state, last) < 1e-6


@pytest.mark.parametrize("window", [None, 20, 64, 200])
@pytest.mark.parametrize("heads, kv_heads, dim, page", [(6, 2, 24, 8), (4, 4, 16, 32), (20, 1, 33, 3)])
def test_paged_attention(heads, kv_heads, dim, page, window):
    keys, values = (torch.randn(60, kv_heads, page, dim).transpose(1, 2) for _ in "kv")
    lengths = torch.tensor([1, 7, 64, 65, 130], dtype=torch.int32)
    most = -(-130 // page)
    tables = torch.stack([torch.randperm(60)[:most] for _ in lengths]).int()
    q = torch.randn(5, heads, dim)
    wanted = paged_attention.paged_attention_torch(*(t.double() for t in (q, keys, values)), tables, lengths, window)
    assert distance(paged_attention.paged_attention(q, keys, values, tables, lengths, window), wanted) < 1e-5


def test_the_public_functions_came_here():
    from intarsia.ops import backends

    assert all(backends.choose(op, torch.empty(0)) == "triton" for op in OPS)
    assert backends.choose("ssd", torch.empty(0, dtype=torch.float64)) == "torch"
