"""Blocks as data: JSON and back, what is impossible, what they cost."""

import json

import pytest

from intarsia.arch import (
    Architecture,
    Attention,
    Experts,
    FeedForward,
    Linear,
    Mamba1,
    Mamba2,
    block_cache_bytes,
    block_flops,
    block_from_dict,
    block_parameters,
    block_to_dict,
    kind,
    pair_layers,
)
from intarsia.base.errors import IntarsiaError

BLOCKS = [
    Attention(4, 2, 8, rope=False), Mamba2(8, 16, 32, num_groups=2, norm_groups=1, dt_max=0.5, proj_bias=True),
    Mamba1(48, state_size=8, time_step_rank=3), Experts(8, 2, 16, shared_size=24, routed_scale=2.5),
    FeedForward(24, bias=True), Linear(),
]  # fmt: skip


@pytest.mark.parametrize("block", BLOCKS, ids=kind)
def test_a_block_goes_through_json_unchanged(block):
    assert block_from_dict(json.loads(json.dumps(block_to_dict(block)))) == block


def test_an_architecture_with_every_block_does_too():
    arch = Architecture(hidden_size=32, vocab_size=9, blocks=tuple(BLOCKS), rope=None, family="intarsia")
    assert Architecture.from_dict(json.loads(json.dumps(arch.to_dict()))) == arch


def test_no_bound_on_time_steps_is_written_in_one_way():
    assert Mamba2(4, 8, 16, dt_max=float("inf")) == Mamba2(4, 8, 16)
    assert "dt_max" not in block_to_dict(Mamba2(4, 8, 16, dt_max=float("inf")))


@pytest.mark.parametrize(
    "make, sentence",
    [
        (lambda: Mamba2(6, 8, 16, num_groups=4), "Mamba-2 with 6 heads"),
        (lambda: Mamba2(4, 8, 16, norm_groups=3), "3 groups of its norm"),
        (lambda: Mamba2(4, 8, 0), "state 0"),
        (lambda: Mamba1(16, time_step_rank=0), "time steps of rank 0"),
        (lambda: Experts(8, 9, 16), "9 of 8 experts"),
        (lambda: Experts(8, 3, 16, num_expert_groups=4, groups_per_token=1), "from 1 of 4 groups"),
        (lambda: Experts(8, 2, 16, num_expert_groups=3), "from 1 of 3 groups"),
    ],
)
def test_impossible_blocks_are_sentences(make, sentence):
    with pytest.raises(IntarsiaError, match=sentence):
        make()


def test_widths_of_mamba2_are_those_of_nemotron_h_8b():
    block = Mamba2(128, 64, 128, 8)
    assert (block.inner_size, block.conv_size, block.in_size) == (8192, 10240, 18560)
    assert block.groups_of_norm == 8 and Mamba2(128, 64, 128, 8, norm_groups=1).groups_of_norm == 1


def test_flops_are_twice_the_weights_that_a_token_meets_and_the_recurrence():
    d = 64
    mamba = Mamba2(8, 16, 32, num_groups=2)
    weights = d * (mamba.in_size + mamba.inner_size) + 4 * mamba.conv_size
    assert block_flops(mamba, d, 10) == block_flops(mamba, d, 10_000) == 2 * weights + 5 * 8 * 16 * 32
    experts = Experts(8, 2, 16, shared_size=24, gated=True)
    assert block_flops(experts, d, 1) == 2 * (8 * d + 3 * d * (2 * 16 + 24))
    assert block_parameters(experts, d) == d + 8 * d + 8 + 3 * d * (8 * 16 + 24)


def test_a_state_does_not_grow_and_a_window_stops_growing():
    mamba, attention = Mamba2(8, 16, 32, num_groups=2), Attention(4, 2, 8, sliding_window=100)
    assert block_cache_bytes(mamba, 1) == block_cache_bytes(mamba, 10**6) == 3 * (128 + 128) * 2 + 8 * 16 * 32 * 4
    assert block_cache_bytes(mamba, 1, batch=3, bytes_per_element=4) == 3 * (3 * 256 * 4 + 4096 * 4)
    assert block_cache_bytes(attention, 100) == block_cache_bytes(attention, 10**6) == 2 * 100 * 2 * 8 * 2


def test_layers_pair_mamba_with_ffn_and_experts():
    attention, mamba, ffn, experts, linear = BLOCKS[0], BLOCKS[1], BLOCKS[4], BLOCKS[3], BLOCKS[5]
    assert pair_layers((mamba, ffn, mamba, attention, ffn)) == [(0, 1), (2, None), (3, 4)]
    assert pair_layers((mamba, mamba, experts, ffn)) == [(0, None), (1, 2), (None, 3)]
    assert pair_layers((linear, mamba, linear)) == [(0, None), (1, 2)]
