"""Recipes are strict: every slip gets a sentence, and what is saved reads back the same."""

import math
import tomllib
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import Field, field_validator

from intarsia.base.errors import IntarsiaError
from intarsia.base.recipe import Strict, load_recipe, parse_override, preset_names, save_resolved, to_toml


class Distill(Strict):
    tokens: int = 1000
    learning_rate: float = 1e-4
    losses: tuple[str, ...] = ("kl",)


class Example(Strict):
    scenario: str = "1,512,64"
    target: dict[str, float | str] = Field(default_factory=dict)
    distill: Distill = Distill()
    optional: Distill | None = None
    either: float | str = 1.0
    folder: Path | None = None
    share: float = Field(0.5, ge=0, le=1)

    @field_validator("scenario")
    @classmethod
    def _three(cls, value: str) -> str:
        if len(value.split(",")) != 3:
            raise ValueError("a scenario is batch,prompt,generated")
        return value


def load(text: str, tmp_path: Path, *overrides: str) -> Example:
    path = tmp_path / "r.toml"
    path.write_text(text)
    return load_recipe(Example, path, overrides)


def refusal(text: str, tmp_path: Path, *overrides: str) -> str:
    with pytest.raises(IntarsiaError) as error:
        load(text, tmp_path, *overrides)
    return str(error.value)


def test_values_from_file_defaults_and_overrides(tmp_path):
    recipe = load(
        "[distill]\ntokens = 5\n", tmp_path, "distill.learning_rate=3", 'target={ memory = "220MB", speedup = 2 }',
        "distill.losses=['kl', 'cosine']", "scenario=1,128,8", "folder=some/where", "optional.tokens=7",
    )  # fmt: skip
    assert recipe.distill == Distill(tokens=5, learning_rate=3.0, losses=("kl", "cosine"))
    assert recipe.target == {"memory": "220MB", "speedup": 2}
    assert recipe.scenario == "1,128,8" and recipe.folder == Path("some/where") and recipe.optional.tokens == 7
    assert load_recipe(Example) == Example()


def test_a_later_override_wins(tmp_path):
    assert load("", tmp_path, "distill.tokens=1", "distill.tokens=2").distill.tokens == 2


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("a=1", 1), ("a=1.5", 1.5), ("a=true", True), ("a=[1, 2]", [1, 2]), ("a=plain words", "plain words"),
        ('a="1"', "1"), ("a=", ""), ("a=x=y", "x=y"), ("a=1\nb=2", "1\nb=2"),
    ],
)  # fmt: skip
def test_override_values_are_toml_else_text(text, expected):
    keys, value = parse_override(text)
    assert keys == ("a",) and value == expected and type(value) is type(expected)


@pytest.mark.parametrize("text", ["", "=1", "a", "a..b=1", ".a=1"])
def test_an_override_that_is_none(text):
    with pytest.raises(IntarsiaError, match="key=value"):
        parse_override(text)


def test_unknown_keys_name_the_nearest_and_the_place(tmp_path):
    path = str(tmp_path / "r.toml")
    sentence = refusal("[distill]\ntoken = 5\n", tmp_path)
    assert "'distill.token'" in sentence and "'distill.tokens'" in sentence and path in sentence
    assert "'distill.learning_rate'" in refusal("learning_rate = 1.0\n", tmp_path)  # right name, wrong table
    assert "--set shar=1" in refusal("", tmp_path, "shar=1") and "'share'" in refusal("", tmp_path, "shar=1")
    assert "'optional.tokens'" in refusal("", tmp_path, "optional.tokns=1")
    assert "Known there: tokens, learning_rate, losses" in refusal("[distill]\nqqq = 1\n", tmp_path)


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        ('[distill]\ntokens = "5"', ["'distill.tokens'", "integer", "'5'"]),
        ("either = [1]", ["'either'", "number", "string"]),
        ("[distill]\nlosses = ['kl', 1]", ["'distill.losses'", "string", "given: 1"]),
        ("[distill]\ntokens = 1.5", ["'distill.tokens'", "1.5"]),
        ("[distill]\ntokens = true", ["'distill.tokens'", "integer", "True"]),
        ("share = 2.0", ["'share'", "less than or equal to 1"]),
        ('scenario = "1,2"', ["a scenario is batch,prompt,generated", "'1,2'"]),
        ("distill = 5", ["'distill'"]),
        ("[distill", ["not readable as TOML", "r.toml"]),
    ],
)
def test_wrong_values_are_sentences(text, parts, tmp_path):
    sentence = refusal(text, tmp_path)
    assert all(part in sentence for part in parts) and "pydantic" not in sentence, sentence


def test_several_faults_are_told_at_once(tmp_path):
    sentence = refusal("[distill]\ntoken = 5\nlearning_rate = 'x'\n", tmp_path)
    assert "'distill.token'" in sentence and "'distill.learning_rate'" in sentence


def test_an_override_below_a_value(tmp_path):
    assert "is a value" in refusal('scenario = "1,2,3"', tmp_path, "scenario.batch=2")


def test_presets_by_name(tmp_path):
    assert {"demo", "quick", "full"} <= set(preset_names())
    with pytest.raises(IntarsiaError, match="Did you mean 'demo'"):
        load_recipe(Example, "dmo")
    with pytest.raises(IntarsiaError, match="there is no recipe"):
        load_recipe(Example, tmp_path / "absent.toml")


scalars = st.integers(-(2**63), 2**63 - 1) | st.booleans() | st.floats(allow_nan=False) | st.text()
tables = st.recursive(
    st.dictionaries(st.text(), scalars | st.lists(scalars, max_size=3), max_size=4),
    lambda inner: st.dictionaries(st.text(), scalars | inner | st.lists(inner, max_size=2), max_size=3),
    max_leaves=8,
)


@given(tables)
def test_the_writer_is_read_back_by_tomllib(value):
    assert tomllib.loads(to_toml(value)) == value


def test_nan_is_written_as_toml():
    assert math.isnan(tomllib.loads(to_toml({"x": math.nan}))["x"])


def test_resolved_recipes_read_back(tmp_path):
    recipe = load("share = 0.25\n", tmp_path, "optional.losses=['a']", "target.speedup=1.5", "folder=x y")
    save_resolved(recipe, tmp_path / "resolved.toml")
    assert load_recipe(Example, tmp_path / "resolved.toml") == recipe
    assert "learning_rate = 0.0001" in (tmp_path / "resolved.toml").read_text()  # defaults are written out
