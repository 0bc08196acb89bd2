"""nemotron_h: Mamba-2, attention without positions, squared-ReLU FFNs and experts, in the published shape.

`hybrid_override_pattern` alone says which mixer each layer has: M Mamba-2, * attention, - FFN, E experts. Beside it,
`layers_block_type` (which transformers 5 writes) fails the validation of transformers 5.14, so it is read and never
written.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from intarsia.arch import Architecture, Attention, Block, Experts, FeedForward, Mamba2
from intarsia.base.errors import IntarsiaError
from intarsia.formats.families import ACTIVATIONS, HF_ACTIVATIONS
from intarsia.formats.ssm_config import differing, first, limits_to_config, need_fields, need_silu, time_limits

MODEL_TYPE = "nemotron_h"
LETTERS = {"M": "mamba", "*": "attention", "-": "mlp", "E": "moe"}
_KINDS: dict[str, type] = {"mamba": Mamba2, "attention": Attention, "mlp": FeedForward, "moe": Experts}
_NEWER_NAMES = {"linear_attention": "mamba", "full_attention": "attention"}
# What transformers assumes for a field that config.json leaves out: the sizes of the 8B model.
DEFAULTS: dict[str, Any] = {
    "vocab_size": 131072, "max_position_embeddings": 4096, "layer_norm_epsilon": 1e-5, "tie_word_embeddings": False,
    "num_attention_heads": 32, "num_key_value_heads": 8, "head_dim": 128, "attention_bias": False,
    "intermediate_size": 21504, "mlp_hidden_act": "relu2", "mlp_bias": False,
    "mamba_num_heads": 128, "mamba_head_dim": 64, "ssm_state_size": 128, "n_groups": 8, "conv_kernel": 4,
    "chunk_size": 128, "use_conv_bias": True, "use_bias": False, "mamba_hidden_act": "silu",
    "n_routed_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 7688, "n_shared_experts": 1,
    "moe_shared_expert_intermediate_size": 7688, "routed_scaling_factor": 1.0, "norm_topk_prob": True,
    "n_group": 1, "topk_group": 1,
}  # fmt: skip
_ALIASES = {
    "mamba_n_groups": "n_groups", "mamba_d_conv": "conv_kernel", "mamba_conv_bias": "use_conv_bias",
    "mamba_chunk_size": "chunk_size", "mamba_dt_limit": "time_step_limit", "attention_head_dim": "head_dim",
    "norm_eps": "layer_norm_epsilon", "rms_norm_eps": "layer_norm_epsilon",
}  # fmt: skip


def from_config(config: dict[str, Any]) -> Architecture:
    """The architecture that config.json describes. Raises `IntarsiaError` for sizes that contradict each other, unknown
    letters and features that are not supported."""
    config = with_defaults(config)
    layers = _layers(config, block_types(config))
    return architecture(config, [block(kind, {**config, **own}) for kind, own in layers], MODEL_TYPE)


def with_defaults(config: dict[str, Any]) -> dict[str, Any]:
    """`config` under its newer names and with what it leaves out."""
    need_fields(config, "hidden_size")
    given = {key: value for key, value in config.items() if value is not None}
    renamed = {_ALIASES[key]: value for key, value in given.items() if key in _ALIASES}
    filled = {**DEFAULTS, **renamed, **given}
    if "num_key_value_heads" in config and "num_key_value_heads" not in given:  # null, where absent means 8
        filled["num_key_value_heads"] = filled["num_attention_heads"]
    return filled


def architecture(config: dict[str, Any], blocks: list[Block], family: str) -> Architecture:
    """Everything around the blocks."""
    return Architecture(
        hidden_size=config["hidden_size"],
        vocab_size=config["vocab_size"],
        blocks=tuple(blocks),
        norm_eps=config["layer_norm_epsilon"],
        rope=None,
        tied_embeddings=bool(config["tie_word_embeddings"]),
        max_positions=config["max_position_embeddings"],
        family=family,
    )


def block_types(config: dict[str, Any]) -> list[str]:
    """mamba, attention, mlp or moe for each layer, from whichever fields say so."""
    letters, listed = config.get("hybrid_override_pattern"), config.get("layers_block_type")
    if letters is None and listed is None:
        raise IntarsiaError(
            f"config.json of this {config.get('model_type')} model lacks 'hybrid_override_pattern', which says what "
            "each layer is."
        )
    types = known_types(listed) if listed is not None else types_of_pattern(letters)
    if letters is not None and types != types_of_pattern(letters):
        raise IntarsiaError("hybrid_override_pattern and layers_block_type tell different layers; keep one of them.")
    layers = config.get("num_hidden_layers")
    if layers is not None and layers != len(types):
        raise IntarsiaError(f"num_hidden_layers is {layers} and the pattern has {len(types)} letters: they contradict.")
    return types


def known_types(types: list[str]) -> list[str]:
    """Layer types as we call them. Raises `IntarsiaError` for any other."""
    types = [_NEWER_NAMES.get(t, t) for t in types]
    unknown = next((t for t in types if t not in _KINDS), None)
    if unknown is not None:
        raise IntarsiaError(f"a layer of the type {unknown!r} is not known; known: {', '.join(_KINDS)}.")
    return types


def types_of_pattern(pattern: str) -> list[str]:
    """mamba, attention, mlp or moe for each letter. Raises `IntarsiaError` for any other letter."""
    if "|" in pattern or "/" in pattern:
        raise IntarsiaError(
            f"the pattern {pattern!r} is one of Megatron: '|' cuts pipeline stages and '/' starts layers for "
            "multi-token prediction, which do not belong in config.json. Give the main layers alone."
        )
    for position, letter in enumerate(pattern):
        if letter not in LETTERS:
            raise IntarsiaError(
                f"the letter {letter!r} at place {position} of the pattern {pattern!r} is not known; known: "
                "M (Mamba-2), * (attention), - (FFN), E (experts)."
            )
    return [LETTERS[letter] for letter in pattern]


def _layers(config: dict[str, Any], types: list[str]) -> list[tuple[str, dict[str, Any]]]:
    """Each layer's type and the fields that are its own: vLLM reads `intermediate_size` as a list, one for each FFN."""
    widths = config["intermediate_size"]
    if not isinstance(widths, list):
        return [(kind, {}) for kind in types]
    if len(widths) != types.count("mlp"):
        raise IntarsiaError(
            f"intermediate_size lists {len(widths)} widths and the pattern has {types.count('mlp')} FFNs: one for each."
        )
    rest = iter(widths)
    return [(kind, {"intermediate_size": next(rest)} if kind == "mlp" else {}) for kind in types]


