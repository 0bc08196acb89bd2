"""A Transformer becomes a hybrid by one command: child, control, page; and the child is made sparser by the next."""

import json
from itertools import pairwise
from types import SimpleNamespace

import pytest
import torch

import intarsia
from intarsia.arch import Attention, FeedForward, Mamba2
from intarsia.base.files import read_json
from tiny_compression import compress, make_parent, make_recipe, make_text

SETTINGS = ("options.ffn_widths=[]", "options.kv_methods=[]", "options.linear=false", "options.absent=false",
            'controls.kinds=["uniform","greedy"]', "search.solutions=1", "tournament.finalists=1")  # fmt: skip
# Only optima: a second-best choice, which a tournament may prefer, keeps less attention than it may.


def words_for(parent, recipe, out, share, *more):
    settings = [word for setting in SETTINGS for word in ("--set", setting)]
    return (parent, "--recipe", recipe, "--keep-attention", share, "--out", out, *settings, *more)


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    folder = tmp_path_factory.mktemp("hybrid")
    parent, recipe = make_parent(folder / "parent"), make_recipe(folder / "tiny.toml", make_text(folder / "text"))
    status, _, err = compress(*words_for(parent, recipe, folder / "run", "0.25", "--controls"))
    assert status == 0, err
    summary = json.loads((folder / "run" / "summary.json").read_text(), parse_constant=pytest.fail)
    return SimpleNamespace(folder=folder, parent=parent, recipe=recipe, run=folder / "run", summary=summary)


def mixers(model) -> list[type]:
    return [type(block) for block in model.arch.blocks[::2]]


def test_the_child_keeps_what_was_asked(finished):
    model, tokenizer = intarsia.load(finished.run / "child")
    found = mixers(model)
    # At most a quarter of eight blocks; fewer where a Mamba block of this tiny model does no measurable harm.
    assert 1 <= found.count(Attention) <= 2 and found.count(Mamba2) == 4 - found.count(Attention) and found[0] is Mamba2
    assert all(isinstance(block, FeedForward) for block in model.arch.blocks[1::2])
    assert finished.summary["target"] == {"keep_attention": 0.25}
    sites = finished.summary["child"]["sites"]
    assert [row["attention"]["block"]["kind"] == "mamba2" for row in sites] == [kind is Mamba2 for kind in found]
    new = intarsia.generate(model, tokenizer.encode("def parse(text):"), 8, stop_ids=())
    assert len(list(new)) == 8


def test_the_floats_that_decay_stay_wide(finished):
    model, _ = intarsia.load(finished.run / "child", dtype="bfloat16")
    mamba = next(b.mixer for b in model.blocks if isinstance(b.spec, Mamba2))
    assert {mamba.A_log.dtype, mamba.D.dtype, mamba.dt_bias.dtype} == {torch.float32}
    assert mamba.in_proj.weight.dtype == torch.bfloat16


def test_reading_at_once_and_token_by_token_agree(finished):
    model, _ = intarsia.load(finished.run / "child")
    ids = torch.arange(24)[None] % model.arch.vocab_size
    cache = intarsia.model.Cache(model.arch, 1, 24, model.dtype, model.device)
    with torch.no_grad():
        steps = torch.cat([model(ids[:, n : n + 1], cache) for n in range(24)], 1)
        assert (steps - model(ids)).abs().max() < 1e-4


def test_controls_keep_as_little_attention(finished):
    controls = finished.summary["controls"]
    assert controls["uniform"]["description"] == "attention evenly spaced in 2 layers, Mamba-2 elsewhere"
    for name in controls:
        found = mixers(intarsia.load(finished.run / "controls" / name)[0])
        assert found.count(Attention) <= 2 and found[0] is Mamba2, name


def test_the_library_has_a_mamba_option_at_every_attention(finished):
    rows = [row for row in finished.summary["options"] if row["option"].startswith("mamba2")]
    assert [row["layer"] for row in rows] == [0, 1, 2, 3]
    for row in rows:
        assert 0 < row["loss_after"] < 1 and row["loss_after"] < row["loss_before"] and row["kl"] > 0
        assert row["prefill_seconds"] > 0 and row["weight_bytes"] > 0
    kinds = {row["option"]: row for row in finished.summary["cost"]["blocks"]}
    assert any(name.startswith("mamba2") for name in kinds)


def test_the_page_shows_the_mamba_blocks(finished):
    page = (finished.run / "report.html").read_text()
    assert "mamba2 4x16 n16" in page and "keep_attention 0.25" in page


def test_the_same_command_again_does_nothing_again(finished):
    before = finished.run.joinpath("child", "model.safetensors").stat().st_mtime_ns
    status, out, err = compress(*words_for(finished.parent, finished.recipe, finished.run, "0.25", "--controls"))
    assert status == 0, err
    assert "search: already done" in out
    assert finished.run.joinpath("child", "model.safetensors").stat().st_mtime_ns == before


def test_a_hybrid_is_made_sparser_step_by_step(finished):
    """The second step reads the first one's child: its Mamba blocks stay as they are, one more attention leaves."""
    run = finished.folder / "second"
    fewer = mixers(intarsia.load(finished.run / "child")[0]).count(Attention) - 1
    status, _, err = compress(*words_for(finished.run, finished.recipe, run, str(fewer / 8 or 0.01)))
    assert status == 0, err
    first, second = (intarsia.load(folder / "child")[0] for folder in (finished.run, run))
    assert mixers(second).count(Attention) <= fewer
    assert all(b is Mamba2 for a, b in zip(mixers(first), mixers(second)) if a is Mamba2)
    scores = read_json(run / "summary.json")["options"]
    kept = [row["layer"] for row in scores if row["kl"] == 0 and row["option"].startswith("mamba2")]
    assert kept == [n for n, kind in enumerate(mixers(first)) if kind is Mamba2]


def test_what_is_not_possible_is_a_sentence(finished):
    few = ("--set", "options.mamba=false")
    status, _, err = compress(*words_for(finished.parent, finished.recipe, finished.folder / "none", "0.25", *few))
    assert status == 2 and "no option takes its place. Set options.mamba to true" in err, err
    status, _, err = compress(*words_for(finished.parent, finished.recipe, finished.folder / "none", "1.5"))
    assert status == 2 and "keep_attention" in err, err


def test_pairs_of_layers_are_in_order(finished):
    layers = [row["layer"] for row in finished.summary["child"]["sites"]]
    assert all(b == a + 1 for a, b in pairwise(layers))
