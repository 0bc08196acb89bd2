"""granitemoehybrid without experts: Llama-shaped layers, in some of which Mamba-2 takes the place of attention.

This is the stock home of a Transformer whose attention was partly replaced: RoPE attention, Mamba-2 and SwiGLU, read by
transformers, vLLM and llama.cpp. Its four multipliers are 1 (that of attention 1 / sqrt(head_dim)). `bamba` is the
same but rotates only half of every head, in transformers always, so that it cannot express a Llama's attention.

The norm behind the scan works on as many groups of channels as B and C have. transformers before 5.23 took one group
whatever the config says, so a child is the same for all readers only with one group.
"""

from __future__ import annotations

import math
from typing import Any

from intarsia.arch import Architecture, Attention, Block, FeedForward, Mamba2, pair_layers
from intarsia.base.errors import IntarsiaError
from intarsia.formats.families import HF_ACTIVATIONS, activation
from intarsia.formats.layout import Foreign, Layout, Piece, block_of, our_shapes, whole
from intarsia.formats.rope_config import rope_from_config, rope_to_config
from intarsia.formats.ssm_config import differing, first, limits_to_config, need_fields, need_silu, time_limits

MODEL_TYPE = "granitemoehybrid"
_TYPES = {
    "mamba": "mamba", "linear_attention": "mamba", "attention": "attention", "full_attention": "attention",
    "multihead_latent_attention": None,
}  # fmt: skip
_DEFAULTS: dict[str, Any] = {
    "hidden_act": "silu", "rms_norm_eps": 1e-6, "tie_word_embeddings": False, "max_position_embeddings": 2048,
    "num_local_experts": 8, "attention_bias": False, "shared_intermediate_size": 1024, "mamba_n_heads": 128,
    "mamba_n_groups": 1, "mamba_d_state": 256, "mamba_d_conv": 4, "mamba_expand": 2, "mamba_chunk_size": 256,
    "mamba_d_head": "auto", "mamba_conv_bias": True, "mamba_proj_bias": False,
    "embedding_multiplier": 1.0, "residual_multiplier": 1.0, "logits_scaling": 1.0, "attention_multiplier": 1.0,
}  # fmt: skip
_OUTER = {
    "embed.weight": "model.embed_tokens.weight", "norm.weight": "model.norm.weight", "head.weight": "lm_head.weight",
}  # fmt: skip
_ATTENTION = {
    "mixer.q": "self_attn.q_proj", "mixer.k": "self_attn.k_proj", "mixer.v": "self_attn.v_proj",
    "mixer.o": "self_attn.o_proj",
}  # fmt: skip


def from_config(config: dict[str, Any]) -> Architecture:
    """The architecture that config.json describes.

    Raises `IntarsiaError` for experts, multipliers other than 1, and sizes that contradict each other.
    """
    need_fields(config, "hidden_size", "num_hidden_layers", "num_attention_heads", "vocab_size")
    config = {**_DEFAULTS, **{key: value for key, value in config.items() if value is not None}}
    if config["num_local_experts"]:
        raise IntarsiaError(
            f"{MODEL_TYPE} with {config['num_local_experts']} experts is not supported; without experts "
            "(num_local_experts 0) it is."
        )
    rope = config.get("position_embedding_type") == "rope"
    attention, mamba = _attention(config, rope), None
    ffn = FeedForward(config["shared_intermediate_size"], activation(config))
    blocks: list[Block] = []
    for kind in _layer_types(config):
        if kind == "mamba" and mamba is None:
            mamba = _mamba(config)
        blocks += [attention if kind == "attention" else mamba, ffn]
    _check_multipliers(config, attention if attention in blocks else None)
    return Architecture(
        hidden_size=config["hidden_size"],
        vocab_size=config["vocab_size"],
        blocks=tuple(blocks),
        norm_eps=config["rms_norm_eps"],
        rope=rope_from_config(config) if rope else None,
        tied_embeddings=bool(config["tie_word_embeddings"]),
        max_positions=config["max_position_embeddings"],
        family=MODEL_TYPE,
    )


