"""What may stand at a site."""

import pytest
import torch

from intarsia.arch import Architecture, Attention, FeedForward, Linear
from intarsia.base.errors import IntarsiaError
from intarsia.compress.options import OptionSpec, ffn_widths, options_for, sites_of
from intarsia.compress.recipe import Options
from intarsia.model import make_mixer


def names(block, **recipe):
    return [s.name for s in options_for(block, Options(**recipe))]


def test_an_ffn_comes_at_a_ladder_of_widths():
    assert names(FeedForward(1536)) == ["parent", "ffn 1344", "ffn 1152", "ffn 960", "ffn 768", "ffn 576", "ffn 384",
                                        "linear", "none"]  # fmt: skip
    parent, first, *_ = options_for(FeedForward(1536, "gelu", gated=False, bias=True), Options())
    assert parent == OptionSpec("parent", FeedForward(1536, "gelu", gated=False, bias=True), "parent")
    assert first.block == FeedForward(1344, "gelu", gated=False, bias=True) and first.method == "prefix"


@pytest.mark.parametrize("size, multiple, shares, expected", [
    (1536, 64, (0.5, 0.25), [768, 384]), (1000, 64, (0.5,), [512]), (1536, 64, (0.51, 0.5), [768]),
    (100, 64, (0.9, 0.5, 0.1), [64]), (48, 64, (0.5,), []), (64, 64, (0.5, 0.9), []), (10, 1, (0.25, 0.99), [2]),
    (96, 16, (0.99, 0.5), [48]),
])  # fmt: skip
def test_widths_are_multiples_below_the_parents(size, multiple, shares, expected):
    assert ffn_widths(size, Options(ffn_widths=shares, multiple=multiple)) == expected


def test_attention_comes_with_fewer_kv_heads():
    block = Attention(12, 4, 16, qkv_bias=True)
    found = {s.name: s for s in options_for(block, Options(kv_methods=("drop", "mean", "aligned", "keep")))}
    assert list(found) == [
        "parent", "attention 9q/3kv", "attention 6q/2kv", "attention 3q/1kv",
        *(f"attention 12q/{kv}kv {method}" for method in ("mean", "aligned", "keep") for kv in (2, 1)),
        "linear", "none",
    ]  # fmt: skip
    assert found["attention 9q/3kv"].block == Attention(9, 3, 16, qkv_bias=True)  # every KV head keeps its queries
    assert found["attention 12q/2kv keep"].block == Attention(12, 2, 16, qkv_bias=True)
    assert names(Attention(4, 1, 16)) == ["parent", "linear", "none"]  # no fewer than one


def test_what_a_recipe_leaves_out_is_left_out():
    few = {"linear": False, "absent": False, "kv_methods": (), "ffn_widths": ()}
    assert names(FeedForward(96), **few) == names(Attention(4, 2, 8), **few) == ["parent"]
    assert names(Linear()) == ["parent", "none"]  # a linear layer has nothing between itself and nothing


def test_the_linear_layer_keeps_the_last_bias():
    def bias(block):
        return next(s.block.bias for s in options_for(block, Options()) if s.name == "linear")

    assert bias(FeedForward(96, bias=True)) and bias(Attention(4, 2, 8, out_bias=True))
    assert not bias(FeedForward(96)) and not bias(Attention(4, 2, 8, qkv_bias=True))


@pytest.mark.parametrize("block", [FeedForward(1536), Attention(9, 3, 64), Attention(16, 8, 8, qk_norm=True)])
def test_names_are_the_options_own_and_every_block_can_be_built(block):
    specs = options_for(block, Options(kv_methods=("drop", "mean", "aligned", "keep")))
    assert len({s.name for s in specs}) == len(specs)
    assert specs[0].block == block and sum(s.block is None for s in specs) == 1
    sizes = [sum(p.numel() for p in make_mixer(s.block, 64, 1e-5, torch.float32, "meta").parameters())
             for s in specs if s.method in ("parent", "prefix", "drop")]  # fmt: skip
    assert sizes == sorted(sizes, reverse=True) and len(set(sizes)) == len(sizes)  # dearest first
    assert all(" | " not in s.name for s in specs)  # which parts the two names of a layer


def test_an_unknown_way_to_fewer_heads_is_a_sentence():
    with pytest.raises(IntarsiaError, match="'prune' is no way to fewer KV heads; known: drop, mean, aligned, keep"):
        options_for(Attention(4, 2, 8), Options.model_construct(kv_methods=("prune",), linear=True, absent=True))


def test_sites_are_layers():
    arch = Architecture.transformer(3, Attention(4, 2, 8), FeedForward(48), hidden_size=32, vocab_size=61)
    assert [(s.layer, s.attention, s.ffn) for s in sites_of(arch)] == [(0, 0, 1), (1, 2, 3), (2, 4, 5)]
    blocks = (FeedForward(48), Attention(4, 2, 8), Attention(4, 2, 8), FeedForward(48))
    assert [(s.attention, s.ffn) for s in sites_of(arch.replace(blocks=blocks))] == [(None, 0), (1, None), (2, 3)]
