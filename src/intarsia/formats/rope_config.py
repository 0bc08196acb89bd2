"""Rotary positions in config.json, in the old spelling (`rope_theta` + `rope_scaling`) and that of transformers 5
(`rope_parameters`)."""

from __future__ import annotations

from typing import Any

from intarsia.arch import Rope
from intarsia.base.errors import IntarsiaError

KNOWN = ("default", "linear", "llama3", "yarn", "longrope")
_NOT_SCALING = {"rope_theta", "type", "rope_type", "partial_rotary_factor"}


def rope_from_config(config: dict[str, Any]) -> Rope:
    """The precedence of transformers: `rope_scaling` over `rope_parameters`, theta inside it over theta outside."""
    given = config.get("rope_scaling") or config.get("rope_parameters") or {}
    if any(isinstance(value, dict) for value in given.values()):
        raise IntarsiaError("this model uses different rotary positions in different layers, which is not supported.")
    if (given.get("partial_rotary_factor") or config.get("partial_rotary_factor") or 1) != 1:
        raise IntarsiaError("this model rotates a part of each head only (partial_rotary_factor): not supported.")
    theta = float(given.get("rope_theta") or config.get("rope_theta") or 10_000.0)
    name = given.get("rope_type") or given.get("type") or "default"
    if name not in KNOWN:
        raise IntarsiaError(f"RoPE scaling {name!r} is not known; known: {', '.join(KNOWN[1:])}.")
    if name == "default":
        return Rope(theta)
    scaling = {key: value for key, value in given.items() if key not in _NOT_SCALING and value is not None}
    if name in ("llama3", "yarn", "longrope"):
        outside = config.get("original_max_position_embeddings")
        original = outside or scaling.get("original_max_position_embeddings") or config.get("max_position_embeddings")
        scaling["original_max_position_embeddings"] = original
        if name == "yarn":
            scaling.setdefault("factor", config.get("max_position_embeddings", original) / original)
    return Rope(theta, {"rope_type": name, **scaling})


def rope_to_config(rope: Rope) -> dict[str, Any]:
    """The old spelling: transformers 4 and 5 and the servers all read it."""
    fields: dict[str, Any] = {"rope_theta": rope.theta}
    if rope.scaling and rope.scaling.get("rope_type", "default") != "default":
        fields["rope_scaling"] = dict(rope.scaling)
    return fields
