"""Rows of logits, their figures and gradients, against float64: in torch, and natively on every level."""

import pytest
import torch
import torch.nn.functional as F

from intarsia.ops import logits as room
from intarsia.ops.native import logits as native
from intarsia.ops.reference import kl_reference
from native_levels import BOUND, distance, level  # noqa: F401

KL = pytest.mark.parametrize("kl_rows", [native.kl_rows, room.kl_rows_torch], ids=["native", "torch"])
NLL = pytest.mark.parametrize("nll_rows", [native.nll_rows, room.nll_rows_torch], ids=["native", "torch"])
SIZES = pytest.mark.parametrize("rows, size", [(1, 1), (1, 16), (5, 501), (300, 130)])
TYPES = pytest.mark.parametrize("dtype", list(BOUND))


@pytest.fixture(autouse=True)
def seeded(level):  # noqa: F811
    torch.manual_seed(0)


@KL
@SIZES
@TYPES
def test_kl(rows, size, dtype, kl_rows):
    p = (3 * torch.randn(rows, size)).to(dtype)
    q = (p.float() + torch.randn(rows, size)).to(dtype)
    exact = q.double().requires_grad_()
    wanted = kl_reference(p, exact)
    gradient = torch.autograd.grad(wanted.sum(), exact)[0]
    same = p.argmax(-1) == q.argmax(-1)
    nats, _, none = kl_rows(p.clone(), q.clone(), False)
    assert none is None
    torch.testing.assert_close(nats.double(), wanted.detach(), rtol=2e-5, atol=2e-6)
    nats, found, dq = kl_rows(p.clone(), q.clone(), True)
    torch.testing.assert_close(nats.double(), wanted.detach(), rtol=2e-5, atol=2e-6)
    assert dq.dtype == dtype and distance(dq, gradient) < BOUND[dtype]
    ties = (p == p.amax(-1, keepdim=True)).sum(-1) + (q == q.amax(-1, keepdim=True)).sum(-1) > 2
    assert torch.equal(found[~ties], same[~ties]) and (found >= same).all()


@NLL
@SIZES
@TYPES
def test_nll(rows, size, dtype, nll_rows):
    logits = (3 * torch.randn(rows, size)).to(dtype)
    targets = torch.where(torch.arange(rows) % 2 == 0, logits.argmax(-1), torch.randint(size, (rows,)))
    exact = logits.double().requires_grad_()
    wanted = F.cross_entropy(exact, targets, reduction="none")
    gradient = torch.autograd.grad(wanted.sum(), exact)[0]
    nats, hits, none = nll_rows(logits.clone(), targets, False)
    assert none is None and torch.equal(hits, logits.gather(-1, targets[:, None])[:, 0] == logits.amax(-1))
    torch.testing.assert_close(nats.double(), wanted.detach(), rtol=2e-5, atol=2e-6)
    _, _, gradients = nll_rows(logits.clone(), targets, True)
    assert gradients.dtype == dtype and distance(gradients, gradient) < BOUND[dtype]


@KL
def test_a_row_with_itself_and_with_itself_moved(kl_rows):
    p = torch.randn(4, 777)
    assert torch.equal(kl_rows(p.clone(), p.clone(), False)[0], torch.zeros(4))
    assert float(kl_rows(p.clone(), p + 30, False)[0].abs().max()) < 2e-5


@KL
def test_logits_far_apart_stay_finite(kl_rows):
    p, q = torch.zeros(1, 40), torch.zeros(1, 40)
    p[0, 3], q[0, 7] = 1e4, 1e4
    nats, same, dq = kl_rows(p, q, True)
    assert nats.item() == pytest.approx(1e4) and not same.item()
    assert dq[0, 3] == -1 and dq[0, 7] == 1


@KL
@NLL
def test_a_nan_is_not_hidden(kl_rows, nll_rows):
    bad = torch.randn(1, 40)
    bad[0, 20] = torch.nan
    assert kl_rows(torch.randn(1, 40), bad.clone(), False)[0].isnan().all()
    assert kl_rows(bad.clone(), torch.randn(1, 40), False)[0].isnan().all()
    assert nll_rows(bad.clone(), torch.tensor([0]), False)[0].isnan().all()
