"""Attention that sees less: the parent's weights, a window, a smaller cache; costed, scored, trained and saved."""

import dataclasses
import json

import pytest
import torch

from compress_toys import BIASED, LADDER, NORMED, PLAIN, relative, sites, statistics, tokens, toy
from intarsia.arch import Attention, block_cache_bytes
from intarsia.base.errors import IntarsiaError
from intarsia.base.recipe import load_recipe
from intarsia.compress.assemble import assemble
from intarsia.compress.library import Builder, Library, stream
from intarsia.compress.measure import _fit, block_costs, distinct, key, measure_costs
from intarsia.compress.options import options_for
from intarsia.compress.problem import choice_of, pair_name
from intarsia.compress.recipe import Library as LibraryRecipe
from intarsia.compress.recipe import Recipe
from intarsia.compress.score import Scorer, score_library
from intarsia.compress.surgery import make_option
from intarsia.engine.scenario import Scenario
from intarsia.formats import export, load, save
from intarsia.model import Cache

WINDOWS = LADDER.model_copy(update={"windows": (4, 12), "kv_methods": (), "ffn_widths": (), "linear": False})
HELDOUT = tokens(8, seed=900)


def window_options(model):
    return {i: options_for(b, WINDOWS) for i, b in enumerate(model.arch.blocks)}


def built(model, folder, steps=0):
    recipe = LibraryRecipe(tokens=96 * steps, batch_tokens=96, lr=3e-3)
    made = Builder(model, window_options(model), statistics(model, 4), recipe, "refit", folder)
    before = made.losses(HELDOUT)
    made.train(lambda step: tokens(4, 24, seed=step), lambda: None, lambda *_: None)
    after = made.losses(HELDOUT)
    made.store(before, after)
    return Library.open(folder, model), before, after


def test_windows_are_options_of_attention_alone():
    assert [s.name for s in options_for(Attention(4, 2, 8), WINDOWS)] == [
        "parent", "attention 4q/2kv w12", "attention 4q/2kv w4", "none",
    ]  # fmt: skip
    shorter = options_for(Attention(4, 2, 8, sliding_window=8), WINDOWS)
    assert [s.block.sliding_window for s in shorter if s.method == "window"] == [4]  # only what sees less
    assert [s.name for s in options_for(PLAIN.blocks[1], WINDOWS)] == ["parent", "none"]
    assert not any(s.method == "window" for s in options_for(Attention(4, 2, 8), LADDER))


@pytest.mark.parametrize("arch", [PLAIN, BIASED, NORMED], ids=["plain", "biased", "normed"])
@torch.no_grad()
def test_the_weights_are_the_parents_and_the_window_is_a_mask(arch):
    """Against the parent's own softmax with everything outside the window left out, in float64."""
    model = toy(arch)
    parent, spec = model.blocks[0], options_for(arch.blocks[0], WINDOWS)[2]
    child = make_option(parent, spec, arch, statistics(model, 1)[0])
    assert all(torch.equal(a, b) for a, b in zip(parent.parameters(), child.parameters(), strict=True))
    n, tables = next((n, t) for i, _, n, _, t in stream(model, HELDOUT) if i == 0)
    child, n, tables = child.double(), n.double(), tuple(t.double() for t in tables)
    mixer, size = child.mixer, arch.blocks[0].head_dim
    free = dataclasses.replace(spec.block, sliding_window=None)
    everything = make_option(parent, dataclasses.replace(spec, block=free), arch, statistics(model, 1)[0]).double()
    from intarsia.ops.norm import rms_norm
    from intarsia.ops.rope import rotate

    q, k, v = (layer(n).unflatten(-1, (-1, size)).transpose(1, 2) for layer in (mixer.q, mixer.k, mixer.v))
    if free.qk_norm:
        q, k = rms_norm(q, mixer.q_norm.weight, mixer.eps), rms_norm(k, mixer.k_norm.weight, mixer.eps)
    q, k = rotate(q, *tables), rotate(k, *tables)
    k, v = (t.repeat_interleave(free.group, 1) for t in (k, v))
    scores = q @ k.transpose(-1, -2) / size**0.5
    place = torch.arange(n.shape[1])
    apart = place[:, None] - place
    wanted = scores.masked_fill((apart < 0) | (apart >= 4), -torch.inf).softmax(-1) @ v
    assert relative(mixer(n, tables), mixer.o(wanted.transpose(1, 2).flatten(2))) < 1e-6
    assert relative(mixer(n[:, :4], tuple(t[:4] for t in tables)),
                    everything.mixer(n[:, :4], tuple(t[:4] for t in tables))) < 1e-6  # fmt: skip


