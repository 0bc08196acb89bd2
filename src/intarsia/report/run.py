"""Read a run folder: the summary where the run has finished, the stages it got through where it has not."""

from __future__ import annotations

import json
import tomllib
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from intarsia.arch import (
    Architecture,
    Attention,
    Block,
    Experts,
    FeedForward,
    Mamba1,
    Mamba2,
    block_from_dict,
    block_parameters,
    pair_layers,
)
from intarsia.base.errors import IntarsiaError
from intarsia.base.files import read_json
from intarsia.report.wording import finite

FORMAT = 1


@dataclass(frozen=True)
class Run:
    """What the report is drawn from. Anything may be missing: an unfinished run has an empty `summary`."""

    folder: Path
    summary: dict[str, Any] = field(default_factory=dict)
    environment: dict[str, Any] = field(default_factory=dict)
    recipe: str = ""
    stages: dict[str, dict[str, Any]] = field(default_factory=dict)


def read_run(folder: Path) -> Run:
    """Read the files of a run folder. Raises `IntarsiaError` where there is none or its summary cannot be used."""
    if not folder.is_dir():
        raise IntarsiaError(f"{folder} is no folder: give the run folder that `intarsia compress --out` made.")
    if not any((folder / name).exists() for name in ("summary.json", "recipe.toml", "stages")):
        raise IntarsiaError(
            f"{folder} is no run folder: it holds neither summary.json nor recipe.toml nor stages. "
            "Give the folder that `intarsia compress --out` made."
        )
    summary = _object(folder / "summary.json")
    if summary and summary.get("format") != FORMAT:
        raise IntarsiaError(
            f"{folder / 'summary.json'} has format {summary.get('format')!r}; this version of Intarsia reads format "
            f"{FORMAT}. Draw the report with the version that made the run ({summary.get('intarsia', 'unknown')})."
        )
    recipe = folder / "recipe.toml"
    return Run(
        folder=folder,
        summary=summary,
        environment=_object(folder / "environment.json"),
        recipe=recipe.read_text(encoding="utf-8", errors="replace") if recipe.exists() else "",
        stages={p.parent.name: _object(p) for p in sorted((folder / "stages").glob("*/done.json"))},
    )


def _object(path: Path) -> dict[str, Any]:
    if not path.exists():
        return {}
    value = read_json(path)
    if not isinstance(value, dict):
        raise IntarsiaError(f"{path} holds a {type(value).__name__} where an object belongs. Run the command again.")
    return value


def flat(value: Any, prefix: str = "") -> list[tuple[str, str]]:
    """Nested settings as (dotted name, text) rows."""
    if isinstance(value, dict):
        return [row for key, v in value.items() for row in flat(v, f"{prefix}.{key}" if prefix else str(key))]
    shown = ", ".join(map(str, value)) if isinstance(value, list) else value
    return [(prefix, shown if isinstance(shown, str) else json.dumps(shown))]


def flat_recipe(text: str) -> list[tuple[str, str]]:
    try:
        return flat(tomllib.loads(text))
    except tomllib.TOMLDecodeError:
        return []


# ---------------------------------------------------------------------------------------------- what stands at a site


@dataclass(frozen=True)
class Site:
    """One slot of one layer: what stands there, and how much of the parent's block that is."""

    layer: int
    slot: str  # attention or ffn
    option: str
    state: str  # kept, smaller, mamba (in place of attention), linear, folded (for several layers), covered, absent
    share: float  # parameters of the block over those of the parent's, norms left out; 0 .. 1
    original: str


def parent_slots(summary: dict[str, Any]) -> list[dict[str, Block | None]]:
    """The parent's own attention and FFN, layer by layer; empty when the summary does not tell."""
    described = (summary.get("parent") or {}).get("architecture")
    if not described:
        return []
    blocks = Architecture.from_dict(described).blocks
    take = [(None if a is None else blocks[a], None if f is None else blocks[f]) for a, f in pair_layers(blocks)]
    return [{"attention": a, "ffn": f} for a, f in take]


def share_left(block: Block | None, original: Block | None, hidden_size: int) -> float:
    if block is None:
        return 0.0
    if original is None:
        return 1.0
    left = block_parameters(block, hidden_size) - hidden_size
    return min(1.0, left / (block_parameters(original, hidden_size) - hidden_size))


def sites(summary: dict[str, Any], rows: list[dict[str, Any]]) -> list[Site]:
    """Two sites a layer from the `sites` of the child or of a control."""
    parents = parent_slots(summary)
    hidden_size = ((summary.get("parent") or {}).get("architecture") or {}).get("hidden_size", 1)
    result = []
    for row in rows or []:
        layer = int(row["layer"])
        for slot in ("attention", "ffn"):
            described = row.get(slot) or {}
            block = block_from_dict(described["block"]) if described.get("block") else None
            original = parents[layer][slot] if layer < len(parents) else None
            if block is None and original is None:
                continue
            said = described.get("option") or ""
            state = _state(block, original, said)
            option = said or block.label if block is not None else "covered" if state == "covered" else "absent"
            name = original.label if original is not None else "nothing"
            result.append(Site(layer, slot, option, state, share_left(block, original, hidden_size), name))
    return result


def _state(block: Block | None, original: Block | None, option: str) -> str:
    if block is None:
        return "covered" if option == "covered" else "absent"
    if option.startswith("fold"):
        return "folded"
    if block == original:
        return "kept"
    if isinstance(block, (Mamba1, Mamba2)):
        return "mamba"
    return "smaller" if isinstance(block, (Attention, Experts, FeedForward)) else "linear"


def option_state(option: str, original: Block | None) -> str:
    """The same states from an option's name alone, as the rows of the library give it."""
    if option in ("kept", "parent") or (original is not None and option == original.label):
        return "kept"
    for state in ("linear", "mamba"):
        if option.startswith(state):
            return state
    return "smaller" if option.startswith(("attention", "experts", "ffn")) else "absent"


@dataclass(frozen=True)
class Contender:
    """A model on the report: the parent, the child, or a control, with its mark."""

    name: str
    shape: str
    class_: str
    data: dict[str, Any]

    def value(self, key: str) -> float | None:
        return finite(self.data.get(key))


MARKS = {"uniform": "square", "depth": "triangle", "greedy": "diamond", "random": "cross"}


def contenders(summary: dict[str, Any]) -> list[Contender]:
    """Child first, then the controls in the order of the summary."""
    result = [Contender("child", "circle", "k-child", summary)] if finite(summary.get("kl")) is not None else []
    spare = iter(["square", "triangle", "diamond", "cross"] * 8)
    for number, (name, data) in enumerate((summary.get("controls") or {}).items()):
        shape = MARKS.get(name) or next(spare)
        result.append(Contender(name, shape, f"k-{name if name in MARKS else f'other{number % 2}'}", data or {}))
    return result
