"""The families of Mamba blocks alone: mamba (selective scan) and mamba2."""

from __future__ import annotations

import math
from typing import Any

from intarsia.arch import Architecture, Block, Mamba1, Mamba2
from intarsia.base.errors import IntarsiaError
from intarsia.formats.ssm_config import differing, limits_to_config, need_fields, need_silu, time_limits

CLASSES = {"mamba": "MambaForCausalLM", "mamba2": "Mamba2ForCausalLM"}
_KINDS: dict[str, type] = {"mamba": Mamba1, "mamba2": Mamba2}
# What transformers assumes for a field that config.json leaves out.
_COMMON = {
    "layer_norm_epsilon": 1e-5, "expand": 2, "conv_kernel": 4, "use_bias": False, "use_conv_bias": True,
    "hidden_act": "silu", "time_step_rank": "auto",
}  # fmt: skip
_DEFAULTS: dict[str, dict[str, Any]] = {
    "mamba": {
        **_COMMON, "vocab_size": 50280, "hidden_size": 768, "num_hidden_layers": 32, "state_size": 16,
        "tie_word_embeddings": True,
    },
    "mamba2": {
        **_COMMON, "vocab_size": 32768, "hidden_size": 4096, "num_hidden_layers": 64, "state_size": 128,
        "num_heads": 128, "head_dim": 64, "n_groups": 8, "chunk_size": 256, "tie_word_embeddings": False,
    },
}  # fmt: skip
_NO_LIMIT = 1 << 20  # these models see no positions and their configs name no longest text


def from_config(config: dict[str, Any]) -> Architecture:
    """The architecture that config.json describes. Raises `IntarsiaError` for sizes that contradict each other."""
    family = config["model_type"]
    need_fields(config, "hidden_size", "num_hidden_layers", "vocab_size")
    config = {**_DEFAULTS[family], **{key: value for key, value in config.items() if value is not None}}
    need_silu(config, "hidden_act")
    inner = _inner_size(config)
    block = _mamba1(config, inner) if family == "mamba" else _mamba2(config, inner)
    return Architecture(
        hidden_size=config["hidden_size"],
        vocab_size=config["vocab_size"],
        blocks=(block,) * config["num_hidden_layers"],
        norm_eps=config["layer_norm_epsilon"],
        rope=None,
        tied_embeddings=bool(config["tie_word_embeddings"]),
        max_positions=config.get("max_position_embeddings", _NO_LIMIT),
        family=family,
    )


def _inner_size(config: dict[str, Any]) -> int:
    inner = int(config["expand"] * config["hidden_size"])
    given = config.get("intermediate_size", inner)
    if given != inner:
        raise IntarsiaError(
            f"intermediate_size {given} contradicts expand x hidden_size = {config['expand']} x "
            f"{config['hidden_size']} = {inner}."
        )
    return inner


def _mamba1(config: dict[str, Any], inner: int) -> Block:
    rank = config["time_step_rank"]
    return Mamba1(
        inner, config["state_size"], config["conv_kernel"],
        time_step_rank=math.ceil(config["hidden_size"] / 16) if rank == "auto" else int(rank),
        conv_bias=bool(config["use_conv_bias"]), proj_bias=bool(config["use_bias"]),
    )  # fmt: skip


def _mamba2(config: dict[str, Any], inner: int) -> Block:
    heads, head_dim = config["num_heads"], config["head_dim"]
    if heads * head_dim != inner:
        raise IntarsiaError(
            f"num_heads x head_dim = {heads} x {head_dim} = {heads * head_dim} contradicts expand x hidden_size = "
            f"{config['expand']} x {config['hidden_size']} = {inner}."
        )
    low, high = time_limits(config)
    return Mamba2(
        heads, head_dim, config["state_size"], config["n_groups"], conv_kernel=config["conv_kernel"],
        chunk_size=config["chunk_size"], conv_bias=bool(config["use_conv_bias"]), proj_bias=bool(config["use_bias"]),
        dt_min=low, dt_max=high,
    )  # fmt: skip


def why_not(arch: Architecture, family: str) -> str | None:
    """Why `family` cannot express this architecture, as the end of a sentence; None if it can."""
    cls = _KINDS[family]
    if not arch.blocks or not all(isinstance(b, cls) for b in arch.blocks):
        return f"it has blocks other than Mamba-{family.removeprefix('mamba') or 1}"
    if differing(arch.blocks, cls):
        return "its layers differ in width"
    block = arch.blocks[0]
    assert isinstance(block, (Mamba1, Mamba2))
    if block.inner_size % arch.hidden_size:
        return f"its {block.inner_size} inner channels are no multiple of the stream ({arch.hidden_size})"
    if isinstance(block, Mamba2) and block.groups_of_norm != block.num_groups:
        return f"its gated norm works on {block.groups_of_norm} groups of channels and B and C on {block.num_groups}"
    return None


def to_config(arch: Architecture, family: str) -> dict[str, Any]:
    """The config.json fields; raises `IntarsiaError` with the reason where the family cannot express `arch`."""
    reason = why_not(arch, family)
    if reason:
        raise IntarsiaError(f"this model cannot be written as {family}: {reason}.")
    block = arch.blocks[0]
    assert isinstance(block, (Mamba1, Mamba2))
    config: dict[str, Any] = {
        "model_type": family,
        "architectures": [CLASSES[family]],
        "vocab_size": arch.vocab_size,
        "hidden_size": arch.hidden_size,
        "num_hidden_layers": len(arch.blocks),
        "state_size": block.state_size,
        "expand": block.inner_size // arch.hidden_size,
        "conv_kernel": block.conv_kernel,
        "use_bias": block.proj_bias,
        "use_conv_bias": block.conv_bias,
        "hidden_act": "silu",
        "layer_norm_epsilon": arch.norm_eps,
        "max_position_embeddings": arch.max_positions,
        "tie_word_embeddings": arch.tied_embeddings,
    }
    if isinstance(block, Mamba1):
        return {**config, "intermediate_size": block.inner_size, "time_step_rank": block.time_step_rank}
    return {
        **config,
        "num_heads": block.num_heads,
        "head_dim": block.head_dim,
        "n_groups": block.num_groups,
        "chunk_size": block.chunk_size,
        **limits_to_config(block),
    }
