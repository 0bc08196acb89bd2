"""The gated norm against its definition in float64."""

import pytest
import torch

from intarsia.ops import gated_norm as room
from intarsia.ops.gated_norm import gated_norm
from intarsia.ops.reference import gated_norm_reference

TOLERANCE = {torch.float32: 1e-6, torch.bfloat16: 5e-3, torch.float64: 1e-13}


@pytest.fixture(autouse=True)
def torch_backend(monkeypatch):
    monkeypatch.setenv("INTARSIA_OPS", "torch")


def results(op, inputs, groups):
    inputs = [t.detach().requires_grad_() for t in inputs]
    out = op(*inputs, groups, 1e-5)
    outgoing = torch.randn(out.shape, generator=torch.Generator().manual_seed(9)).to(inputs[0].dtype)
    return [out.detach(), *torch.autograd.grad(out, inputs, outgoing.to(out.dtype))]


def draw(rows, dtype=torch.float32, scale=1.0):
    generator = torch.Generator().manual_seed(rows)
    return [(scale * torch.randn(*shape, generator=generator)).to(dtype) for shape in ((2, rows, 24),) * 2 + ((24,),)]


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("groups", [1, 3, 8])
@pytest.mark.parametrize("rows", [1, 50])
def test_values_and_gradients_equal_the_definition(rows, groups, dtype, monkeypatch):
    monkeypatch.setattr(room, "_pieces", lambda y: [slice(i, i + 7) for i in range(0, y.shape[0], 7)])
    inputs = draw(rows, dtype)
    ours = results(gated_norm, inputs, groups)
    assert all(a.dtype == dtype for a in ours)
    for a, b in zip(ours, results(gated_norm_reference, [t.double() for t in inputs], groups)):
        assert float((a.double() - b).norm() / b.norm()) < TOLERANCE[dtype]


def test_pieces_cover_every_row_once():
    for rows in (1, 65535, 65537):
        y = torch.empty(rows, 1)
        assert [i for part in room._pieces(y) for i in range(rows)[part]] == list(range(rows))


@pytest.mark.parametrize("scale", [1e-12, 1e6])
def test_extreme_sizes(scale):
    inputs = draw(5, scale=scale)
    ours, truth = gated_norm(*inputs, 3, 1e-5), gated_norm_reference(*inputs, 3, 1e-5)
    torch.testing.assert_close(ours.double(), truth, rtol=1e-5, atol=0)


def test_zeros_have_gradients():
    y, z, weight = (torch.zeros(1, 2, 24).requires_grad_(), torch.ones(1, 2, 24).requires_grad_(), torch.ones(24))
    gated_norm(y, z, weight, 2, 1e-5).sum().backward()
    assert y.grad.isfinite().all() and y.grad.any() and z.grad.isfinite().all()


def test_gradients_by_finite_differences():
    inputs = [t.requires_grad_() for t in draw(2, torch.float64)]
    assert torch.autograd.gradcheck(lambda *t: gated_norm(*t, 3, 1e-5), inputs)


def test_only_the_inputs_are_kept():
    inputs, kept = [t.requires_grad_() for t in draw(50)], []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: (kept.append(t.data_ptr()), t)[1], lambda t: t):
        gated_norm(*inputs, 3, 1e-5)
    assert set(kept) <= {t.data_ptr() for t in inputs}