def _layer_types(config: dict[str, Any]) -> list[str]:
    count = config["num_hidden_layers"]
    given = config.get("layer_types") or config.get("layers_block_type") or ["mamba"] * count
    types = [_TYPES.get(t) for t in given]
    if len(types) != count or None in types:
        raise IntarsiaError(f"layer_types must say mamba or attention for each of {count} layers; given: {given}.")
    return types


def _attention(config: dict[str, Any], rope: bool) -> Attention:
    heads, hidden, bias = config["num_attention_heads"], config["hidden_size"], bool(config["attention_bias"])
    head_dim = config.get("head_dim") or hidden // heads
    kv_heads = config.get("num_key_value_heads") or heads
    return Attention(heads, kv_heads, head_dim, qkv_bias=bias, out_bias=bias, rope=rope)


def _mamba(config: dict[str, Any]) -> Mamba2:
    need_silu(config, "hidden_act")
    heads, inner = config["mamba_n_heads"], int(config["mamba_expand"] * config["hidden_size"])
    head_dim = inner // heads if config["mamba_d_head"] == "auto" else config["mamba_d_head"]
    if heads * head_dim != inner:
        raise IntarsiaError(
            f"mamba_n_heads x mamba_d_head = {heads} x {head_dim} contradicts mamba_expand x hidden_size = {inner}."
        )
    low, high = time_limits(config)
    return Mamba2(
        heads, head_dim, config["mamba_d_state"], config["mamba_n_groups"], conv_kernel=config["mamba_d_conv"],
        chunk_size=config["mamba_chunk_size"], conv_bias=bool(config["mamba_conv_bias"]),
        proj_bias=bool(config["mamba_proj_bias"]), dt_min=low, dt_max=high,
    )  # fmt: skip


def _check_multipliers(config: dict[str, Any], attention: Attention | None) -> None:
    needed = dict.fromkeys(("embedding_multiplier", "residual_multiplier", "logits_scaling"), 1.0)
    if attention is not None:
        needed["attention_multiplier"] = attention.head_dim**-0.5
    for field, value in needed.items():
        if not math.isclose(config[field], value, rel_tol=1e-6):
            raise IntarsiaError(
                f"{field} {config[field]} is not supported; supported: {value:g}, as in hybrids made from Llama models."
            )


def why_not(arch: Architecture) -> str | None:
    """Why the family cannot express this architecture, as the end of a sentence; None if it can."""
    mixers, ffns = arch.blocks[::2], arch.blocks[1::2]
    if len(mixers) != len(ffns) or not all(isinstance(b, (Attention, Mamba2)) for b in mixers):
        return "its blocks are not an alternation of attention or Mamba-2 and FFN"
    if not all(isinstance(b, FeedForward) for b in ffns):
        return "its blocks are not an alternation of attention or Mamba-2 and FFN"
    if first(mixers, Mamba2) is None:
        return "it has no Mamba-2 block"
    if differing(arch.blocks, Attention, Mamba2, FeedForward):
        return "its layers of one type differ in width"
    return _why_not_layer(arch, first(mixers, Mamba2), first(ffns, FeedForward), first(mixers, Attention))


def _why_not_layer(arch: Architecture, mamba: Mamba2, ffn: FeedForward, attention: Attention | None) -> str | None:
    if not ffn.gated or ffn.bias or ffn.activation != "silu":
        return "its FFN is no SwiGLU without biases"
    if mamba.inner_size % arch.hidden_size:
        return f"the {mamba.inner_size} channels of its Mamba-2 are no multiple of the stream ({arch.hidden_size})"
    if mamba.groups_of_norm != mamba.num_groups:
        return f"its gated norm works on {mamba.groups_of_norm} groups of channels and B and C on {mamba.num_groups}"
    if attention is None:
        return None
    if attention.qk_norm or attention.sliding_window or attention.qkv_bias != attention.out_bias:
        return "its attention has q/k norms, windows or other biases"
    if attention.num_heads * attention.head_dim != arch.hidden_size:
        return f"its heads ({attention.num_heads} x {attention.head_dim}) do not span the stream ({arch.hidden_size})"
    return None


