"""The optimiser against torch's own, its masters, its state; the schedule; float32 products of bfloat16 operands."""

import math

import pytest
import torch
from torch import nn

from intarsia.ops.precise import exact_products
from intarsia.train.optimizer import MasterAdamW, cosine


def parameters(dtype=torch.float32, seed=0):
    generator = torch.Generator().manual_seed(seed)
    shapes = {"a.weight": (5, 7), "b.a.weight": (7, 3), "norm.weight": (7,), "never.weight": (2, 2)}
    return {n: nn.Parameter(torch.randn(s, generator=generator).to(dtype)) for n, s in shapes.items()}


def give_gradients(named, step, scale=1.0):
    generator = torch.Generator().manual_seed(100 + step)
    for name, p in named.items():
        if name != "never.weight":
            p.grad = (scale * torch.randn(p.shape, generator=generator)).to(p.dtype)


@pytest.mark.parametrize("decay", [0.0, 0.1])
@pytest.mark.parametrize("clip", [0.0, 0.5])
@pytest.mark.parametrize("shares", [{}, {"a.weight": 0.25, "norm.weight": 0.5}], ids=["one rate", "shares"])
def test_float32_is_torchs_adamw(decay, clip, shares):
    ours, theirs = parameters(), parameters()
    optimizer = MasterAdamW(ours.items(), betas=(0.9, 0.95), weight_decay=decay, shares=shares)
    groups = [{"params": [p], "weight_decay": decay if p.dim() >= 2 else 0.0, "share": shares.get(name, 1.0)}
              for name, p in theirs.items()]  # fmt: skip
    reference = torch.optim.AdamW(groups, betas=(0.9, 0.95))
    for step in range(6):
        give_gradients(ours, step), give_gradients(theirs, step)
        expected_norm = math.sqrt(sum(float(p.grad.square().sum()) for p in theirs.values() if p.grad is not None))
        if clip:
            torch.nn.utils.clip_grad_norm_(theirs.values(), clip)
        for group in reference.param_groups:
            group["lr"] = cosine(step, 6, 1e-2) * group["share"]
        reference.step()
        norm = optimizer.step(cosine(step, 6, 1e-2), clip)
        assert norm == pytest.approx(expected_norm if clip else 0.0, rel=1e-5)
        assert all(p.grad is None for p in ours.values())
    assert optimizer.steps == 6
    for name, p in ours.items():
        torch.testing.assert_close(p, theirs[name], rtol=1e-5, atol=1e-6)
    assert torch.equal(ours["never.weight"], parameters()["never.weight"])
    assert not torch.allclose(ours["a.weight"], parameters()["a.weight"], atol=1e-2 * shares.get("a.weight", 1.0))


def test_bfloat16_masters_keep_updates_too_small_to_see():
    """An update of 1e-4 at a weight of 1 is lost in bfloat16; a hundred of them are not."""
    p = nn.Parameter(torch.ones(4, 4, dtype=torch.bfloat16))
    optimizer = MasterAdamW([("p", p)])
    seen = []
    for _ in range(100):
        p.grad = torch.ones_like(p)
        optimizer.step(1e-4)
        seen.append(float(p.detach()[0, 0]))
    assert seen[0] == 1.0  # one alone is lost
    assert optimizer.masters["p"][0, 0].item() == pytest.approx(0.99, abs=1e-4)
    assert seen[-1] == pytest.approx(0.99, abs=0.004)  # together they are not
    assert p.dtype == torch.bfloat16


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def test_a_saved_state_continues_to_the_same_bits(tmp_path, dtype):
    whole, cut = parameters(dtype), parameters(dtype)
    straight, first = MasterAdamW(whole.items(), weight_decay=0.1), MasterAdamW(cut.items(), weight_decay=0.1)
    for step in range(3):
        give_gradients(whole, step), give_gradients(cut, step)
        straight.step(1e-2, 1.0), first.step(1e-2, 1.0)
    first.save(tmp_path / "state.safetensors")
    resumed_parameters = parameters(dtype, seed=9)  # what stands in them must not matter
    resumed = MasterAdamW(resumed_parameters.items(), weight_decay=0.1)
    resumed.load(tmp_path / "state.safetensors")
    assert resumed.steps == 3
    for name, p in cut.items():
        assert torch.equal(p, resumed_parameters[name])
    for step in range(3, 6):
        give_gradients(whole, step), give_gradients(resumed_parameters, step)
        straight.step(1e-2, 1.0), resumed.step(1e-2, 1.0)
    for name, p in whole.items():
        assert torch.equal(p, resumed_parameters[name]), name
        assert torch.equal(straight.masters[name], resumed.masters[name]), name


