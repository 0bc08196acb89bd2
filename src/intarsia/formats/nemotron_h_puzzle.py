"""nemotron_h_puzzle: nemotron_h with layers of unequal widths.

`block_configs` holds one dict for each layer: its `block_type` and the fields of nemotron_h in which it differs from
the fields around it. Read by vLLM, TensorRT-LLM, SGLang and llama.cpp; published example: Nemotron Labs 3 Puzzle
75B-A9B, whose tensors are named `model.*`.
"""

from __future__ import annotations

import math
from typing import Any

from intarsia.arch import Architecture, Attention, Block, Mamba2
from intarsia.base.errors import IntarsiaError
from intarsia.formats import nemotron_h

MODEL_TYPE = "nemotron_h_puzzle"
PREFIX = "model"
# Fields that stand in every block of the type, be they equal or not: published readers want them there.
_ALWAYS = {
    "attention": {"sliding_window"},
    "mlp": {"intermediate_size"},
    "moe": {
        "n_routed_experts", "num_experts_per_tok", "moe_intermediate_size", "moe_shared_expert_intermediate_size",
    },
}  # fmt: skip
_GLOBAL = {"mlp_hidden_act", "n_shared_experts"}  # one value for the whole model


def from_config(config: dict[str, Any]) -> Architecture:
    """The architecture that config.json describes. Raises `IntarsiaError` as `nemotron_h.from_config` does."""
    layers = config.get("block_configs")
    if not isinstance(layers, list) or not all(isinstance(layer, dict) and "block_type" in layer for layer in layers):
        raise IntarsiaError(f"config.json of this {MODEL_TYPE} model lacks 'block_configs' with 'block_type' in each.")
    types = nemotron_h.known_types([layer["block_type"] for layer in layers])
    pattern = config.get("hybrid_override_pattern")
    if pattern is not None and nemotron_h.types_of_pattern(pattern) != types:
        raise IntarsiaError("hybrid_override_pattern and block_configs tell different layers; keep one of them.")
    count = config.get("num_hidden_layers")
    if count is not None and count != len(layers):
        raise IntarsiaError(f"num_hidden_layers is {count}; block_configs has {len(layers)} entries: they contradict.")
    around = nemotron_h.with_defaults(config)
    blocks = [
        nemotron_h.block(kind, {**around, **{key: value for key, value in layer.items() if value is not None}})
        for kind, layer in zip(types, layers)
    ]
    return nemotron_h.architecture(around, blocks, MODEL_TYPE)


def why_not(arch: Architecture) -> str | None:
    """Why the format cannot express this architecture, as the end of a sentence; None if it can."""
    return nemotron_h.why_not_blocks(arch)


def to_config(arch: Architecture) -> dict[str, Any]:
    """The config.json fields; raises `IntarsiaError` with the reason where the format cannot express `arch`."""
    reason = why_not(arch)
    if reason:
        raise IntarsiaError(f"this model cannot be written as {MODEL_TYPE}: {reason}.")
    return {
        "model_type": MODEL_TYPE,
        "architectures": ["NemotronHPuzzleForCausalLM"],
        **nemotron_h.common_config(arch),
        "block_configs": _block_configs(arch.blocks),
    }


def _block_configs(blocks: tuple[Block, ...]) -> list[dict[str, Any]]:
    types = nemotron_h.types_of_pattern(nemotron_h.pattern(blocks))
    described = [_fields(block) for block in blocks]
    differ: dict[str, set[str]] = {}
    for kind in set(types):
        alike = [fields for t, fields in zip(types, described) if t == kind]
        keys = {key for fields in alike for key in fields}
        unequal = {key for key in keys if any(fields.get(key) != alike[0].get(key) for fields in alike)}
        differ[kind] = (unequal | _ALWAYS.get(kind, set())) - _GLOBAL
    return [
        {"block_type": kind, **{k: value for k, value in fields.items() if k in differ[kind] and value is not None}}
        for kind, fields in zip(types, described)
    ]


def _fields(block: Block) -> dict[str, Any]:
    fields = nemotron_h.block_fields(block)
    if isinstance(block, Attention):
        fields["sliding_window"] = block.sliding_window
    if isinstance(block, Mamba2):  # spelt out: where absent, the bounds around it hold
        fields["time_step_limit"] = [block.dt_min, math.inf if block.dt_max is None else block.dt_max]
    return fields