def to_config(arch: Architecture) -> dict[str, Any]:
    """The config.json fields, layer types as in published files (which all versions of transformers read).

    Raises `IntarsiaError` with the reason where the family cannot express `arch`.
    """
    reason = why_not(arch)
    if reason:
        raise IntarsiaError(f"this model cannot be written as {MODEL_TYPE}: {reason}.")
    mamba, ffn = first(arch.blocks, Mamba2), first(arch.blocks, FeedForward)
    attention = first(arch.blocks, Attention) or Attention(1, 1, arch.hidden_size)
    rope = arch.rope is not None and attention.rope
    return {
        "model_type": MODEL_TYPE,
        "architectures": ["GraniteMoeHybridForCausalLM"],
        "vocab_size": arch.vocab_size,
        "hidden_size": arch.hidden_size,
        "intermediate_size": ffn.intermediate_size,
        "shared_intermediate_size": ffn.intermediate_size,
        "num_hidden_layers": len(arch.blocks) // 2,
        "layer_types": ["mamba" if isinstance(b, Mamba2) else "attention" for b in arch.blocks[::2]],
        "num_attention_heads": attention.num_heads,
        "num_key_value_heads": attention.num_kv_heads,
        "attention_bias": attention.qkv_bias,
        "attention_multiplier": attention.head_dim**-0.5,
        "embedding_multiplier": 1.0,
        "residual_multiplier": 1.0,
        "logits_scaling": 1.0,
        "num_local_experts": 0,
        "num_experts_per_tok": 0,
        "hidden_act": HF_ACTIVATIONS[ffn.activation],
        "max_position_embeddings": arch.max_positions,
        "rms_norm_eps": arch.norm_eps,
        "tie_word_embeddings": arch.tied_embeddings,
        "position_embedding_type": "rope" if rope else "nope",
        **(rope_to_config(arch.rope) if rope else {}),
        "mamba_n_heads": mamba.num_heads,
        "mamba_d_head": mamba.head_dim,
        "mamba_n_groups": mamba.num_groups,
        "mamba_d_state": mamba.state_size,
        "mamba_d_conv": mamba.conv_kernel,
        "mamba_expand": mamba.inner_size // arch.hidden_size,
        "mamba_chunk_size": mamba.chunk_size,
        "mamba_conv_bias": mamba.conv_bias,
        "mamba_proj_bias": mamba.proj_bias,
        **limits_to_config(mamba),
    }


def layout(arch: Architecture) -> Layout:
    """Where every parameter lies. An FFN's gate and up stand in one tensor, gate first."""
    shapes, found = our_shapes(arch), {}
    layers = {index: layer for layer, pair in enumerate(pair_layers(arch.blocks)) for index in pair}
    for name, shape in shapes.items():
        if name in _OUTER:
            found[_OUTER[name]] = whole(name, shape)
            continue
        index, rest = block_of(name)
        found.update(_block_tensors(f"model.layers.{layers[index]}", arch.blocks[index], name, rest, shape))
    return found


def _block_tensors(layer: str, block: Block, name: str, rest: str, shape: tuple[int, ...]) -> Layout:
    part, _, leaf = rest.rpartition(".")
    if isinstance(block, FeedForward):
        if part == "norm":
            return {f"{layer}.post_attention_layernorm.weight": whole(name, shape)}
        if part == "mixer.down":
            return {f"{layer}.shared_mlp.output_linear.weight": whole(name, shape)}
        if part == "mixer.up":
            return {}  # stands behind its gate
        both = (Piece(name), Piece(name.replace(".gate.", ".up.")))
        return {f"{layer}.shared_mlp.input_linear.weight": Foreign((2 * shape[0], shape[1]), both)}
    if part == "norm":
        return {f"{layer}.input_layernorm.weight": whole(name, shape)}
    if isinstance(block, Attention):
        return {f"{layer}.{_ATTENTION[part]}.{leaf}": whole(name, shape)}
    if rest == "mixer.conv.weight":
        return {f"{layer}.mamba.conv1d.weight": whole(name, (shape[0], 1, shape[1]))}
    inner = part.removeprefix("mixer").removeprefix(".").replace("conv", "conv1d")
    return {f"{layer}.mamba.{inner + '.' if inner else ''}{leaf}": whole(name, shape)}
