"""The Triton kernels against the float64 references, under Triton's interpreter; `test_ops_triton_interpreter` runs it.

Not collected by itself: the interpreter has to be asked for before Triton is first imported, so this needs a process
of its own. Shape letters: B batch, L length, C channels, K width, H heads, P head dim, G groups, N state.
"""

import pytest
import torch

from intarsia.ops import conv, gated_norm, reference
from intarsia.ops.triton import OPS


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
        (37, 70, 4, True, segments_of(3, 1, 20, 13), True),
        (37, 70, 4, False, None, True),
        (33, 5, 3, True, None, False),
        (1, 9, 4, True, None, True),
        (2, 9, 4, False, segments_of(1, 1), True),
        (5, 3, 1, False, None, True),
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


def test_gated_norm_of_slices_and_small_values():
    wide = torch.randn(2, 9, 100)
    y, z, weight = torch.randn(2, 9, 40) * 1e-4, wide[..., 20:60], torch.randn(40)
    wanted = reference.gated_norm_reference(y, z, weight, 2, 1e-5)
    assert distance(gated_norm.gated_norm(y, z, weight, 2, 1e-5), wanted) < 1e-6


def test_the_public_functions_came_here():
    from intarsia.ops import backends

    assert all(backends.choose(op, torch.empty(0)) == "triton" for op in OPS)
    assert backends.choose("ssd", torch.empty(0, dtype=torch.float64)) == "torch"
