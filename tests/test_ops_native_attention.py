"""The native attention of prompts and of single queries against its definition, on every level of processor."""

import pytest
import torch

from intarsia.ops.attention import attend_reference
from intarsia.ops.native.attention import attend
from native_levels import distance, level  # noqa: F401


@pytest.fixture(autouse=True)
def seeded(level):  # noqa: F811
    torch.manual_seed(0)


def draw(heads=6, kv_heads=2, length=9, total=9, size=16, batch=2):
    shapes = ((batch, heads, length, size), (batch, kv_heads, total, size), (batch, kv_heads, total, size))
    return [torch.randn(shape).bfloat16() for shape in shapes]


@pytest.mark.parametrize("window", [None, 1, 3, 40, 150, 1000])
@pytest.mark.parametrize(
    "length, total", [(1, 1), (1, 300), (2, 2), (9, 9), (130, 130), (300, 300), (7, 290), (64, 256)]
)
def test_every_length(length, total, window):
    q, k, v = draw(length=length, total=total)
    assert distance(attend(q, k, v, window), attend_reference(q, k, v, window)) < 1e-2


@pytest.mark.parametrize(
    "heads, kv_heads, size", [(1, 1, 64), (3, 3, 80), (9, 3, 64), (12, 4, 128), (4, 1, 7), (140, 1, 8)]
)
def test_odd_shapes(heads, kv_heads, size):
    q, k, v = draw(heads, kv_heads, 70, 133, size, batch=1)
    assert distance(attend(q, k, v), attend_reference(q, k, v)) < 1e-2


def test_large_and_equal_scores():
    q, k, v = draw(length=40, total=200)
    assert distance(attend(q * 60, k, v), attend_reference(q * 60, k, v)) < 1e-2
    assert distance(attend(q * 0, k, v), attend_reference(q * 0, k, v)) < 1e-2


def test_a_prompt_in_pieces_is_the_same_bits_as_whole():
    q, k, v = draw(length=333, total=333)
    whole = attend(q, k, v)
    for cut in (1, 64, 200):
        parts = [attend(q[:, :, :cut], k[:, :, :cut], v[:, :, :cut]), attend(q[:, :, cut:], k, v)]
        assert torch.equal(parts[1], whole[:, :, cut:])
        assert cut == 1 or torch.equal(parts[0], whole[:, :, :cut])  # one query alone is decoding, in another order


def test_any_strides_and_threads():
    q, k, v = draw(length=150, total=150)
    apart = [t.transpose(1, 2).contiguous().transpose(1, 2) for t in (q, k, v)]
    wide = [torch.cat([t, t], 3)[..., :16] for t in (q, k, v)]
    threads = torch.get_num_threads()
    try:
        found = []
        for count in (1, 2, 5):
            torch.set_num_threads(count)
            found += [attend(*each) for each in ([q, k, v], apart, wide)]
        assert all(torch.equal(found[0], other) for other in found)
    finally:
        torch.set_num_threads(threads)
