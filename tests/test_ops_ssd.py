"""Mamba-2's scan against its definition in float64: values, gradients, states, documents, splits and memory."""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from intarsia.ops import ssd_chunked
from intarsia.ops.reference import ssd_reference
from intarsia.ops.ssd import ssd, ssd_step, time_steps
from intarsia.ops.ssd_chunked import CHUNK, segment_sums

TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 1e-2, torch.float64: 1e-12}
NAMES = ("y", "state", "dx", "ddt", "dA", "dB", "dC", "dD", "dstate")
STEPS = {
    "usual": lambda u: 0.001 + 0.1 * u,
    "zero": lambda u: 0 * u,
    "half of them zero": lambda u: u * (u > 0.5),
    "very large": lambda u: 1e3 * u,
    "large among small": lambda u: torch.where(u > 0.9, 1e3 * u, 1e-3 * u),
}
DECAYS = {"usual": lambda u: -1 - 15 * u, "near 1": lambda u: -1e-6 * (u + 0.1), "near 0": lambda u: -100 * (u + 0.5)}


@pytest.fixture(autouse=True)
def torch_backend(monkeypatch):
    monkeypatch.setenv("INTARSIA_OPS", "torch")


def draw(length, dtype=torch.float32, batch=2, heads=4, groups=2, size=8, width=16, dt="usual", decay="usual", seed=0):
    """x, dt, A, B, C, D and the state; what the op computes in float32 is float32 (float64 in float64)."""
    generator = torch.Generator().manual_seed(seed)
    wide = torch.promote_types(dtype, torch.float32)

    def normal(*shape):
        return torch.randn(*shape, generator=generator)

    def uniform(*shape):
        return torch.rand(*shape, generator=generator)

    x, B, C = normal(batch, length, heads, size), *(normal(batch, length, groups, width) for _ in "BC")
    steps, A = STEPS[dt](uniform(batch, length, heads)), DECAYS[decay](uniform(heads))
    D, state = normal(heads), normal(batch, heads, size, width)
    return [t.to(k) for t, k in zip((x, steps, A, B, C, D, state), (dtype, wide, wide, dtype, dtype, wide, wide))]


def results(op, inputs, segments=None, seed=9):
    """(y, state, gradients of the inputs) for one fixed pair of outgoing gradients."""
    inputs = [t.detach().requires_grad_() for t in inputs]
    y, state = op(*inputs, segments=segments)
    generator = torch.Generator().manual_seed(seed)
    dy, dstate = (torch.randn(t.shape, generator=generator).to(inputs[0].dtype).to(t.dtype) for t in (y, state))
    return [y.detach(), state.detach(), *torch.autograd.grad((y, state), inputs, (dy, dstate))]


def distance(a, b):
    """Relative, in the norm. Nothing is asked below 1e-30, where float32 ends."""
    a, b = a.double(), b.double()
    return float((a - b).norm() / b.norm().clamp_min(1e-30))


def tolerance(name, inputs):
    """A's gradient sums over all tokens, and its terms cancel: with a few heads, a few digits of bfloat16 are left."""
    dtype, heads = inputs[0].dtype, inputs[2].shape[0]
    return 5e-2 if name == "dA" and dtype == torch.bfloat16 and heads < 24 else TOLERANCE[dtype]


def assert_equal_to_reference(inputs, segments=None, names=NAMES):
    ours = results(ssd, inputs, segments)
    truth = results(ssd_reference, [t.double() for t in inputs], segments)
    for name, a, b in zip(NAMES, ours, truth):
        if name in names:
            assert distance(a, b) < tolerance(name, inputs), f"{name}: {distance(a, b):.1e}"


