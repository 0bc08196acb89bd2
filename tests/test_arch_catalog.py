"""The catalog against published figures, the pattern language, and the design rules of Nemotron-H."""

import pytest

from intarsia.arch import (
    Attention,
    FeedForward,
    Mamba2,
    block_cache_bytes,
    block_parameters,
    catalog,
    check_nemotron_h,
    nemotron_h,
    parameters,
    parse_pattern,
    pattern_of,
)
from intarsia.arch.cost import conv_elements, state_elements
from intarsia.arch.rules import nemotron_h_pattern
from intarsia.base.errors import IntarsiaError

KIB, MIB = 2**10, 2**20
PATTERNS = {
    "nemotron-h-8b": "M-M-M-M*-M-M-M-M-M*-M-M-M-M-M*-M-M-M-M-M*-M-M-M-M-M-",
    "nemotron-h-56b": "M-M-M-M*-M-M-M-M-M*-M-M-M-M-M*-M-M-M-M-M*-M-M-M-M-M*-M-M-M-M-M*-M-M-M-M-M*-M-M-M-M-M*-M-M-M-M-M*"
    "-M-M-M-M-M*-M-M-M-M-M-",
}


@pytest.mark.parametrize(
    "name, billions",
    [
        ("nemotron-h-4b", 4.489), ("nemotron-h-8b", 8.101), ("nemotron-h-56b", 56.324), ("nemotron-h-47b", 46.792),
        ("nemotron-h-47b-paper", 46.856),
    ],
)  # fmt: skip
def test_parameters_to_the_published_digit(name, billions):
    assert round(parameters(catalog.get(name)) / 1e9, 3) == billions


@pytest.mark.parametrize(
    "name, count",
    [
        ("llama-3.1-8b", 8_030_261_248), ("llama-3.1-70b", 70_553_706_496), ("llama-3.1-405b", 405_853_388_800),
        ("qwen2.5-7b", 7_615_616_512), ("qwen2.5-72b", 72_706_203_648),
    ],
)  # fmt: skip
def test_parameters_are_those_of_the_released_weights(name, count):
    assert parameters(catalog.get(name)) == count


@pytest.mark.parametrize(
    "name, mamba, ffn, attention, outer",
    [
        ("nemotron-h-8b", 109.64, 176.16, 41.95, 1074), ("nemotron-h-56b", 438.43, 536.88, 151.00, 2147),
    ],
)  # fmt: skip
def test_parameters_of_each_kind_of_block(name, mamba, ffn, attention, outer):
    arch = catalog.get(name)
    for cls, millions in [(Mamba2, mamba), (FeedForward, ffn), (Attention, attention)]:
        block = next(b for b in arch.blocks if isinstance(b, cls))
        assert round(block_parameters(block, arch.hidden_size) / 1e6, 2) == millions
    assert round((parameters(arch) - parameters(arch, embeddings=False)) / 1e6) == outer


@pytest.mark.parametrize(
    "name, counts",
    [
        ("nemotron-h-8b", (24, 24, 4)), ("nemotron-h-56b", (54, 54, 10)), ("nemotron-h-47b", (45, 48, 5)),
        ("nemotron-h-47b-paper", (44, 49, 5)), ("nemotron-nano-2-12b", (28, 28, 6)),
        ("nemotron-nano-2-9b", (27, 25, 4)), ("mamba2-hybrid-8b", (24, 28, 4)), ("nemotron-h-187m", (11, 11, 2)),
        ("nemotron-t-8b", (0, 32, 32)),
    ],
)  # fmt: skip
def test_numbers_of_blocks(name, counts):
    assert tuple(pattern_of(catalog.get(name)).count(letter) for letter in "M-*") == counts


def test_attention_stands_where_the_papers_put_it():
    for name, wanted in [
        ("nemotron-h-8b", [7, 18, 29, 40]), ("nemotron-h-56b", list(range(7, 107, 11))),
        ("nemotron-h-47b", [17, 38, 49, 60, 86]),
    ]:  # fmt: skip
        assert [i for i, letter in enumerate(pattern_of(catalog.get(name))) if letter == "*"] == wanted
    assert {name: pattern_of(catalog.get(name)) for name in PATTERNS} == PATTERNS


@pytest.mark.parametrize(
    "name, elements, kib, gib",
    [
        ("nemotron-h-8b", 8_192, 16, 1.02), ("nemotron-h-56b", 20_480, 40, 2.54), ("nemotron-h-47b", 10_240, 20, 1.27),
        ("llama-3.1-8b", 65_536, 128, 8.1), ("nemotron-t-8b", 65_536, 128, 8.1), ("qwen2.5-7b", 28_672, 56, 3.6),
        ("llama-3.1-70b", 163_840, 320, 20.3), ("qwen2.5-72b", 163_840, 320, 20.3),
    ],
)  # fmt: skip
def test_cache_of_keys_and_values(name, elements, kib, gib):
    attentions = catalog.get(name).attentions
    assert sum(2 * a.num_kv_heads * a.head_dim for a in attentions) == elements
    assert sum(block_cache_bytes(a, 1) for a in attentions) == kib * KIB
    held = sum(block_cache_bytes(a, 66_560) for a in attentions) / 2**30
    assert round(held, 2 if gib < 3 else 1) == gib


