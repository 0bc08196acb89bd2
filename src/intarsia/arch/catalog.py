"""Published models by name, as data (`catalog.toml`): their shapes, without their weights."""

from __future__ import annotations

import functools
import tomllib
from importlib import resources
from typing import Any

from intarsia.arch.architecture import Architecture, Rope
from intarsia.arch.blocks import block_from_dict
from intarsia.arch.pattern import parse_pattern
from intarsia.base.errors import IntarsiaError, did_you_mean


def names() -> list[str]:
    """The names that `get` knows, in the catalog's order."""
    return list(_entries())


def title(name: str) -> str:
    """What its makers call a model."""
    return _entry(name)["title"]


def source(name: str) -> str:
    """Where the shape is published."""
    return _entry(name)["source"]


def get(name: str) -> Architecture:
    """The architecture of a published model. Raises `IntarsiaError` with the nearest name for an unknown one."""
    entry = _whole(name)
    blocks = {letter: block_from_dict(block) for letter, block in entry["blocks"].items()}
    pattern = entry["pattern"].replace(" ", "") * entry.get("repeat", 1)
    rope = entry.get("rope")
    return Architecture(
        hidden_size=entry["hidden_size"], vocab_size=entry["vocab_size"], blocks=parse_pattern(pattern, blocks),
        norm_eps=entry.get("norm_eps", 1e-5), rope=Rope(rope["theta"], rope.get("scaling")) if rope else None,
        max_positions=entry["max_positions"], family=entry["family"],
    )  # fmt: skip


@functools.cache
def _entries() -> dict[str, dict[str, Any]]:
    return tomllib.loads(resources.files("intarsia.arch").joinpath("catalog.toml").read_text(encoding="utf-8"))


def _whole(name: str) -> dict[str, Any]:
    """An entry with what it takes from the one that it is `like`."""
    entry = _entry(name)
    if "like" not in entry:
        return entry
    parent = _whole(entry["like"])
    return {**parent, **entry, "blocks": {**parent["blocks"], **entry.get("blocks", {})}}


def _entry(name: str) -> dict[str, Any]:
    entries = _entries()
    if name not in entries:
        raise IntarsiaError(f"the catalog has no model '{name}'; it has {', '.join(entries)}."
                            f"{did_you_mean(name, entries)}")
    return entries[name]
