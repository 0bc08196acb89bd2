"""The causal convolution against its definition in float64: values, gradients, state, documents, splits."""

import pytest
import torch

from intarsia.ops.conv import causal_conv, causal_conv_step
from intarsia.ops.reference import conv_reference

TOLERANCE = {torch.float32: 1e-6, torch.bfloat16: 1e-2, torch.float64: 1e-13}


@pytest.fixture(autouse=True)
def torch_backend(monkeypatch):
    monkeypatch.setenv("INTARSIA_OPS", "torch")


def draw(length, dtype=torch.float32, width=4, channels=9, seed=0):
    generator = torch.Generator().manual_seed(seed)
    shapes = (2, length, channels), (channels, width), (channels,), (2, width - 1, channels)
    return [torch.randn(*shape, generator=generator).to(dtype) for shape in shapes]


def documents(length):
    """One row of documents of 1 to 4 tokens, one row of long ones."""
    return torch.stack([torch.tensor([i * 10 for i in range(length) for _ in range(i % 4 + 1)][:length]),
                        torch.arange(length) // 50])  # fmt: skip


def results(op, inputs, **options):
    inputs = [None if t is None else t.detach().requires_grad_() for t in inputs]
    outputs = op(*inputs, **options)
    generator = torch.Generator().manual_seed(9)
    outgoing = [torch.randn(t.shape, generator=generator).to(inputs[0].dtype) for t in outputs]
    return [*(t.detach() for t in outputs),
            *torch.autograd.grad(outputs, [t for t in inputs if t is not None], outgoing)]  # fmt: skip


def distance(a, b):
    return float((a.double() - b.double()).norm() / b.double().norm().clamp_min(1e-30))


def assert_equal_to_reference(inputs, **options):
    truth = results(conv_reference, [None if t is None else t.double() for t in inputs], **options)
    for i, (a, b) in enumerate(zip(results(causal_conv, inputs, **options), truth)):
        assert distance(a, b) < TOLERANCE[inputs[0].dtype], (i, distance(a, b))


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("length", [1, 2, 3, 4, 63, 64, 65, 130])
@pytest.mark.parametrize("segments", [False, True])
def test_values_and_gradients_equal_the_definition(length, segments, dtype):
    assert_equal_to_reference(draw(length, dtype), segments=documents(length) if segments else None)


@pytest.mark.parametrize("width", [2, 3, 7])
@pytest.mark.parametrize("activation", [False, True])
def test_other_widths_and_no_activation(width, activation):
    x, weight, bias, state = draw(33, width=width)
    for segments in (None, documents(33)):
        assert_equal_to_reference([x, weight, bias, state], segments=segments, activation=activation)
        assert_equal_to_reference([x, weight, None, None], segments=segments, activation=activation)


def test_an_input_that_is_a_slice_of_a_wider_tensor():
    wide = torch.randn(2, 40, 30, generator=torch.Generator().manual_seed(3))
    _, weight, bias, state = draw(40)
    y, last = causal_conv(wide[..., 7:16], weight, bias, state)
    wanted, wanted_last = conv_reference(wide[..., 7:16], weight, bias, state)
    assert distance(y, wanted) < 1e-6 and distance(last, wanted_last) == 0


def test_any_split_gives_the_same():
    inputs = draw(40)
    for first in (1, 2, 3, 20, 39):

        def split(x, weight, bias, state, first=first):
            y1, state = causal_conv(x[:, :first], weight, bias, state)
            y2, state = causal_conv(x[:, first:], weight, bias, state)
            return torch.cat([y1, y2], 1), state

        for a, b in zip(results(split, inputs), results(causal_conv, inputs)):
            assert distance(a, b) < 1e-6


def test_a_packed_row_equals_its_documents():
    x, weight, bias, state = (t[:1] if t.dim() == 3 else t for t in draw(20))
    lengths = [2, 1, 9, 6, 2]
    segments = torch.repeat_interleave(torch.arange(5), torch.tensor(lengths))[None]
    y, last = causal_conv(x, weight, bias, state, segments)
    start = 0
    for i, n in enumerate(lengths):
        alone, last_alone = causal_conv(x[:, start : start + n], weight, bias, state if i == 0 else None)
        torch.testing.assert_close(y[:, start : start + n], alone, atol=1e-6, rtol=1e-5)
        start += n
    assert torch.equal(last, last_alone)  # the new state holds nothing of another document


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_steps_equal_the_row_and_write_into_the_state(dtype):
    x, weight, bias, state = draw(9, dtype)
    y, last = conv_reference(x, weight, bias, state)
    held = state.clone()
    stepped = torch.stack([causal_conv_step(x[:, t], weight, bias, held) for t in range(9)], 1)
    assert stepped.dtype == dtype and distance(stepped, y) < TOLERANCE[dtype] and distance(held, last) == 0


def test_gradients_by_finite_differences():
    x, weight, bias, state = (t.requires_grad_() for t in draw(7, torch.float64, channels=2))
    segments = torch.tensor([[0, 0, 1, 1, 1, 1, 2], [0, 0, 0, 0, 0, 0, 0]])
    assert torch.autograd.gradcheck(lambda *t: causal_conv(*t, segments=segments), (x, weight, bias, state))


def test_only_the_inputs_are_kept():
    inputs, kept = [t.requires_grad_() for t in draw(50)], []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: (kept.append(t.data_ptr()), t)[1], lambda t: t):
        causal_conv(*inputs)
    assert set(kept) <= {t.data_ptr() for t in inputs}
