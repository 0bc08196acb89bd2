"""Recipes: typed objects, strict in TOML, overridable from the command line, saved resolved beside their outputs.

A recipe is a pydantic model built on `Strict`. Nothing unknown is ignored and nothing is guessed: a wrong key is
answered with the nearest known one, a wrong value with what may stand there.
"""

from __future__ import annotations

import difflib
import json
import os
import tomllib
from collections.abc import Iterable, Iterator
from importlib import resources
from pathlib import Path
from typing import Any, ClassVar, TypeVar, get_args

from pydantic import BaseModel, ConfigDict, ValidationError

from intarsia.base.errors import IntarsiaError, did_you_mean
from intarsia.base.files import write_text

Tables = dict[str, Any]
Keys = tuple[str, ...]


class Strict(BaseModel):
    """What every table of a recipe inherits: unknown keys are errors, values keep their type, nothing changes later."""

    model_config = ConfigDict(extra="forbid", frozen=True)
    PRESETS: ClassVar[str] = ""  # the folder within `recipes` where those of this kind are


R = TypeVar("R", bound=BaseModel)


def load_recipe(model: type[R], source: str | os.PathLike | None = None, overrides: Iterable[str] = ()) -> R:
    """A recipe from a preset's name or a TOML file (None: the defaults), with `a.b=c` overrides laid over it.

    The value of an override is read as TOML where it is TOML (`8`, `1.5`, `true`, `[1, 2]`, `{ x = 1 }`), and as a
    string otherwise. Raises `IntarsiaError` for a preset, file, key or value that is not possible.
    """
    tables, name = ({}, "the defaults") if source is None else _read(source, model.PRESETS)
    changed: dict[Keys, str] = {}
    for override in overrides:
        keys, value = parse_override(override)
        _assign(tables, keys, value, override)
        changed[keys] = f"--set {override}"
    try:
        # By way of JSON: pydantic is then strict about types, and still takes a list for a tuple and text for a path.
        return model.model_validate_json(json.dumps(tables, default=str), strict=True)
    except ValidationError as error:
        raise IntarsiaError(_explain(model, error, name, changed)) from error


def preset_names(kind: str = "") -> list[str]:
    """The recipes of one kind that come with the package."""
    return sorted(f.name.removesuffix(".toml") for f in _presets(kind).iterdir() if f.name.endswith(".toml"))


def _presets(kind: str):
    folder = resources.files("intarsia") / "recipes"
    return folder / kind if kind else folder


def _read(source: str | os.PathLike, kind: str) -> tuple[Tables, str]:
    """The tables of a preset or file, and how to call it in a sentence."""
    text, names = os.fspath(source), preset_names(kind)
    if os.sep in text or text.endswith(".toml"):
        path = Path(text).expanduser()
        if not path.is_file():
            raise IntarsiaError(f"there is no recipe {path}. Presets, given by name: {', '.join(names)}.")
        content, name = path.read_bytes(), str(path)
    elif text in names:
        content, name = (_presets(kind) / f"{text}.toml").read_bytes(), f"preset {text}"
    else:
        raise IntarsiaError(
            f"there is no preset '{text}'; presets: {', '.join(names)}."
            f"{did_you_mean(text, names)} A recipe of your own is a file ending in .toml."
        )
    try:
        return tomllib.loads(content.decode("utf-8")), name
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise IntarsiaError(f"{name} is not readable as TOML: {error}.") from error


def parse_override(text: str) -> tuple[Keys, Any]:
    """`a.b=c` -> (("a", "b"), value): the value as TOML if it is TOML, else the text itself."""
    path, equals, value = text.partition("=")
    keys = tuple(key.strip() for key in path.split("."))
    if not equals or not all(keys):
        raise IntarsiaError(f"'{text}' is no setting: write it as key=value or table.key=value.")
    try:
        read = tomllib.loads(f"value = {value}")
    except tomllib.TOMLDecodeError:
        return keys, value.strip()
    return keys, read["value"] if len(read) == 1 else value


def _assign(tables: Tables, keys: Keys, value: Any, override: str) -> None:
    for depth, key in enumerate(keys[:-1], 1):
        tables = tables.setdefault(key, {})
        if not isinstance(tables, dict):
            raise IntarsiaError(f"--set {override}: {'.'.join(keys[:depth])} is a value and has no keys below it.")
    tables[keys[-1]] = value


