"""Learning by forward passes alone: the slope is the gradient's, it learns, it resumes, it keeps nothing."""

import copy

import pytest
import torch
from torch import nn

from intarsia.train.forward_only import ForwardOnly, _add


def blocks(dtype=torch.float32):
    torch.manual_seed(0)
    return nn.ModuleList([nn.Linear(6, 6), nn.Linear(6, 6)]).to(dtype)


X, Y = (torch.randn(32, 6, generator=torch.Generator().manual_seed(n)) for n in (1, 2))


def loss_of(model):
    x = X.to(next(model.parameters()).dtype)
    for block in model:
        x = x + block(x).tanh()
    return (x.float() - Y).square().mean()


def direction(learner):
    found = []
    for index, block in enumerate(learner.blocks):
        generator = learner._generator(index)
        found += [torch.randn(p.shape, generator=generator) for p in block.parameters()]
    return found


def test_the_slope_is_that_of_the_gradient_along_the_direction():
    model = blocks()
    learner = ForwardOnly(model, reach=1e-2)
    gradients = torch.autograd.grad(loss_of(model), list(model.parameters()))
    wanted = sum((g * z).sum() for g, z in zip(gradients, direction(learner), strict=True))
    before, moved = copy.deepcopy(model), direction(learner)
    mean, slope = learner.step(lambda: loss_of(model).item(), 0.01)
    assert slope == pytest.approx(float(wanted), rel=2e-2)
    assert mean == pytest.approx(float(loss_of(before).detach()), rel=1e-2)
    for old, new, z in zip(before.parameters(), model.parameters(), moved, strict=True):
        torch.testing.assert_close(new, old - 0.01 * slope * z)


@pytest.mark.parametrize("dtype, lr", [(torch.float32, 0.02), (torch.bfloat16, 0.02)])
def test_the_loss_falls(dtype, lr):
    model = blocks(dtype)
    learner, before = ForwardOnly(model, reach=1e-3 if dtype == torch.float32 else 2e-2), float(loss_of(model))
    for _ in range(300):
        learner.step(lambda: loss_of(model).item(), lr, clip=5.0)
    assert float(loss_of(model)) < 0.75 * before


def test_moves_smaller_than_the_last_bit_add_up():
    weight = torch.ones(20_000, dtype=torch.bfloat16)
    generator = torch.Generator().manual_seed(0)
    for _ in range(40):
        _add(weight, torch.full((20_000,), 2e-4), generator)  # the last bit of 1 is 2^-7
    assert float(weight.float().mean()) == pytest.approx(1.008, abs=5e-4)


def test_weights_are_put_back_even_where_the_loss_fails():
    model = blocks()
    before = copy.deepcopy(model)

    def failing():
        loss_of(model)
        raise RuntimeError("no loss")

    with pytest.raises(RuntimeError):
        ForwardOnly(model).step(failing, 1.0)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), before.parameters()))
    assert not any(block._forward_hooks or block._forward_pre_hooks for block in model)


def test_a_block_that_fails_is_put_back_too():
    model = nn.ModuleList([nn.Linear(6, 6), nn.Linear(6, 6)])
    before, learner = copy.deepcopy(model), ForwardOnly(model)
    with pytest.raises(RuntimeError, match="shapes"):
        learner.step(lambda: model[0](torch.ones(2, 5)).sum().item(), 1.0)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), before.parameters()))


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_what_is_no_number_moves_nothing(value):
    model = blocks()
    before, values = copy.deepcopy(model), iter([value, 1.0])
    learner = ForwardOnly(model)
    learner.step(lambda: next(values), 1.0)
    assert learner.steps == 1 and all(torch.equal(a, b) for a, b in zip(model.parameters(), before.parameters()))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_it_resumes_to_the_same_bits(tmp_path, dtype):
    straight, killed = blocks(dtype), blocks(dtype)

    def run(model, learner, count):
        for _ in range(count):
            learner.step(lambda: loss_of(model).item(), 0.02)

    run(straight, ForwardOnly(straight), 7)
    first = ForwardOnly(killed)
    run(killed, first, 4)
    first.save(tmp_path / "state")
    run(killed, first, 2)  # lost
    again = ForwardOnly(killed)
    again.load(tmp_path / "state")
    assert again.steps == 4
    run(killed, again, 3)
    assert all(torch.equal(a, b) for a, b in zip(straight.parameters(), killed.parameters(), strict=True))