def documents(length):
    """Two rows of documents of many lengths: one token, across chunks, exactly a chunk."""
    return torch.stack([torch.arange(length) // 37, (torch.arange(length) + 1) // CHUNK + (torch.arange(length) > 0)])


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("length", [1, 7, 8, CHUNK - 1, CHUNK, CHUNK + 1, 2 * CHUNK + 9])
def test_values_and_gradients_equal_the_definition(length, dtype):
    assert_equal_to_reference(draw(length, dtype))
    assert_equal_to_reference(draw(length, dtype, seed=1), documents(length))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("dt", STEPS)
@pytest.mark.parametrize("decay", DECAYS)
def test_adversarial_steps_and_decays(dt, decay, dtype):
    inputs = draw(CHUNK + 1, dtype, dt=dt, decay=decay, width=32, batch=3)
    segments = torch.cat([documents(CHUNK + 1), torch.zeros(1, CHUNK + 1, dtype=torch.long)])
    assert_equal_to_reference(inputs, segments)
    # Through 65 tokens of very strong decay only noise reaches the first state: its gradient has no digits to compare.
    names = NAMES if (dt, decay) != ("very large", "usual") else NAMES[:-1]
    assert_equal_to_reference(inputs, None, names)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_as_many_heads_as_a_model_has(dtype):
    assert_equal_to_reference(draw(150, dtype, batch=1, heads=24, groups=8, size=16, width=32))


@pytest.mark.parametrize("heads, groups, size, width", [(3, 1, 4, 5), (4, 4, 1, 8), (6, 2, 16, 1)])
def test_other_shapes(heads, groups, size, width):
    assert_equal_to_reference(draw(70, batch=1, heads=heads, groups=groups, size=size, width=width))


def test_gradients_by_finite_differences():
    inputs = [t.requires_grad_() for t in draw(9, torch.float64, batch=1, heads=2, groups=1, size=2, width=3)]
    segments = torch.tensor([[0, 0, 0, 1, 1, 2, 2, 2, 2]])
    assert torch.autograd.gradcheck(lambda *t: ssd(*t, segments=segments), inputs)


def test_without_skip_or_state():
    x, dt, A, B, C, _, _ = draw(70)
    for ours, truth in zip(ssd(x, dt, A, B, C), ssd_reference(x, dt, A, B, C)):
        assert distance(ours, truth) < 1e-6
    y, state = ssd(x[:, :0], dt[:, :0], A, B[:, :0], C[:, :0])
    assert y.shape == (2, 0, 4, 8) and not state.any()


def test_thousands_of_tokens_that_hardly_decay():
    inputs = draw(4096, batch=1, heads=2, groups=1, size=4, width=4, dt="usual", decay="near 1")
    for ours, truth in zip(ssd(*inputs), ssd_reference(*inputs)):
        assert distance(ours, truth) < 1e-5


def test_any_split_gives_the_same():
    inputs = draw(200)
    for first in (1, 63, 64, 100, 199):

        def split(x, dt, A, B, C, D, state, segments=None, first=first):
            y1, state = ssd(x[:, :first], dt[:, :first], A, B[:, :first], C[:, :first], D, state)
            y2, state = ssd(x[:, first:], dt[:, first:], A, B[:, first:], C[:, first:], D, state)
            return torch.cat([y1, y2], 1), state

        for name, a, b in zip(NAMES, results(split, inputs), results(ssd, inputs)):
            assert distance(a, b) < 1e-5, (first, name)


def test_a_packed_row_equals_its_documents():
    lengths = [1, 63, 64, 5, 90]
    inputs = draw(sum(lengths), batch=1)
    segments = torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths))[None]

    def apart(x, dt, A, B, C, D, state, segments=None):
        ys, start = [], 0
        for i, n in enumerate(lengths):
            part = slice(start, start + n)
            y, last = ssd(x[:, part], dt[:, part], A, B[:, part], C[:, part], D, state if i == 0 else None)
            ys, start = [*ys, y], start + n
        return torch.cat(ys, 1), last

    for name, a, b in zip(NAMES, results(ssd, inputs, segments), results(apart, inputs)):
        assert distance(a, b) < 1e-5, name


