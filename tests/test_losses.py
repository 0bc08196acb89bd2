"""The chunked losses against their definitions in float64."""

import pytest
import torch
import torch.nn.functional as F

from intarsia.base.errors import IntarsiaError
from intarsia.ops.losses import (
    cosine_loss,
    cross_entropy,
    kl_and_agreement,
    kl_divergence,
    nll_and_hits,
    normalised_mse,
)
from intarsia.ops.reference import kl_reference as kl_of_logits

N, D, V = 37, 24, 501


@pytest.fixture
def case():
    torch.manual_seed(0)
    parent, child = torch.randn(N, D), torch.randn(N, D)
    return parent, child, torch.randn(V, D) * 0.6, torch.randn(V, D) * 0.6, torch.randint(V, (N,))




def kl_reference(parent, child, parent_head, child_head):
    return kl_of_logits(parent.double() @ parent_head.double().T, child.double() @ child_head.double().T)


@pytest.mark.parametrize("chunk", [1, 8, 37, 64])
def test_kl_matches_float64_in_value_and_gradient(case, chunk):
    parent, child, parent_head, child_head, _ = case
    child, child_head = child.requires_grad_(), child_head.requires_grad_()
    ours = kl_divergence(parent, child, parent_head, child_head, chunk=chunk)
    grads = torch.autograd.grad(3 * ours, [child, child_head])
    truth = kl_reference(parent, child, parent_head, child_head).mean()
    expected = torch.autograd.grad(3 * truth, [child, child_head])
    torch.testing.assert_close(ours.double(), truth, rtol=1e-5, atol=1e-6)
    for got, want in zip(grads, expected):
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-6)


def test_kl_by_token_weighs_each_row_of_the_gradient(case):
    parent, child, parent_head, child_head, _ = case
    child.requires_grad_()
    weights = torch.rand(N)
    rows = kl_divergence(parent, child, parent_head, child_head, reduction="none", chunk=8)
    truth = kl_reference(parent, child, parent_head, child_head)
    torch.testing.assert_close(rows.double(), truth, rtol=1e-5, atol=1e-5)
    got = torch.autograd.grad((rows * weights).sum(), child)[0]
    want = torch.autograd.grad((truth * weights).sum(), child)[0]
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)


def test_kl_of_a_model_with_itself_is_zero_also_with_a_large_common_offset(case):
    parent, _, head, _, _ = case
    assert kl_divergence(parent, parent, head, head) == 0
    extra = torch.cat([parent, torch.full((N, 1), 30.0)], 1)
    column = torch.cat([head, torch.ones(V, 1)], 1)
    moved = kl_divergence(torch.cat([parent, torch.zeros(N, 1)], 1), extra, column, column)
    assert abs(moved.item()) < 2e-5


def test_kl_keeps_the_leading_shape_and_agreement_is_argmax_equality(case):
    parent, child, parent_head, _, _ = case
    near = parent + 0.3 * child
    kl, same = kl_and_agreement(parent[:36].view(4, 9, D), near[:36].view(4, 9, D), parent_head, parent_head, chunk=5)
    assert kl.shape == same.shape == (4, 9)
    truth = (parent[:36] @ parent_head.T).argmax(-1) == (near[:36] @ parent_head.T).argmax(-1)
    assert 0 < truth.sum() < 36
    assert torch.equal(same.flatten(), truth)
    expected = kl_reference(parent, near, parent_head, parent_head)[:36]
    torch.testing.assert_close(kl.flatten().double(), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("chunk", [7, 64])
def test_cross_entropy_matches_torch_in_value_and_gradient(case, chunk):
    _, hidden, _, head, targets = case
    hidden, head = hidden.requires_grad_(), head.requires_grad_()
    ours = cross_entropy(hidden, head, targets, chunk=chunk)
    grads = torch.autograd.grad(ours, [hidden, head])
    truth = F.cross_entropy(hidden.double() @ head.double().T, targets)
    torch.testing.assert_close(ours.double(), truth, rtol=1e-6, atol=1e-6)
    for got, want in zip(grads, torch.autograd.grad(truth, [hidden, head])):
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-6)


def test_nll_and_hits(case):
    _, hidden, _, head, targets = case
    logits = hidden.double() @ head.double().T
    targets = torch.where(torch.arange(N) % 2 == 0, logits.argmax(-1), targets)
    nll, hits = nll_and_hits(hidden, head, targets, chunk=10)
    torch.testing.assert_close(nll.double(), F.cross_entropy(logits, targets, reduction="none"), rtol=1e-5, atol=1e-5)
    assert torch.equal(hits, logits.argmax(-1) == targets)


def test_bfloat16_heads_come_close_and_keep_their_dtypes(case):
    parent, child, parent_head, child_head, _ = case
    child, weight = child.bfloat16().requires_grad_(), child_head.bfloat16().requires_grad_()
    loss = kl_divergence(parent.bfloat16(), child, parent_head.bfloat16(), weight)
    loss.backward()
    assert loss.dtype == torch.float32
    assert child.grad.dtype == weight.grad.dtype == torch.bfloat16
    truth = kl_reference(parent.bfloat16(), child.detach(), parent_head.bfloat16(), weight.detach()).mean().item()
    assert loss.item() == pytest.approx(truth, rel=0.02)


def test_memory_of_the_logits_does_not_grow_with_the_tokens(case):
    """The graph keeps gradients of the size of the hidden states, nothing of size N x V."""
    parent, child, parent_head, child_head, _ = case
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        loss = kl_divergence(parent, child.requires_grad_(), parent_head, child_head)
    sizes = [t.numel() for t in kept] + [t.numel() for t in loss.grad_fn.kept if t is not None]
    assert max(sizes) <= N * D


def test_block_losses():
    torch.manual_seed(1)
    parent = torch.randn(2, 5, 8, dtype=torch.bfloat16)
    assert normalised_mse(torch.zeros_like(parent), parent) == 1
    assert normalised_mse(parent, parent) == 0
    assert normalised_mse(parent * 1.5, parent).item() == pytest.approx(0.25, rel=1e-2)
    assert cosine_loss(parent * 3, parent).item() == pytest.approx(0, abs=1e-5)
    assert cosine_loss(-parent, parent).item() == pytest.approx(2, abs=1e-5)


def test_impossible_reductions_are_sentences(case):
    parent, child, parent_head, child_head, _ = case
    with pytest.raises(IntarsiaError, match="mean, none"):
        kl_divergence(parent, child, parent_head, child_head, reduction="sum")
    with pytest.raises(IntarsiaError, match="detach"):
        kl_divergence(parent, child, parent_head, child_head.requires_grad_(), reduction="none")