def block(kind: str, config: Mapping[str, Any]) -> Block:
    """The block of one layer."""
    return {"mamba": _mamba, "attention": _attention, "mlp": _ffn, "moe": _experts}[kind](config)


def _mamba(config: Mapping[str, Any]) -> Mamba2:
    need_silu(config, "mamba_hidden_act")
    low, high = time_limits(config)
    return Mamba2(
        config["mamba_num_heads"], config["mamba_head_dim"], config["ssm_state_size"], config["n_groups"],
        conv_kernel=config["conv_kernel"], chunk_size=config["chunk_size"], conv_bias=bool(config["use_conv_bias"]),
        proj_bias=bool(config["use_bias"]), dt_min=low, dt_max=high,
    )  # fmt: skip


def _attention(config: Mapping[str, Any]) -> Attention:
    bias = bool(config["attention_bias"])
    return Attention(
        config["num_attention_heads"], config["num_key_value_heads"], config["head_dim"], qkv_bias=bias, out_bias=bias,
        sliding_window=config.get("sliding_window"), rope=False,
    )  # fmt: skip


def _activation(config: Mapping[str, Any]) -> str:
    given = config["mlp_hidden_act"]
    if given not in ACTIVATIONS:
        raise IntarsiaError(f"mlp_hidden_act {given!r} is not known; known: {', '.join(ACTIVATIONS)}.")
    return ACTIVATIONS[given]


def _ffn(config: Mapping[str, Any]) -> FeedForward:
    return FeedForward(config["intermediate_size"], _activation(config), gated=False, bias=bool(config["mlp_bias"]))


def _experts(config: Mapping[str, Any]) -> Experts:
    if config.get("moe_latent_size") is not None:
        raise IntarsiaError(
            f"experts on a latent of {config['moe_latent_size']} channels (moe_latent_size) are not supported; models "
            "whose experts read the stream itself are, such as Nemotron 3 Nano."
        )
    if config["mlp_bias"] or config["n_shared_experts"] != 1:
        raise IntarsiaError(
            f"experts with mlp_bias {config['mlp_bias']} and n_shared_experts {config['n_shared_experts']} are not "
            "supported; supported: no biases and one shared expert."
        )
    return Experts(
        config["n_routed_experts"], config["num_experts_per_tok"], config["moe_intermediate_size"],
        shared_size=config["moe_shared_expert_intermediate_size"], activation=_activation(config), gated=False,
        routed_scale=float(config["routed_scaling_factor"]), normalise=bool(config["norm_topk_prob"]),
        num_expert_groups=config["n_group"], groups_per_token=config["topk_group"],
    )  # fmt: skip


def why_not(arch: Architecture) -> str | None:
    """Why nemotron_h cannot express this architecture, as the end of a sentence; None if it can."""
    reason = why_not_blocks(arch)
    if reason is None and differing(arch.blocks, *_KINDS.values()):
        return "its layers of one type differ in width (nemotron_h_puzzle can say that)"
    if reason is None and any(a.sliding_window for a in arch.attentions):
        return "it has sliding windows"
    return reason