def test_gradients_of_several_passes_are_added_in_float32():
    """A thousand gradients of 2^-10 next to one of 1 would vanish in bfloat16."""
    p = nn.Parameter(torch.zeros(2, 2, dtype=torch.bfloat16))
    optimizer = MasterAdamW([("p", p)])
    for size in [1.0] + [2.0**-10] * 1024:
        p.grad = torch.full_like(p, size)
        optimizer.collect()
        assert p.grad is None
    assert torch.equal(optimizer.masters["p"].grad, torch.full((2, 2), 2.0))
    assert optimizer.norm() == pytest.approx(4.0)
    optimizer.skip()
    assert optimizer.masters["p"].grad is None and optimizer.steps == 1 and not p.any()


def test_a_float32_parameter_is_its_own_master():
    p = nn.Parameter(torch.ones(3, 3))
    optimizer = MasterAdamW([("p", p)])
    assert optimizer.masters["p"].data_ptr() == p.data_ptr()
    p.grad = torch.ones_like(p)
    optimizer.step(1e-2)
    assert torch.allclose(p, torch.tensor(0.99))


@pytest.mark.parametrize("clip", [0.0, 1.0])
@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_gradient_that_is_no_number_leaves_the_weights_alone(bad, clip):
    named = parameters()
    optimizer = MasterAdamW(named.items(), weight_decay=0.1)
    give_gradients(named, 0)
    optimizer.step(1e-2, clip)
    before = {n: p.detach().clone() for n, p in named.items()}
    give_gradients(named, 1)
    named["a.weight"].grad[0, 0] = bad
    optimizer.step(1e-2, clip)
    assert torch.equal(named["a.weight"], before["a.weight"])
    if clip:  # one norm for all: the whole step is left out
        assert torch.equal(named["b.a.weight"], before["b.a.weight"])
    else:  # nothing ties them: the others learn on
        assert not torch.equal(named["b.a.weight"], before["b.a.weight"])
    assert optimizer.steps == 2  # the schedule goes on
    give_gradients(named, 2)
    optimizer.step(1e-2, clip)
    assert all(p.isfinite().all() for p in named.values())
    assert not torch.equal(named["a.weight"], before["a.weight"])


def test_cosine_values():
    peak, steps = 2.0, 100
    rates = [cosine(s, steps, peak, warmup=0.1, floor=0.01) for s in range(steps)]
    assert rates[:10] == pytest.approx([0.2 * (n + 1) for n in range(10)])
    assert rates[10] == pytest.approx(peak)
    assert rates[55] == pytest.approx(peak * (0.01 + 0.99 * 0.5))  # half of the way down
    assert cosine(steps, steps, peak, 0.1) == pytest.approx(peak * 0.01)
    assert cosine(steps + 50, steps, peak, 0.1) == pytest.approx(peak * 0.01)
    assert rates[10:] == sorted(rates[10:], reverse=True) and len(set(rates[10:])) == 90
    assert cosine(0, 1, peak) == pytest.approx(peak)  # the shortest training has one step at the peak


def test_exact_products_set_the_precision_and_put_it_back():
    before = torch.get_float32_matmul_precision()
    with exact_products(torch.bfloat16):
        assert torch.get_float32_matmul_precision() == "medium"
    assert torch.get_float32_matmul_precision() == before
    with exact_products(torch.float32):
        assert torch.get_float32_matmul_precision() == before
    with pytest.raises(ValueError, match="stop"), exact_products(torch.bfloat16):
        raise ValueError("stop")
    assert torch.get_float32_matmul_precision() == before


def test_products_of_bfloat16_operands_stay_exact():
    generator = torch.Generator().manual_seed(0)
    a, b = (torch.randn(64, 256, generator=generator).bfloat16().float() for _ in range(2))
    with exact_products(torch.bfloat16):
        product = a @ b.T
    expected = a.double() @ b.double().T
    assert float((product - expected).abs().max()) < 1e-4
    assert float((product.bfloat16() - expected).abs().max()) > 1e-2  # what rounding the result would cost
