"""The recipes that come with the package, what they plan, and the schedules and decays that they name."""

import argparse
import math
import re

import pytest
import torch

from intarsia import cli
from intarsia.arch import parameters
from intarsia.base.recipe import load_recipe, preset_names, save_resolved
from intarsia.commands.train import add_changes, read_recipe
from intarsia.model import Decoder
from intarsia.train.optimizer import decays
from intarsia.train.plan import make_plan, phases, training_flops
from intarsia.train.recipe import Recipe, Schedule
from intarsia.train.schedule import rate
from intarsia.train.start import architecture
from tiny_training import ARCH

NAMES = preset_names("train")


@pytest.mark.parametrize("name", NAMES)
def test_recipes_are_strict_and_survive_being_resolved(name, tmp_path):
    recipe = load_recipe(Recipe, name)
    save_resolved(recipe, tmp_path / "recipe.toml")
    assert load_recipe(Recipe, tmp_path / "recipe.toml") == recipe
    assert architecture(recipe).max_positions >= recipe.data.length
    assert sum(sum(tokens.values()) for _, tokens in phases(recipe)) > 0


def test_the_published_hyper_parameters():
    for name, lr, tokens, warmup, steps in (
        ("nemotron-h-8b", 8e-4, "15T", "8.3B", 2_384_185), ("nemotron-h-56b", 4e-4, "20T", "25B", 3_178_914),
    ):  # fmt: skip
        recipe = load_recipe(Recipe, name)
        assert (recipe.optimizer.lr, recipe.data.tokens, recipe.schedule.warmup) == (lr, tokens, warmup)
        assert recipe.step_tokens == 6_291_456 and recipe.steps == steps and recipe.data.length == 8192
        assert recipe.optimizer.betas == (0.9, 0.95) and recipe.optimizer.weight_decay == 0.1
        assert recipe.schedule.kind == "cosine" and recipe.schedule.floor == 0.01
    assert load_recipe(Recipe, "nemotron-h-56b").precision.fp8
    hybrid, control = (architecture(load_recipe(Recipe, f"nemotron-{kind}-nano")) for kind in "ht")
    assert parameters(control) == pytest.approx(parameters(hybrid), rel=0.01) and 10e6 < parameters(hybrid) < 15e6


def test_the_four_nanos_differ_in_their_blocks_alone():
    names = ("nemotron-h-nano", "nemotron-t-nano", "mamba1-nano", "mamba2-nano")
    hybrid, *others = (load_recipe(Recipe, name) for name in names)
    for recipe in others:
        assert recipe.model_copy(update={"model": hybrid.model, "about": hybrid.about}) == hybrid
        assert parameters(architecture(recipe)) == pytest.approx(parameters(architecture(hybrid)), rel=0.01)
        assert architecture(recipe).hidden_size == architecture(hybrid).hidden_size


def test_cosine_and_wsd_are_functions_of_tokens():
    cosine = Schedule(kind="cosine", warmup="8.3B")
    assert rate(8.3e9, 15e12, 8e-4, cosine) == pytest.approx(8e-4)
    assert rate(4.15e9, 15e12, 8e-4, cosine) == pytest.approx(4e-4)
    middle = 8.3e9 + (15e12 - 8.3e9) / 2
    assert rate(middle, 15e12, 8e-4, cosine) == pytest.approx(8e-4 * (0.01 + 0.99 / 2))
    assert rate(15e12, 15e12, 8e-4, cosine) == pytest.approx(8e-6) == rate(16e12, 15e12, 8e-4, cosine)
    wsd = Schedule(kind="wsd", warmup=0.01, decay="3.6T")
    assert [rate(t, 20e12, 4.5e-4, wsd) for t in (1e12, 16.4e12)] == pytest.approx([4.5e-4] * 2)
    assert rate(18.2e12, 20e12, 4.5e-4, wsd) == pytest.approx(4.5e-4 * (1 - 0.99 / 2))
    assert rate(20e12, 20e12, 4.5e-4, wsd) == pytest.approx(4.5e-6)
    assert rate(1, 100, 1.0, Schedule(warmup=0.0)) == pytest.approx(0.01 + 0.99 * (1 + math.cos(math.pi / 100)) / 2)


def test_the_decay_table():
    named = Decoder(ARCH, device="meta").named_parameters()
    table = {re.sub(r"^blocks\.\d+\.", "", name): decays(name, p) for name, p in named}
    decayed = {name for name, yes in table.items() if yes}
    assert decayed == {
        "embed.weight", "head.weight", "mixer.in_proj.weight", "mixer.conv.weight", "mixer.out_proj.weight",
        "mixer.up.weight", "mixer.down.weight", *(f"mixer.{n}.weight" for n in "qkvo"),
    }  # fmt: skip
    assert not decays("blocks.0.mixer.A_log", torch.empty(8, 16, device="meta"))  # Mamba-1's is a matrix


def test_a_plan_by_hand():
    recipe = load_recipe(Recipe, "nemotron-h-8b")
    arch = architecture(recipe)
    plan = make_plan(recipe, arch, 1024, 989e12, 0.4)
    matrices = parameters(arch) - arch.vocab_size * arch.hidden_size  # the embedding multiplies nothing
    assert training_flops(arch, 8192) == pytest.approx(6 * matrices, rel=0.06)  # attention and scans on top
    assert plan.parameters == 8_100_852_736 and plan.state_bytes == 16 * plan.parameters / 1024
    assert plan.days == pytest.approx(plan.flops_per_token * plan.steps * 6_291_456 / (1024 * 989e12 * 0.4) / 86400)
    assert dict(phases(recipe))["4"]["sft"] == pytest.approx(380e9 * 31.8 / 99.9)


def test_the_56b_is_planned_on_a_laptop(capsys):
    assert cli.main(["plan", "nemotron-h-56b", "--gpus", "6144"]) == 0
    said = capsys.readouterr().out
    assert "118 blocks, 56,324,350,464 parameters" in said and "3,178,914 steps of 6,291,456 tokens" in said
    assert "phase 4" in said and "8 of them share a block" in said


def test_the_model_to_begin_from_is_named_once():
    parser = argparse.ArgumentParser()
    add_changes(parser)
    args = parser.parse_args(["--from", "some/model", "--tokens", "2M"])
    args.recipe = "sft-nano"
    recipe = read_recipe(args)
    assert (recipe.model, recipe.init, recipe.data.tokens) == ("some/model", "some/model", "2M")
    assert load_recipe(Recipe, "sft-nano").init == "runs/nemotron-h-nano/model"
    assert load_recipe(Recipe, "rpo-nano").prefers and not recipe.prefers


@pytest.mark.parametrize(("words", "sentence"), [
    (["nemotron-h-nan"], "Did you mean 'nemotron-h-nano'?"),
    (["nemotron-h-nano", "--tokens", "many"], "is no count of tokens"),
    (["nemotron-h-nano", "--set", "optimizer.lrr=1"], "Did you mean 'optimizer.lr'?"),
    (["nemotron-h-nano", "--tokens", "100"], "is less than one step"),
    (["nemotron-h-nano", "--set", "loss.kl=0.5"], "a distillation needs both"),
])  # fmt: skip
def test_what_is_not_possible_is_a_sentence(words, sentence, capsys):
    assert cli.main(["plan", *words]) == 2
    assert sentence in capsys.readouterr().err