def _explain(model: type[BaseModel], error: ValidationError, name: str, changed: dict[Keys, str]) -> str:
    """All faults of a recipe, a sentence each."""
    sentences, known = [], dict(_known_keys(model))
    for fault in error.errors():
        keys = tuple(str(part) for part in fault["loc"])
        # Of an override, either its key is at fault, or the table above, or something within its value.
        where = next((text for set_, text in changed.items() if keys and all(map(str.__eq__, keys, set_))), name)
        path = ".".join(keys)
        if path.rpartition(".")[0] in known and path not in known and fault["type"] != "extra_forbidden":
            path = path.rpartition(".")[0]  # pydantic adds which of several possible types it tried, or an index
        if fault["type"] == "extra_forbidden":
            sentences.append(f"{where}: unknown key '{path}'.{_nearest(model, keys)}")
        elif fault["type"] == "missing":
            sentences.append(f"{where}: '{path}' is missing.")
        else:
            message = fault["msg"].removeprefix("Value error, ").removeprefix("Input ").rstrip(".")
            given = f" (given: {fault['input']!r})" if keys and not isinstance(fault["input"], dict) else ""
            sentences.append(f"{where}: {f'{path!r} ' if keys else ''}{message}{given}.")
    return " ".join(dict.fromkeys(sentences))


def _nearest(model: type[BaseModel], keys: Keys) -> str:
    """What the writer of an unknown key most likely meant: a neighbour in its table, or the same name in another."""
    known = dict(_known_keys(model))
    table, name = ".".join(keys[:-1]), keys[-1]
    siblings = {path.rpartition(".")[2]: path for path, above in known.items() if above == table}
    anywhere = {path.rpartition(".")[2]: path for path in reversed(known)}  # of equal names, the first
    for names in (siblings, anywhere):
        if near := difflib.get_close_matches(name, names, n=1):
            return f" Did you mean '{names[near[0]]}'?"
    return f" Known there: {', '.join(siblings)}." if siblings else ""


def _known_keys(model: type[BaseModel], above: str = "") -> Iterator[tuple[str, str]]:
    """(full key, its table) for every key of a recipe, nested tables included."""
    for name, field in model.model_fields.items():
        path = f"{above}.{name}" if above else name
        yield path, above
        for part in (field.annotation, *get_args(field.annotation)):
            if isinstance(part, type) and issubclass(part, BaseModel):
                yield from _known_keys(part, path)


def save_resolved(recipe: BaseModel, path: str | os.PathLike) -> None:
    """Write every value of a recipe as TOML, defaults included; `load_recipe` reads it back. None is left out."""
    write_text(path, to_toml(recipe.model_dump(mode="json", exclude_none=True)))


def to_toml(tables: Tables, above: Keys = ()) -> str:
    """Tables of numbers, strings, booleans, lists and tables as TOML text."""
    flat = {k: v for k, v in tables.items() if not isinstance(v, dict)}
    lines = [f"[{'.'.join(map(_key, above))}]"] if above and (flat or not tables) else []
    lines += [f"{_key(key)} = {_value(value)}" for key, value in flat.items()]
    parts = ["\n".join(lines) + "\n"] if lines else []
    parts += [to_toml(value, (*above, key)) for key, value in tables.items() if isinstance(value, dict)]
    return "\n".join(parts)


def _key(key: str) -> str:
    bare = key.replace("-", "").replace("_", "")
    return key if bare.isascii() and bare.isalnum() else _text(key)


def _text(text: str) -> str:
    # A JSON string is a TOML basic string, but for DEL, which TOML wants escaped.
    return json.dumps(text, ensure_ascii=False).replace("\x7f", "\\u007f")


def _value(value: Any) -> str:
    if isinstance(value, dict):
        return "{ " + ", ".join(f"{_key(k)} = {_value(v)}" for k, v in value.items()) + " }"
    if isinstance(value, (list, tuple)):
        return "[" + ", ".join(map(_value, value)) + "]"
    if isinstance(value, str):
        return _text(value)
    if isinstance(value, float):
        return repr(value)  # repr also spells inf and nan as TOML does
    return json.dumps(value)  # integers and booleans
