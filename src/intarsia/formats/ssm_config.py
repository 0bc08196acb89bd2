"""What the configs of all Mamba families have in common: bounds of the time step, kernel activations, uniform kinds."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

from intarsia.arch import Block, Mamba2
from intarsia.base.errors import IntarsiaError


def time_limits(config: dict[str, Any]) -> tuple[float, float | None]:
    """`time_step_limit` as (dt_min, dt_max), None for no bound. The fields `time_step_min`, `_max` and `_floor` only
    shape the initialisation and are not read: transformers takes one of them for a bound (transformers #48989)."""
    limit = config.get("time_step_limit")
    if limit is None:
        return 0.0, None
    try:
        low, high = (_number(value) for value in limit)
    except (TypeError, ValueError) as error:
        raise IntarsiaError(f"time_step_limit must be two numbers, its bounds; given: {limit}.") from error
    if not 0 <= low <= high:
        raise IntarsiaError(f"time_step_limit must be two bounds, 0 <= lower <= upper; given: {limit}.")
    return low, None if math.isinf(high) else high


def _number(value: Any) -> float:
    # transformers 5 spells infinity as a dict, because JSON knows no infinity.
    return float(value["__float__"] if isinstance(value, dict) else value)


def limits_to_config(block: Mamba2) -> dict[str, Any]:
    """`time_step_limit` where there is a bound. No bound is what every reader assumes, and is left out because a strict
    JSON parser refuses the infinity that would stand there."""
    if block.dt_min == 0 and block.dt_max is None:
        return {}
    return {"time_step_limit": [block.dt_min, math.inf if block.dt_max is None else block.dt_max]}


def need_silu(config: dict[str, Any], *fields: str) -> None:
    """Our Mamba blocks know one activation."""
    for field in fields:
        if config.get(field, "silu") not in ("silu", "swish"):
            raise IntarsiaError(f"{field} {config[field]!r} is not possible in a Mamba block; known: silu.")


def need_fields(config: dict[str, Any], *fields: str) -> None:
    """Raise `IntarsiaError` for the first field that config.json lacks."""
    for field in fields:
        if config.get(field) is None:
            raise IntarsiaError(f"config.json of this {config.get('model_type')} model lacks {field!r}.")


def first(blocks: Iterable[Block], cls: type) -> Any:
    """The first block of a kind; None if there is none."""
    return next((b for b in blocks if isinstance(b, cls)), None)


def differing(blocks: Iterable[Block], *kinds: type) -> type | None:
    """The first of these kinds whose blocks are not all equal; None if every kind is uniform."""
    blocks = list(blocks)
    return next((cls for cls in kinds if len({b for b in blocks if isinstance(b, cls)}) > 1), None)
