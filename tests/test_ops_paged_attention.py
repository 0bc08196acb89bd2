"""Attention over pages against the definition, wherever the pages lie."""

import pytest
import torch

from intarsia.ops.attention import attend_reference
from intarsia.ops.paged_attention import gather_pages, paged_attention


def sequences(dtype, neighbours):
    """Three sequences of 1, 9 and 13 tokens in pages of 4; pages that nobody owns are poisoned."""
    generator = torch.Generator().manual_seed(0)
    tables = [[2], [4, 5, 6], [0, 1, 3, 8]] if neighbours else [[7], [6, 1, 4], [8, 0, 3, 2]]
    lengths = (1, 9, 13)
    keys, values = (torch.full((9, 4, 2, 8), torch.nan, dtype=dtype) for _ in range(2))
    texts = []
    for table, length in zip(tables, lengths):
        k, v = (torch.randn(length, 2, 8, generator=generator).to(dtype) for _ in range(2))
        for t in range(length):
            keys[table[t // 4], t % 4], values[table[t // 4], t % 4] = k[t], v[t]
        texts.append((k.transpose(0, 1)[None], v.transpose(0, 1)[None]))
    q = torch.randn(3, 6, 8, generator=generator).to(dtype)
    padded = torch.tensor([[*t, *[0] * (4 - len(t))] for t in tables], dtype=torch.int32)
    return q, keys, values, padded, torch.tensor(lengths, dtype=torch.int32), texts


@pytest.mark.parametrize("window", [None, 1, 5, 40])
@pytest.mark.parametrize("neighbours", [True, False])
@pytest.mark.parametrize("dtype, error", [(torch.float64, 1e-12), (torch.float32, 1e-6), (torch.bfloat16, 2e-2)])
def test_every_query_sees_its_own_text(dtype, error, neighbours, window):
    q, keys, values, tables, lengths, texts = sequences(dtype, neighbours)
    found = paged_attention(q, keys, values, tables, lengths, window)
    for row, (k, v) in enumerate(texts):
        expected = attend_reference(q[row, None, :, None], k, v, window)[0, :, 0]
        torch.testing.assert_close(found[row].double(), expected, atol=error, rtol=error)


def test_where_the_pages_lie_changes_no_bit():
    near, far = (paged_attention(*sequences(torch.float32, n)[:5]) for n in (True, False))
    assert torch.equal(near, far)


def test_neighbouring_pages_are_not_copied():
    _, keys, _, _, _, _ = sequences(torch.float32, True)
    assert gather_pages(keys, [4, 5, 6], 2, 9).data_ptr() == keys[4, 2].data_ptr()
    assert gather_pages(keys, [0, 1, 3, 8], 5, 9).data_ptr() != keys[1, 1].data_ptr()  # the third page is elsewhere
    assert gather_pages(keys, [0, 1, 3, 8], 5, 8).data_ptr() == keys[1, 1].data_ptr()
