"""Where the blocks of a model made elsewhere lie: against every way to place them, and against how it was made."""

import itertools

import pytest
import torch

from compress_toys import SMALL, tokens, toy
from intarsia.arch import Architecture, Attention, FeedForward, Mamba2
from intarsia.compress.assemble import with_blocks
from intarsia.compress.guests import in_order, origins
from test_compress_mend import EVERY, narrower


@pytest.mark.parametrize("count, width", [(1, 1), (1, 5), (3, 3), (3, 7), (5, 8)])
def test_the_order_of_the_greatest_sum(count, width):
    generator = torch.Generator().manual_seed(count + width)
    for _ in range(20):
        alike = torch.randn(count, width, generator=generator)
        every = itertools.combinations(range(width), count)
        best = max(every, key=lambda columns: sum(float(alike[row, column]) for row, column in enumerate(columns)))
        assert in_order(alike) == list(best)


@pytest.mark.parametrize("name", EVERY)
def test_what_was_left_out_and_narrowed_is_found(name):
    model = toy(EVERY[name])
    count = len(model.blocks)
    narrow = next(i for i, block in enumerate(model.arch.blocks) if i > 1 and isinstance(block, FeedForward))
    for gone in itertools.combinations(set(range(count)) - {narrow}, 2):
        kept = [i for i in range(count) if i not in gone]
        guest = with_blocks(model, [narrower(model, i) if i == narrow else model.blocks[i] for i in kept])
        assert origins(model, guest, tokens(8, 32)) == kept


def test_a_model_of_another_width_or_of_more_blocks_lies_nowhere():
    model, rows = toy(EVERY["plain"]), tokens(8, 32)
    wide = Architecture.transformer(1, Attention(4, 2, 8), FeedForward(48), **SMALL | {"hidden_size": 48})
    long = model.arch.replace(blocks=(*model.arch.blocks, Mamba2(4, 8, 8)))
    assert origins(model, toy(wide), rows) is None and origins(model, toy(long), rows) is None
    assert origins(model, model, rows) == list(range(len(model.blocks)))