def why_not_blocks(arch: Architecture) -> str | None:
    """Why no nemotron_h reader knows such blocks, be they equal or not."""
    if not all(isinstance(b, tuple(_KINDS.values())) for b in arch.blocks):
        return "it has blocks other than Mamba-2, attention, FFN and experts"
    if arch.tied_embeddings:
        return "its embeddings are tied, and nemotron_h has a head of its own"
    for b in arch.blocks:
        if isinstance(b, Attention) and (b.qk_norm or b.qkv_bias or b.out_bias):
            # There is a field for biases, and neither transformers nor vLLM follows it.
            return "its attention has q/k norms or biases"
        if isinstance(b, Attention) and b.rope and arch.rope is not None:
            return "its attention has rotary positions"
        if isinstance(b, Mamba2) and b.groups_of_norm != b.num_groups:
            return f"its gated norm works on {b.groups_of_norm} groups of channels and B and C on {b.num_groups}"
        if isinstance(b, (FeedForward, Experts)) and b.gated:
            return "its FFN is gated"
        if isinstance(b, Experts) and b.router != "sigmoid":
            return "its experts are chosen by channels that stand for them, as those cut from a dense FFN are"
        if isinstance(b, Experts) and not b.shared_size:
            return "its experts have no shared one beside them"
    if any(isinstance(b, FeedForward) and b.bias for b in arch.blocks) and first(arch.blocks, Experts):
        return "its FFN has biases and its experts have none"
    activations = {b.activation for b in arch.blocks if isinstance(b, (FeedForward, Experts))}
    return "its FFNs differ in their activation" if len(activations) > 1 else None


def to_config(arch: Architecture) -> dict[str, Any]:
    """The config.json fields; raises `IntarsiaError` with the reason where the family cannot express `arch`."""
    reason = why_not(arch)
    if reason:
        raise IntarsiaError(f"this model cannot be written as {MODEL_TYPE}: {reason}.")
    return {"model_type": MODEL_TYPE, "architectures": ["NemotronHForCausalLM"], **common_config(arch)}


def common_config(arch: Architecture) -> dict[str, Any]:
    """The fields of nemotron_h and nemotron_h_puzzle alike; of each type, the first layer's."""
    fields: dict[str, Any] = {}
    for kind, cls in _KINDS.items():
        example = first(arch.blocks, cls)
        fields.update(block_fields(example) if example is not None else {})
        if kind == "mamba" and example is not None:
            fields.update({"expand": max(1, round(example.inner_size / arch.hidden_size)), "mamba_hidden_act": "silu"})
    return {
        "vocab_size": arch.vocab_size,
        "hidden_size": arch.hidden_size,
        "num_hidden_layers": len(arch.blocks),
        "hybrid_override_pattern": pattern(arch.blocks),
        "max_position_embeddings": arch.max_positions,
        "layer_norm_epsilon": arch.norm_eps,
        "tie_word_embeddings": False,
        "residual_in_fp32": False,
        "rescale_prenorm_residual": True,
        "sliding_window": None,
        "num_logits_to_keep": 1,
        "mamba_ssm_cache_dtype": "float32",
        "time_step_min": 0.001,  # of the initialisation, like the next two
        "time_step_max": 0.1,
        "time_step_floor": 1e-4,
        **fields,
    }


def pattern(blocks: tuple[Block, ...]) -> str:
    """The letters of these blocks."""
    letters = {_KINDS[kind]: letter for letter, kind in LETTERS.items()}
    return "".join(letters[type(b)] for b in blocks)


def block_fields(block: Block) -> dict[str, Any]:
    """The config fields that describe one block."""
    if isinstance(block, Mamba2):
        return {
            "mamba_num_heads": block.num_heads, "mamba_head_dim": block.head_dim, "ssm_state_size": block.state_size,
            "n_groups": block.num_groups, "conv_kernel": block.conv_kernel, "chunk_size": block.chunk_size,
            "use_conv_bias": block.conv_bias, "use_bias": block.proj_bias, "mamba_proj_bias": block.proj_bias,
            **limits_to_config(block),
        }  # fmt: skip
    if isinstance(block, Attention):
        return {
            "num_attention_heads": block.num_heads, "num_key_value_heads": block.num_kv_heads,
            "head_dim": block.head_dim, "attention_bias": block.qkv_bias,
        }  # fmt: skip
    if isinstance(block, FeedForward):
        return {
            "intermediate_size": block.intermediate_size, "mlp_hidden_act": HF_ACTIVATIONS[block.activation],
            "mlp_bias": block.bias,
        }  # fmt: skip
    assert isinstance(block, Experts)
    return {
        "n_routed_experts": block.num_experts, "num_experts_per_tok": block.experts_per_token,
        "moe_intermediate_size": block.intermediate_size, "n_shared_experts": 1,
        "moe_shared_expert_intermediate_size": block.shared_size, "mlp_hidden_act": HF_ACTIVATIONS[block.activation],
        "routed_scaling_factor": block.routed_scale, "norm_topk_prob": block.normalise,
        "n_group": block.num_expert_groups, "topk_group": block.groups_per_token,
    }  # fmt: skip
