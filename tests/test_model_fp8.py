"""A model whose blocks multiply in FP8 for inference, emulated here."""

import pytest
import torch

from engine_toys import engine
from intarsia.arch import Architecture, Attention, FeedForward, Mamba2
from intarsia.base.errors import IntarsiaError
from intarsia.engine import Request
from intarsia.formats import load, save
from intarsia.model import Decoder, Fp8Linear, initialise, pack_weights, weight_bytes, weights_in_fp8
from intarsia.ops.fp8 import FORWARD, product_of_rows, quantise_rows

ARCH = Architecture(
    blocks=(Mamba2(4, 16, 16, 2), FeedForward(64, "relu2", gated=False), Attention(4, 2, 16, out_bias=True)),
    hidden_size=48, vocab_size=97, max_positions=200, rope=None,
)  # fmt: skip


def model_of(dtype=torch.float32) -> Decoder:
    return initialise(Decoder(ARCH, dtype), std=0.2).eval().requires_grad_(False)


def test_products_by_rows_are_those_of_the_numbers_they_stand_for():
    a, b = torch.randn(7, 48) * torch.logspace(-3, 3, 7)[:, None], torch.randn(32, 48)
    x, w = quantise_rows(a), quantise_rows(b)
    assert x.data.dtype == FORWARD and x.scale.shape == (7, 1)
    exact = x.restored().double() @ w.restored().double().T
    got = product_of_rows(x, w, torch.float32)
    assert (got - exact).norm() / exact.norm() < 1e-6
    for row in range(7):  # small rows are as exact as large ones
        assert (x.restored()[row] - a[row]).norm() / a[row].norm() < 0.04


def test_a_row_of_zeros_and_one_that_is_no_number():
    x = torch.randn(3, 16)
    x[0], x[2, 3] = 0, torch.nan
    y = product_of_rows(quantise_rows(x), quantise_rows(torch.randn(16, 16)), torch.float32)
    assert y[0].eq(0).all() and y[1].isfinite().all() and y[2].isnan().all()


def test_the_model_is_the_one_its_weights_stand_for():
    low, plain = weights_in_fp8(model_of()), model_of()
    turned = {name: m for name, m in low.named_modules() if isinstance(m, Fp8Linear)}
    assert {name.rpartition(".")[2] for name in turned} >= {"out_proj", "up", "down", "q", "k", "v", "o"}
    ids = torch.randint(0, 97, (2, 40))
    exact, got = plain(ids), low(ids)
    assert 0.001 < (got - exact).norm() / exact.norm() < 0.1
    name, layer = next(iter(turned.items()))
    weight = plain.get_submodule(name).weight
    assert (layer.weight - weight).norm() / weight.norm() < 0.03
    assert weight_bytes(low) < 0.7 * weight_bytes(plain)


def test_a_sequence_does_not_depend_on_its_neighbours():
    low = weights_in_fp8(model_of())
    ids = torch.randint(0, 97, (1, 30))
    other = torch.cat([ids, torch.randint(0, 97, (1, 30))])
    torch.testing.assert_close(low(ids)[0], low(other)[0], rtol=1e-5, atol=1e-5)


def test_it_loads_generates_and_is_refused_twice(tmp_path):
    save(model_of(torch.bfloat16), tmp_path / "tiny")
    low, _ = load(tmp_path / "tiny", weights="fp8")
    answers = engine(low).generate([Request((5, 6, 7), 8), Request((9,), 8)])
    assert [len(h.answers[0].tokens) for h in answers] == [8, 8]
    for change in (weights_in_fp8, lambda model: weights_in_fp8(pack_weights(model_of(torch.bfloat16), "bf16"))):
        with pytest.raises(IntarsiaError, match="can be turned to FP8"):
            change(low)
