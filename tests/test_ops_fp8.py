"""FP8 products: casts bit for bit, formulas of TransformerEngine and torchao, gradients against float64."""

import pytest
import torch

from intarsia.ops.fp8 import FORWARD, GRADIENT, Scaled, linear_fp8, product, quantise, widened


def values(dtype):
    """Every finite number of an FP8 format, in order."""
    found = torch.arange(256, dtype=torch.uint8).view(dtype).double()
    return found[found.isfinite()].unique()


def nearest(x, dtype):
    """Round to nearest, ties to the even code, by looking through all the numbers there are."""
    known = values(dtype)
    apart = (x.double()[:, None] - known).abs()
    best = apart.min(1, keepdim=True).values
    even = known.to(dtype).view(torch.uint8) % 2 == 0
    return known[torch.where(apart == best, 2 + even.long(), 0).argmax(1)]


@pytest.mark.parametrize(("dtype", "most"), [(FORWARD, 448.0), (GRADIENT, 57344.0)], ids=["e4m3", "e5m2"])
@pytest.mark.parametrize("kind", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def test_a_cast_is_the_nearest_number_bit_for_bit(dtype, most, kind):
    generator = torch.Generator().manual_seed(0)
    spread = torch.randn(4000, generator=generator) * torch.logspace(-9, 3, 4000)
    x = torch.cat([spread, torch.tensor([0.0, -0.0, 1.0, -1.0])]).to(kind)
    got = quantise(x, dtype)
    amax = float(x.abs().max())
    assert got.scale.dtype == torch.float32 and float(got.scale) == pytest.approx(most / amax, rel=1e-7)
    assert torch.equal(got.data.double(), nearest((x.float() * got.scale).clamp(-most, most), dtype))
    assert float(got.data.double().abs().max()) == most  # the largest magnitude becomes the largest number
    error = (got.restored() - x.float()).abs()
    large = x.float().abs() > amax * 2.0 ** (-8 if dtype == FORWARD else -20)
    assert float((error / x.float().abs())[large].max()) <= (1 / 16 if dtype == FORWARD else 1 / 8) * 1.001


def test_zeros_have_the_scale_one_and_what_is_no_number_stays_none():
    assert float(quantise(torch.zeros(3), FORWARD).scale) == 1.0
    x, w, _ = operands()
    for bad in (torch.inf, torch.nan):
        broken = x.detach().clone()
        broken[0, 0] = bad
        assert linear_fp8(broken, w).isnan().all()


@pytest.mark.parametrize("dtype", [FORWARD, GRADIENT], ids=["e4m3", "e5m2"])
def test_widening_is_exact_for_every_number(dtype):
    codes = torch.arange(256, dtype=torch.uint8).view(dtype)
    numbers = codes[codes.float().isfinite()]
    assert torch.equal(widened(numbers), numbers.float())


def test_the_smallest_tensors_do_not_overflow_their_scale():
    x = torch.tensor([1e-44, 0.0])
    got = quantise(x, GRADIENT)
    assert got.scale.isfinite() and got.data.float().isfinite().all()


def operands(tokens=32, inputs=48, outputs=64, dtype=torch.float32):
    torch.manual_seed(1)
    x = torch.randn(tokens, inputs).to(dtype).requires_grad_()
    w = (0.1 * torch.randn(outputs, inputs)).to(dtype).requires_grad_()
    return x, w, torch.randn(tokens, outputs).to(dtype)


def truth(x, w, dy):
    """The three products of the numbers after their casts, in float64."""
    x8, w8 = (quantise(t, FORWARD).restored().double() for t in (x, w))
    g8 = quantise(dy, GRADIENT).restored().double()
    return x8 @ w8.T, g8 @ w8, g8.T @ x8


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("tokens", [32, 37])
def test_the_three_products_are_those_of_the_cast_numbers(dtype, tokens):
    x, w, dy = operands(tokens, dtype=dtype)
    y = linear_fp8(x.view(1, tokens, -1), w)[0]
    y.backward(dy)
    assert y.dtype == x.grad.dtype == w.grad.dtype == dtype
    near = {"rtol": 1e-5, "atol": 1e-5} if dtype == torch.float32 else {"rtol": 1e-2, "atol": 1e-2}
    for got, want in zip((y, x.grad, w.grad), truth(x.detach(), w.detach(), dy)):
        torch.testing.assert_close(got.double(), want, **near)
    plain = (x.double() @ w.double().T).detach()
    assert float((y.detach().double() - plain).norm() / plain.norm()) < 0.05  # and FP8 is near what it stands for


def test_scaled_products_and_the_emulation_agree():
    """The call that GPUs run, here through torch's own implementation for processors."""
    x, w, dy = operands()
    x8, w8, g8 = quantise(x, FORWARD), quantise(w, FORWARD), quantise(dy, GRADIENT)
    for a, b in ((x8, w8), (g8, Scaled(w8.data.mT, w8.scale))):
        emulated = product(a, b, torch.float32, emulate=True)
        torch.testing.assert_close(product(a, b, torch.float32, emulate=False), emulated, rtol=1e-5, atol=1e-5)


def test_torchao_computes_the_same():
    pytest.importorskip("torchao", reason="torchao is not installed")
    from torchao.float8 import Float8LinearConfig, convert_to_float8_training

    x, w, dy = operands()
    theirs = torch.nn.Sequential(torch.nn.Linear(48, 64, bias=False))
    theirs[0].weight.data.copy_(w)
    convert_to_float8_training(theirs, config=Float8LinearConfig(emulate=True))
    other = x.detach().clone().requires_grad_()
    theirs(other).backward(dy)
    y = linear_fp8(x, w)
    y.backward(dy)
    pairs = ((y, theirs(other)), (x.grad, other.grad), (w.grad, theirs[0].weight.grad))
    for got, want in pairs:
        torch.testing.assert_close(got, want, rtol=2e-5, atol=2e-5)
