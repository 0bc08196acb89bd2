"""Rotary positions: the rotation against complex numbers in float64, every scaling against transformers."""

import math

import pytest
import torch

from intarsia.arch import Rope
from intarsia.base.errors import IntarsiaError
from intarsia.ops.rope import frequencies, rotate, tables

SCALINGS = {
    "default": None,
    "linear": {"rope_type": "linear", "factor": 4.0},
    "llama3": {
        "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
        "original_max_position_embeddings": 64,
    },
    "yarn": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64},
    "yarn with mscale": {
        "rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64, "mscale": 0.7,
        "mscale_all_dim": 1.0, "beta_fast": 16.0, "truncate": False,
    },
    "longrope": {
        "rope_type": "longrope", "short_factor": [1.0 + i for i in range(8)],
        "long_factor": [1.0 + i for i in range(8)], "attention_factor": 1.0,
        "original_max_position_embeddings": 256, "factor": 1.0,
    },
}


@pytest.mark.parametrize("start", [0, 5])
def test_rotation_is_a_complex_product(start):
    x = torch.randn(2, 3, 6, 16, generator=torch.Generator().manual_seed(0))
    cos, sin = tables(Rope(10_000.0), 16, 2048, start, 6)
    inverse = 10_000.0 ** -(torch.arange(0, 16, 2, dtype=torch.float64) / 16)
    angles = torch.outer(torch.arange(start, start + 6, dtype=torch.float64), inverse)
    turned = torch.complex(x[..., :8].double(), x[..., 8:].double()) * torch.polar(torch.ones_like(angles), angles)
    wanted = torch.cat([turned.real, turned.imag], -1)
    torch.testing.assert_close(rotate(x, cos, sin).double(), wanted, atol=2e-6, rtol=0)


def test_only_differences_of_positions_matter():
    q, k = torch.randn(2, 1, 1, 1, 16, generator=torch.Generator().manual_seed(1))

    def score(i, j):
        return float((rotate(q, *tables(Rope(), 16, 99, i, 1)) * rotate(k, *tables(Rope(), 16, 99, j, 1))).sum())

    assert score(7, 3) == pytest.approx(score(54, 50), abs=1e-5)
    assert score(7, 3) != pytest.approx(score(7, 4), abs=1e-3)


@pytest.mark.parametrize("name", SCALINGS)
def test_frequencies_equal_those_of_transformers(name):
    from transformers import LlamaConfig
    from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

    scaling = SCALINGS[name]
    fields = {} if scaling is None else {"rope_scaling": dict(scaling)}
    config = LlamaConfig(
        hidden_size=64, num_attention_heads=4, head_dim=16, max_position_embeddings=256, rope_theta=50_000.0, **fields
    )
    theirs = LlamaRotaryEmbedding(config)
    inverse, factor = frequencies(Rope(50_000.0, scaling), 16, 256)
    torch.testing.assert_close(inverse, theirs.inv_freq, atol=0, rtol=1e-6)
    assert factor == pytest.approx(theirs.attention_scaling)
    if name != "default":  # the scaling must do something for this test to mean anything
        plain, _ = frequencies(Rope(50_000.0), 16, 256)
        assert not math.isclose(float((inverse - plain).abs().max()), 0)


def test_unknown_scaling_is_a_sentence():
    with pytest.raises(IntarsiaError, match="'ntk' is not known"):
        frequencies(Rope(1e4, {"rope_type": "ntk"}), 16, 99)
    with pytest.raises(IntarsiaError, match="longrope"):
        frequencies(Rope(1e4, {**SCALINGS["longrope"], "long_factor": [2.0] * 8}), 16, 99)
