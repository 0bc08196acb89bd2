"""Mamba-1's scan against its definition in float64: values, gradients, states, documents, splits."""

import pytest
import torch

from intarsia.ops.reference import selective_reference
from intarsia.ops.selective import CHUNK, selective_scan, selective_step

TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 1e-2, torch.float64: 1e-12}
NAMES = ("y", "state", "dx", "ddt", "dA", "dB", "dC", "dD", "dstate")


@pytest.fixture(autouse=True)
def torch_backend(monkeypatch):
    monkeypatch.setenv("INTARSIA_OPS", "torch")


def draw(length, dtype=torch.float32, batch=2, channels=6, width=5, step=0.3, decay=4.0, seed=0):
    generator = torch.Generator().manual_seed(seed)
    wide = torch.promote_types(dtype, torch.float32)

    def normal(*shape):
        return torch.randn(*shape, generator=generator)

    x, B, C = normal(batch, length, channels), *(normal(batch, length, width) for _ in "BC")
    dt = step * torch.rand(batch, length, channels, generator=generator)
    A = -decay * (0.1 + torch.rand(channels, width, generator=generator))
    D, state = normal(channels), normal(batch, channels, width)
    return [t.to(k) for t, k in zip((x, dt, A, B, C, D, state), (dtype, wide, wide, dtype, dtype, wide, wide))]


def results(op, inputs, segments=None):
    inputs = [t.detach().requires_grad_() for t in inputs]
    outputs = op(*inputs, segments=segments)
    generator = torch.Generator().manual_seed(9)
    outgoing = [torch.randn(t.shape, generator=generator).to(inputs[0].dtype).to(t.dtype) for t in outputs]
    return [*(t.detach() for t in outputs), *torch.autograd.grad(outputs, inputs, outgoing)]


def distance(a, b):
    return float((a.double() - b.double()).norm() / b.double().norm().clamp_min(1e-30))


def documents(length):
    return torch.stack([torch.arange(length) // 7, (torch.arange(length) + 1) // CHUNK])


def assert_equal_to_reference(inputs, segments=None):
    truth = results(selective_reference, [t.double() for t in inputs], segments)
    for name, a, b in zip(NAMES, results(selective_scan, inputs, segments), truth):
        assert distance(a, b) < TOLERANCE[inputs[0].dtype], f"{name}: {distance(a, b):.1e}"


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("length", [1, 2, CHUNK - 1, CHUNK, CHUNK + 1, 2 * CHUNK + 5])
def test_values_and_gradients_equal_the_definition(length, dtype):
    assert_equal_to_reference(draw(length, dtype))
    assert_equal_to_reference(draw(length, dtype, seed=1), documents(length))


@pytest.mark.parametrize("step", [0.0, 1e-6, 1e3])
@pytest.mark.parametrize("decay", [1e-6, 4.0])
def test_adversarial_steps_and_decays(step, decay):
    assert_equal_to_reference(draw(CHUNK + 1, step=step, decay=decay), documents(CHUNK + 1))


def test_gradients_by_finite_differences():
    inputs = [t.requires_grad_() for t in draw(5, torch.float64, batch=1, channels=2, width=2)]
    segments = torch.tensor([[0, 0, 1, 1, 1]])
    assert torch.autograd.gradcheck(lambda *t: selective_scan(*t, segments=segments), inputs)


def test_any_split_gives_the_same():
    inputs = draw(70)
    for first in (1, 31, 32, 69):

        def split(x, dt, A, B, C, D, state, segments=None, first=first):
            y1, state = selective_scan(x[:, :first], dt[:, :first], A, B[:, :first], C[:, :first], D, state)
            y2, state = selective_scan(x[:, first:], dt[:, first:], A, B[:, first:], C[:, first:], D, state)
            return torch.cat([y1, y2], 1), state

        for name, a, b in zip(NAMES, results(split, inputs), results(selective_scan, inputs)):
            assert distance(a, b) < 1e-5, (first, name)


def test_a_packed_row_equals_its_documents():
    x, dt, A, B, C, D, state = draw(50, batch=1)
    segments = torch.repeat_interleave(torch.arange(3), torch.tensor([1, 40, 9]))[None]
    y, last = selective_scan(x, dt, A, B, C, D, state, segments)
    for i, part in enumerate((slice(0, 1), slice(1, 41), slice(41, 50))):
        alone = selective_scan(x[:, part], dt[:, part], A, B[:, part], C[:, part], D, state if i == 0 else None)
        torch.testing.assert_close(y[:, part], alone[0])
    torch.testing.assert_close(last, alone[1])


def test_steps_equal_the_scan_and_write_into_the_state():
    x, dt, A, B, C, D, state = draw(9)
    y, last = selective_reference(x, dt, A, B, C, D, state)
    stepped = torch.stack([selective_step(x[:, t], dt[:, t], A, B[:, t], C[:, t], D, state) for t in range(9)], 1)
    assert distance(stepped, y) < 1e-6 and distance(state, last) < 1e-6


def test_one_state_a_chunk_is_kept():
    inputs, kept = [t.requires_grad_() for t in draw(10 * CHUNK, batch=1)], []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: (kept.append(t.numel()), t)[1], lambda t: t):
        selective_scan(*inputs)
    assert sum(kept) <= sum(t.numel() for t in inputs) + 10 * inputs[-1].numel()