def test_padding_moves_nothing():
    x, dt, A, B, C, D, state = draw(100)
    keep = torch.ones(2, 100, dtype=torch.bool)
    keep[:, :10], keep[:, 60:75], keep[:, 95:] = False, False, False
    y, last = ssd(x, dt * keep[..., None], A, B, C, D, state)
    y_alone, last_alone = ssd(*(t[:, keep[0]] for t in (x, dt)), A, *(t[:, keep[0]] for t in (B, C)), D, state)
    assert distance(y[:, keep[0]], y_alone) < 1e-6 and distance(last, last_alone) < 1e-6


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_steps_equal_the_scan_and_write_into_the_state(dtype):
    x, dt, A, B, C, D, state = draw(20, dtype)
    y, last = ssd_reference(x, dt, A, B, C, D, state)
    held, where = state.clone(), state.data_ptr()
    stepped = torch.stack([ssd_step(x[:, t], dt[:, t], A, B[:, t], C[:, t], D, held) for t in range(20)], 1)
    assert stepped.dtype == dtype and distance(stepped, y) < TOLERANCE[dtype] and distance(held, last) < 1e-5
    ssd(x, dt, A, B, C, D, state)
    assert state.data_ptr() == where and not torch.equal(state, held)  # the scan leaves the given state alone


def test_sums_of_decays_are_not_differences():
    a = -torch.rand(3, 64, generator=torch.Generator().manual_seed(0))
    a[:, 10], a[:, 30], a[:, 40] = -1e6, -torch.inf, -1e-7
    sums = segment_sums(a)
    for i in range(64):
        for j in range(64):
            wanted = a[:, j + 1 : i + 1].double().sum(-1) if i >= j else torch.full((3,), -torch.inf).double()
            torch.testing.assert_close(sums[:, i, j].double(), wanted, rtol=1e-6, atol=0)


class _Largest(TorchDispatchMode):
    """The largest tensor that any op made."""

    numel = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for t in out if isinstance(out, (tuple, list)) else (out,):
            if isinstance(t, torch.Tensor):
                self.numel = max(self.numel, t.untyped_storage().nbytes() // t.element_size())
        return out


def test_memory_is_linear_in_length(monkeypatch):
    monkeypatch.setattr(ssd_chunked, "BLOCK", 1)  # the smallest: four chunks

    def sizes(length):
        inputs = [t.requires_grad_() for t in draw(length, batch=1, heads=8, groups=2, size=16, width=16)]
        kept = []
        with _Largest() as largest, torch.autograd.graph.saved_tensors_hooks(
            lambda t: (kept.append(t.numel()), t)[1], lambda t: t
        ):
            y, _ = ssd(*inputs)
            torch.autograd.grad(y.sum(), inputs)
        return sum(kept) - sum(t.numel() for t in inputs), largest.numel

    (kept, largest), (kept_long, largest_long) = sizes(1024), sizes(2048)
    assert 0 < kept_long <= 2.1 * kept  # the states between blocks
    assert kept_long <= 2048 // CHUNK * 8 * 16 * 16  # at most one a chunk
    # The inputs are the largest tensors there are, but for the decays of one block, whose size does not grow.
    assert largest_long <= max(2048 * 8 * 16, largest)


def test_time_steps():
    raw = torch.tensor([[-30.0, 0.0, 1.0, 60.0]], dtype=torch.bfloat16)
    bias = torch.tensor([0.5, -0.5, 0.25, 1.0])
    steps = time_steps(raw, bias)
    wanted = torch.nn.functional.softplus(raw.double() + bias.double())
    assert steps.dtype == torch.float32
    torch.testing.assert_close(steps.double(), wanted, rtol=1e-6, atol=0)
    torch.testing.assert_close(time_steps(raw, bias, 0.1, 2.0).double(), wanted.clamp(0.1, 2.0), rtol=1e-6, atol=0)
    assert float(time_steps(raw, None)[0, 1]) == pytest.approx(0.6931472)