@pytest.mark.parametrize(
    "name, millions, float32, conv_millions",
    [
        ("nemotron-h-8b", 25.17, 96, 0.98), ("nemotron-h-56b", 226.5, 864, 4.42), ("nemotron-h-47b", 188.7, 720, 3.69),
    ],
)  # fmt: skip
def test_state_of_a_sequence(name, millions, float32, conv_millions):
    arch = catalog.get(name)
    mambas = [b for b in arch.blocks if isinstance(b, Mamba2)]
    states = sum(map(state_elements, mambas))
    assert states / 1e6 == pytest.approx(millions, rel=5e-4) and states * 4 == float32 * MIB
    # The published figure holds 4 inputs of each channel; a convolution of width 4 needs the last 3.
    inputs = sum(map(conv_elements, mambas))
    assert round(inputs / 3 * 4 / 1e6, 2) == conv_millions
    assert sum(block_cache_bytes(b, 5) for b in mambas) == states * 4 + inputs * 2


def test_every_entry_says_what_it_is():
    for name in catalog.names():
        assert catalog.title(name) and catalog.source(name)
        assert catalog.get(name).blocks
    assert catalog.get("llama-3.1-70b").rope.scaling["rope_type"] == "llama3"
    with pytest.raises(IntarsiaError, match=r"no model 'nemotron-8b'.*Did you mean 'nemotron-"):
        catalog.get("nemotron-8b")


def test_the_small_one_has_the_size_of_its_name():
    assert round(parameters(catalog.get("nemotron-h-187m")) / 1e6) == 187


BLOCKS = {"M": Mamba2(4, 8, 16), "-": FeedForward(8), "*": Attention(2, 1, 8)}


def test_a_pattern_and_back():
    blocks = parse_pattern("M-M*-", BLOCKS)
    arch = catalog.get("nemotron-h-187m").replace(blocks=blocks)
    assert blocks == (BLOCKS["M"], BLOCKS["-"], BLOCKS["M"], BLOCKS["*"], BLOCKS["-"])
    assert pattern_of(arch) == "M-M*-"


@pytest.mark.parametrize(
    "text, sentence",
    [
        ("", "at least one letter"), ("M-|M-", "pipeline stages"), ("M-/ME", "several tokens"),
        ("MEM", "letter 'E' .* known here: M - *"), ("MGM", "gated delta net"),
    ],
)  # fmt: skip
def test_what_a_pattern_cannot_say(text, sentence):
    with pytest.raises(IntarsiaError, match=sentence):
        parse_pattern(text, BLOCKS)


@pytest.mark.parametrize(
    "name", ["nemotron-h-4b", "nemotron-h-8b", "nemotron-h-56b", "nemotron-nano-2-12b", "nemotron-h-187m"]
)
def test_published_models_keep_the_rules(name):
    assert check_nemotron_h(catalog.get(name)) == []


def test_compressed_models_break_some():
    broken = check_nemotron_h(catalog.get("nemotron-h-47b"))
    assert [sentence.split(":")[0] for sentence in broken] == [
        "5 of 98 blocks are attention, 5.1 %; about 8 % should be.",
        "There are 45 Mamba-2 blocks and 48 FFNs; there should be as many of both.",
        "Attention is not evenly dispersed",
    ]


@pytest.mark.parametrize(
    "pattern, sentence",
    [
        ("-M" * 5 + "M*-", "The first block is an FFN"), ("M-M-M-*-M-M-M", "The last block is Mamba-2"),
        ("M-M-M-M*M-M--M-", "Attention at 7 is followed by Mamba-2"), ("M*-" * 6, "6 of 18 blocks are attention"),
        ("M-" * 13, "0 of 26 blocks are attention"), ("M*-" + "M-" * 5, "not evenly dispersed"),
        ("M-M-MMM*-M-MMM-", "9 Mamba-2 blocks and 5 FFNs"),
    ],
)  # fmt: skip
def test_a_broken_rule_is_named(pattern, sentence):
    arch = catalog.get("nemotron-h-187m").replace(blocks=parse_pattern(pattern, BLOCKS))
    assert any(sentence in found for found in check_nemotron_h(arch)), check_nemotron_h(arch)


def test_the_rules_make_the_published_patterns():
    for name, layers, attentions in [
        ("nemotron-h-8b", 52, None), ("nemotron-h-56b", 118, None), ("nemotron-nano-2-12b", 62, 6),
        ("nemotron-h-187m", 24, None),
    ]:  # fmt: skip
        assert nemotron_h_pattern(layers, attentions) == pattern_of(catalog.get(name))


def test_the_rules_make_the_published_models():
    made = nemotron_h(118, 8192, state_size=256)
    assert made == catalog.get("nemotron-h-56b")
    assert nemotron_h(52, 4096, intermediate_size=21504) == catalog.get("nemotron-h-8b")
    small = nemotron_h(24, 768, vocab_size=49_152, head_dim=64, num_kv_heads=4)
    assert small == catalog.get("nemotron-h-187m")


@pytest.mark.parametrize("layers", range(9, 131))
def test_a_model_of_any_size_keeps_the_rules(layers):
    arch = nemotron_h(layers, 256, num_groups=4)
    assert len(arch.blocks) == layers and check_nemotron_h(arch) == []


def test_impossible_numbers_of_layers_are_sentences():
    with pytest.raises(IntarsiaError, match="10 layers with 3 attentions cannot follow the rules"):
        nemotron_h(10, 256, attentions=3)
    with pytest.raises(IntarsiaError, match="8 layers with 4 attentions"):
        nemotron_h(8, 256, attentions=4)
