"""Every family of Hugging Face folders that is read and written: config <-> Architecture, tensor names, what fits."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from intarsia.arch import Architecture
from intarsia.base.errors import IntarsiaError
from intarsia.formats import backbone, families, granite_hybrid, mamba_families, nemotron_h, nemotron_h_puzzle
from intarsia.formats import nemotron_nas as nas
from intarsia.formats.layout import Layout, our_shapes, whole


@dataclass(frozen=True)
class Family:
    """One format of config.json and its tensors.

    `read`: config -> Architecture; `config`: its inverse; `why_not`: None where it can express an architecture, else
    the reason as the end of a sentence; `layout`: where the tensors lie; `canonical`: a stored name as the layout has
    it.
    """

    read: Callable[[dict[str, Any]], Architecture]
    config: Callable[[Architecture], dict[str, Any]]
    why_not: Callable[[Architecture], str | None]
    layout: Callable[[Architecture], Layout]
    canonical: Callable[[str], str] = str


def _stock(name: str) -> Family:
    return Family(
        families.architecture_from_config,
        functools.partial(families.config_from_architecture, family=name),
        functools.partial(families.why_not, family=name),
        families.layout,
    )


def _mamba(name: str) -> Family:
    return Family(
        mamba_families.from_config,
        functools.partial(mamba_families.to_config, family=name),
        functools.partial(mamba_families.why_not, family=name),
        backbone.layout,
        backbone.canonical,
    )


def _read_ours(config: dict[str, Any]) -> Architecture:
    return Architecture.from_dict(config.get("architecture") or {})


def _our_config(arch: Architecture) -> dict[str, Any]:
    """Our own format is the architecture itself; the fields beside it are what generic tools look for."""
    return {
        "model_type": "intarsia",
        "architectures": ["IntarsiaForCausalLM"],
        "architecture": arch.to_dict(),
        "vocab_size": arch.vocab_size,
        "hidden_size": arch.hidden_size,
        "max_position_embeddings": arch.max_positions,
        "tie_word_embeddings": arch.tied_embeddings,
    }


def _our_layout(arch: Architecture) -> Layout:
    return {name: whole(name, shape) for name, shape in our_shapes(arch).items()}


def _our_name(source: str) -> str:
    # transformers writes its wrapper's attribute in front of our names (intarsia.hf).
    return source.removeprefix("decoder.")


_puzzle = nemotron_h_puzzle
FAMILIES: dict[str, Family] = {
    **{name: _stock(name) for name in families.CLASSES},
    nas.MODEL_TYPE: Family(nas.from_config, nas.to_config, nas.why_not, nas.layout),
    nemotron_h.MODEL_TYPE: Family(
        nemotron_h.from_config, nemotron_h.to_config, nemotron_h.why_not, backbone.layout, backbone.canonical
    ),
    _puzzle.MODEL_TYPE: Family(
        _puzzle.from_config, _puzzle.to_config, _puzzle.why_not,
        functools.partial(backbone.layout, prefix=_puzzle.PREFIX),
        functools.partial(backbone.canonical, prefix=_puzzle.PREFIX),
    ),
    granite_hybrid.MODEL_TYPE: Family(
        granite_hybrid.from_config, granite_hybrid.to_config, granite_hybrid.why_not, granite_hybrid.layout
    ),
    **{name: _mamba(name) for name in mamba_families.CLASSES},
    "intarsia": Family(_read_ours, _our_config, lambda arch: None, _our_layout, _our_name),
}  # fmt: skip
_NOT_READ = {
    "bamba": "it rotates half of every attention head, which is not supported; granitemoehybrid is the family like it "
    "that is",
}
# Where a model goes whose own family cannot express it: what stock readers load comes first.
_HYBRIDS = (granite_hybrid.MODEL_TYPE, nemotron_h.MODEL_TYPE, nemotron_h_puzzle.MODEL_TYPE)
# Families that transformers itself knows.
STOCK = (*families.CLASSES, nemotron_h.MODEL_TYPE, granite_hybrid.MODEL_TYPE, *mamba_families.CLASSES)


def family_of(name: Any) -> Family:
    """The family of this `model_type`. Raises `IntarsiaError` if it is not known."""
    if name in _NOT_READ:
        raise IntarsiaError(f"model_type {name!r} is not read: {_NOT_READ[name]}.")
    if name not in FAMILIES:
        raise IntarsiaError(f"model_type {name!r} is not known; known: {', '.join(FAMILIES)}.")
    return FAMILIES[name]


def natural_family(arch: Architecture) -> str:
    """The family to write an architecture in: its own if that can express it exactly, else the first hybrid family that
    can, else `intarsia`."""
    own = (arch.family,) if arch.family in STOCK else ()
    return next((name for name in (*own, *_HYBRIDS) if FAMILIES[name].why_not(arch) is None), "intarsia")
