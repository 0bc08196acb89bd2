"""`intarsia compress` hands the pipeline what was typed, and shows what came out."""

from pathlib import Path

import pytest

from intarsia import cli
from intarsia.base.files import write_json
from intarsia.base.recipe import load_recipe, preset_names, save_resolved
from intarsia.commands import compress as command
from intarsia.commands.common import find_model
from intarsia.commands.summary import print_summary
from intarsia.compress.recipe import Recipe
from intarsia.compress.targets import parse_targets

FIGURE = {"value": 0.5, "se": 0.01}
SUMMARY = {
    "parent": {"parameters": 134_515_008},
    "child": {"parameters": 97_800_000},
    "speedup_measured": 1.34, "kl": 0.32, "kl_se": 0.011, "top1": 0.71,
    "bits_per_byte": {"parent": {"all": {"value": 0.9, "se": 0.006}}, "child": {"all": {"value": 0.946, "se": 0.006}}},
    "tasks": {"piqa": {"parent": {"value": 0.665, "se": 0.03}, "child": {"value": 0.635, "se": 0.03}}},
    "controls": {"uniform": {"speedup_measured": 1.33, "kl": 0.47, "tasks": {"piqa": FIGURE}}},
    "sample": {"prompt": "The harbour was", "parent": " quiet.", "child": " still."},
}  # fmt: skip


def recipe_of(*words: str) -> Recipe:
    args = cli.parser().parse_args(["compress", "parent", *words])
    return load_recipe(Recipe, args.recipe or args.preset or "quick", command.overrides(args))


@pytest.mark.parametrize("name", preset_names())
def test_presets_are_recipes_and_survive_being_resolved(name, tmp_path):
    recipe = load_recipe(Recipe, name)
    save_resolved(recipe, tmp_path / "recipe.toml")
    assert load_recipe(Recipe, tmp_path / "recipe.toml") == recipe


def test_targets_on_the_command_line_replace_the_presets():
    assert recipe_of("--preset", "demo").target == load_recipe(Recipe, "demo").target
    target = recipe_of("--preset", "demo", "--memory", "220MB", "--params", "100M", "--ttft", "0.25").target
    assert target.given() == {"memory": "220MB", "params": "100M", "ttft": 0.25}
    assert {t.kind: t.value for t in parse_targets(target.given())} == {"memory": 220e6, "params": 1e8, "ttft": 0.25}


def test_the_other_options_reach_the_recipe():
    assert recipe_of("--tournament", "5").tournament.finalists == 5
    settings = ("--set", "distill.lr=1e-5", "--set", "dtype=float32")
    recipe = recipe_of("--scenario", "4,128,16", "--data", "my texts", *settings)
    assert recipe.scenario == "4,128,16" and recipe.data.path == "my texts"
    assert recipe.distill.lr == 1e-5 and recipe.dtype == "float32"


@pytest.mark.parametrize(
    ("words", "parts"),
    [
        (["--preset", "dmo"], ["'dmo'", "Did you mean 'demo'?"]),
        (["--recipe", "demo"], ["there is no recipe"]),  # a file is never taken for a preset
        (["--set", "distil.lr=1"], ["'distil'", "'distill'", "--set distil.lr=1"]),
        (["--set", "distill.lr=fast"], ["'distill.lr'", "'fast'"]),
        (["--speedup", "fast"], ["'target.speedup'", "'fast'"]),
    ],
    ids=lambda value: " ".join(value) if value[0].startswith("--") else "",
)
def test_slips_are_answered_before_anything_is_loaded(words, parts, capsys):
    assert cli.main(["compress", "/no/such/parent", *words]) == 2
    sentence = capsys.readouterr().err
    assert all(part in sentence for part in parts), sentence


def test_what_the_pipeline_is_given(tmp_path, monkeypatch, capsys):
    given = {}

    def pipeline(**arguments):
        given.update(arguments)
        write_json(Path(arguments["out"]) / "summary.json", SUMMARY)
        return SUMMARY

    module = pytest.importorskip("intarsia.compress.pipeline", reason="the pipeline is not there yet")
    monkeypatch.setattr(module, "compress", pipeline)
    parent, out = tmp_path / "parent", tmp_path / "run"
    parent.mkdir()
    assert cli.main(["compress", str(parent), "--preset", "demo", "--controls", "--out", str(out)]) == 0
    assert given == {"parent": parent, "recipe": load_recipe(Recipe, "demo"), "out": out, "controls": True}
    shown = capsys.readouterr().out
    assert "1.34 x" in shown and f"report: {out / 'report.html'}" in shown


def test_the_table_has_a_column_a_model(capsys):
    print_summary(SUMMARY)
    lines = {line.split("  ")[0].strip(): line.split() for line in capsys.readouterr().out.splitlines() if line.strip()}
    assert ["parent", "child", "uniform"] in lines.values()
    assert lines["speed"] == ["speed", "1.00", "x", "1.34", "x", "1.33", "x"]
    assert lines["parameters"] == ["parameters", "134.5", "M", "97.8", "M"]
    assert lines["KL (nats)"] == ["KL", "(nats)", "0.320", "±", "0.011", "0.470"]
    assert lines["piqa"] == ["piqa", "0.665", "±", "0.030", "0.635", "±", "0.030", "0.500", "±", "0.010"]
    assert "child continues:" in lines and "still." in lines


def test_a_summary_with_little_in_it_is_shown(capsys):
    print_summary({"child": {}, "parent": {"parameters": 1e6}, "kl": 0.5})
    assert "0.500" in capsys.readouterr().out


def test_a_run_folder_stands_for_its_child(tmp_path):
    (tmp_path / "child").mkdir()
    (tmp_path / "run.json").write_text("{}")
    assert find_model(str(tmp_path)) == tmp_path / "child"
    assert find_model(str(tmp_path / "child")) == tmp_path / "child"
