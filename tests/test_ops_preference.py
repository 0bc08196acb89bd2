"""The losses of preferences and of single tokens against their definitions in float64."""

import pytest
import torch

from intarsia.ops.losses import token_nll
from intarsia.ops.preference import dpo_loss, rpo_loss
from intarsia.ops.reference import preference_reference


def test_dpo_and_rpo_match_float64_in_value_and_gradient():
    torch.manual_seed(0)
    margin = torch.cat([20 * torch.randn(40), torch.tensor([0.0, 300.0, -300.0])]).requires_grad_()
    gap = torch.cat([3 * torch.randn(40), torch.tensor([0.0, 2.0, 50.0])])
    for ours, truth in (
        (dpo_loss(margin, 0.3), preference_reference(margin, None, 0.3)),
        (rpo_loss(margin, gap, 0.3, 1.7), preference_reference(margin, gap, 0.3, 1.7)),
    ):
        torch.testing.assert_close(ours.double(), truth, rtol=1e-5, atol=1e-6)
        got, want = (torch.autograd.grad(each.sum(), margin)[0] for each in (ours, truth))
        torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-6)


def test_rpo_is_zero_where_the_margin_is_what_the_rewards_ask_for_and_dpo_where_they_ask_for_all():
    gap = torch.tensor([-2.0, 0.0, 0.5, 3.0])
    assert rpo_loss(gap * 1.5 / 0.1, gap, 0.1, 1.5).abs().max() < 1e-6
    margin = torch.tensor([-3.0, 0.0, 4.0])
    torch.testing.assert_close(rpo_loss(margin, torch.full((3,), 100.0), 0.5, 1.0), dpo_loss(margin, 0.5))


@pytest.mark.parametrize("chunk", [5, 64])
@pytest.mark.parametrize("ignored", [0, 11, 37])
def test_token_nll_matches_float64_with_any_weights(chunk, ignored):
    torch.manual_seed(1)
    hidden, head = torch.randn(37, 12, requires_grad=True), (torch.randn(90, 12) * 0.6).requires_grad_()
    targets, weights = torch.randint(90, (37,)), torch.randn(37)
    targets[:ignored] = -100
    nll = token_nll(hidden, head, targets, chunk)
    truth = -(hidden.double() @ head.double().T).log_softmax(-1)
    truth = truth.gather(-1, targets.clamp(min=0)[:, None]).squeeze(-1) * (targets >= 0)
    torch.testing.assert_close(nll.double(), truth, rtol=1e-5, atol=1e-5)
    got = torch.autograd.grad((weights * nll).sum(), [hidden, head])
    want = torch.autograd.grad((weights * truth).sum(), [hidden, head])
    for ours, theirs in zip(got, want):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)
