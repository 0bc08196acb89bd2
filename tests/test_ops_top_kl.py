"""KL to the largest logits and the mass of all others, against its definition in float64."""

import pytest
import torch

from intarsia.ops.losses import kl_divergence
from intarsia.ops.reference import kl_reference, top_kl_reference
from intarsia.ops.top_kl import TopLogits, top_kl, top_kl_rows, top_logits

N, D, V = 23, 16, 301


@pytest.fixture
def case():
    torch.manual_seed(0)
    return torch.randn(N, D), torch.randn(N, D), torch.randn(V, D) * 0.6, torch.randn(V, D) * 0.6


def logits(hidden, head):
    return hidden.double() @ head.double().T


@pytest.mark.parametrize("k", [1, 8, 64, 300])
@pytest.mark.parametrize("chunk", [1, 8, 128])
def test_it_is_the_reference_in_value_and_gradient(case, k, chunk):
    parent, child, parent_head, child_head = case
    child, child_head = child.requires_grad_(), child_head.requires_grad_()
    ours = top_kl(top_logits(parent, parent_head, k, chunk), child, child_head, chunk)
    exact = top_kl_reference(logits(parent, parent_head), logits(child, child_head), k).mean()
    assert float(ours) == pytest.approx(float(exact), rel=2e-3)  # gaps are stored in float16
    for a, b in zip(*(torch.autograd.grad(3 * x, [child, child_head], retain_graph=True) for x in (ours, exact))):
        assert (a - b).norm() < 3e-3 * b.norm()


def test_the_gradient_is_exact_where_the_gaps_are(case):
    """With gaps that float16 holds, nothing is lost."""
    _, child, _, child_head = case
    steps = -torch.stack([torch.randperm(V) for _ in range(N)]).double() / 64
    ids = steps.topk(9).indices
    tail = steps.softmax(-1).scatter(-1, ids, 0).sum(-1)
    kept = TopLogits(steps.gather(-1, ids).half(), ids.int(), tail.float())
    q = logits(child, child_head).float().requires_grad_()
    nats, gradient = top_kl_rows(kept, q.detach(), gradient=True)
    exact = top_kl_reference(steps, q, 9)
    torch.testing.assert_close(nats, exact.float(), atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(gradient, torch.autograd.grad(exact.sum(), q)[0], atol=1e-6, rtol=1e-4)


def test_it_is_never_above_the_full_kl_and_is_it_with_all_logits(case):
    parent, child, parent_head, child_head = case
    full = float(kl_reference(logits(parent, parent_head), logits(child, child_head)).mean())
    found = [float(top_kl(top_logits(parent, parent_head, k), child, child_head)) for k in (1, 4, 16, 64, V)]
    assert found == sorted(found) and all(value < full * (1 + 1e-3) for value in found)
    assert found[0] < 0.9 * full and found[-1] == pytest.approx(full, rel=1e-3)
    assert found[-1] == pytest.approx(float(kl_divergence(parent, child, parent_head, child_head)), rel=1e-3)
    assert float(top_kl(top_logits(parent, parent_head, 16), parent, parent_head)) == pytest.approx(0, abs=1e-4)


def test_what_is_kept(case):
    parent, _, parent_head, _ = case
    kept = top_logits(parent.view(1, N, D), parent_head, 5)
    assert kept.gaps.shape == kept.ids.shape == (1, N, 5) and kept.tail.shape == (1, N)
    assert (kept.gaps.dtype, kept.ids.dtype, kept.tail.dtype) == (torch.float16, torch.int32, torch.float32)
    exact = logits(parent, parent_head)
    assert torch.equal(kept.ids[0].long(), exact.topk(5).indices) and not kept.gaps[..., 0].any()
    rest = exact.softmax(-1).scatter(-1, kept.ids[0].long(), 0).sum(-1)
    torch.testing.assert_close(kept.tail[0], rest.float(), atol=1e-6, rtol=1e-4)
    assert not top_logits(parent, parent_head, V).tail.any()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_far_tokens_are_no_numbers_that_spread(dtype):
    """A student that is sure of one token, a gap beyond float16, a tail of nothing."""
    q = torch.full((3, 8), -200.0, dtype=dtype)
    q[:, 0] = 200.0
    gaps = torch.tensor([[0.0, -torch.inf], [0.0, -1.0], [0.0, -30.0]]).half()
    kept = TopLogits(gaps, torch.tensor([[0, 1], [2, 3], [0, 1]]).int(), torch.tensor([0.0, 0.2, 1e-30]))
    nats, gradient = top_kl_rows(kept, q, gradient=True)
    assert nats.isfinite().all() and gradient.isfinite().all() and nats[1] > 100 > 1e-3 > abs(nats[0])