def test_a_window_costs_its_tokens_and_not_the_context():
    full, short = Attention(4, 2, 8), Attention(4, 2, 8, sliding_window=16)
    assert block_cache_bytes(short, 1000, 3) * 1000 == block_cache_bytes(full, 1000, 3) * 16
    assert block_cache_bytes(short, 10) == block_cache_bytes(full, 10)
    model = toy(PLAIN)
    options, scenario = window_options(model), Scenario(2, 24, 8)
    table = measure_costs(model, scenario, sites(model), options, 1, 0)
    costs = {s.name: block_costs(table, s.block, PLAIN, scenario, 4) for s in options[0]}
    assert costs["attention 4q/2kv w4"]["cache_bytes"] * 8 == costs["parent"]["cache_bytes"]
    assert costs["attention 4q/2kv w4"]["weight_bytes"] == costs["parent"]["weight_bytes"]
    held = Cache(PLAIN.replace(blocks=tuple(options[0][2].block for _ in range(2))), 2, 32)
    assert held.bytes == 2 * costs["attention 4q/2kv w4"]["cache_bytes"]


def test_the_fit_of_costs_does_not_pull_a_window_towards_full_attention():
    model = toy(PLAIN)
    kinds = distinct(window_options(model), sites(model))
    true = {name: 1e-4 + 1e-6 * (block.sliding_window or 100) if isinstance(block, Attention) else 2e-4
            for name, (_, block) in kinds.items()}  # fmt: skip
    attentions = [b for _, b in kinds.values() if isinstance(b, Attention)]
    rows = [[a, PLAIN.blocks[1]] * 2 for a in attentions] + [[PLAIN.blocks[0]] * 2, [PLAIN.blocks[1]] * 2]
    seconds = torch.tensor([1e-3 + sum(true[key(b)] for b in row) for row in rows]).numpy()
    found = dict(zip(kinds, _fit(rows, kinds, 32, seconds, 9e-4)[1:]))
    for name in kinds:
        assert found[name] == pytest.approx(true[name], rel=0.05), name


def test_scored_trained_stored_and_assembled(tmp_path):
    model = toy(PLAIN)
    library, before, after = built(model, tmp_path, steps=30)
    for index in (0, 2):
        assert 0 < before[index]["attention 4q/2kv w12"] < before[index]["attention 4q/2kv w4"]
        assert after[index]["attention 4q/2kv w4"] < before[index]["attention 4q/2kv w4"]
    rows = score_library(Scorer(model, HELDOUT, 2), library, sites(model), window_options(model), tmp_path / "s.jsonl")
    scored = {(r.layer, r.attention): r.kl for r in rows if r.ffn == "parent"}
    for layer in (0, 1):
        assert 0 < scored[layer, "attention 4q/2kv w12"] < scored[layer, "attention 4q/2kv w4"]
    names = [pair_name("attention 4q/2kv w4", "parent"), pair_name("parent", "parent")]
    child = assemble(library, sites(model), choice_of(names, sites(model), window_options(model)))
    assert [b.sliding_window for b in child.arch.attentions] == [4, None]
    cache = Cache(child.arch, 8, 24)
    with torch.no_grad():
        steps = torch.cat([child(HELDOUT[:, n : n + 1], cache) for n in range(24)], 1)
        assert relative(steps, child(HELDOUT)) < 1e-5


def windowed(arch, *windows):
    """The toy of an architecture with a window for each attention."""
    rest = iter(windows)
    blocks = tuple(dataclasses.replace(b, sliding_window=next(rest)) if isinstance(b, Attention) else b
                   for b in arch.blocks)  # fmt: skip
    return toy(arch.replace(blocks=blocks))


QWEN = PLAIN.replace(
    family="qwen2", blocks=(dataclasses.replace(PLAIN.blocks[0], qkv_bias=True), PLAIN.blocks[1]) * 2
)


@pytest.mark.parametrize("arch, windows, kind", [
    (PLAIN, (4, None), "intarsia"), (PLAIN, (4, 12), "intarsia"), (QWEN, (4, None), "qwen2"),
    (QWEN, (4, 12), "intarsia"),
])  # fmt: skip
def test_windows_of_every_layer_are_saved(tmp_path, arch, windows, kind):
    model = windowed(arch, *windows)
    save(model, tmp_path / "child")
    assert json.loads((tmp_path / "child" / "config.json").read_text())["model_type"] == kind
    again = load(tmp_path / "child", dtype="float32")[0]
    assert [b.sliding_window for b in again.arch.attentions] == list(windows)
    with torch.no_grad():
        assert torch.equal(again(HELDOUT), model(HELDOUT))


def test_where_windows_do_not_fit_is_a_sentence(tmp_path):
    save(windowed(PLAIN, 4, None), tmp_path / "child")
    for target, why in (("llama", "it has sliding windows"), ("nemotron-nas", "sliding windows"),
                        ("mistral", "differ in their windows"), ("gguf", "sliding windows are not written to GGUF"),
                        ("hf", "it has sliding windows. Keep it as intarsia")):  # fmt: skip
        with pytest.raises(IntarsiaError, match=why):
            export(tmp_path / "child", tmp_path / f"out.{target}", target)


def test_a_window_that_scoring_cannot_see_is_refused():
    with pytest.raises(IntarsiaError, match="windows has 256: scored sequences have 256 tokens"):
        load_recipe(Recipe, None, ["options.windows=[256]"])
    assert load_recipe(Recipe, None, ["options.windows=[128, 64]"]).options.windows == (128, 64)
