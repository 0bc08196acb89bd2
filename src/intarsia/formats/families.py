"""The Hugging Face families llama, mistral, qwen2 and qwen3: config.json <-> Architecture.

Each is an alternation of equal attention and FFN blocks; they differ in biases, q/k norms, windows and in what an
absent field means.
"""

from __future__ import annotations

import dataclasses
from typing import Any

from intarsia.arch import Architecture, Attention, FeedForward
from intarsia.base.errors import IntarsiaError
from intarsia.formats.layout import Layout, our_shapes, whole
from intarsia.formats.names import llama_names
from intarsia.formats.rope_config import rope_from_config, rope_to_config

CLASSES = {
    "llama": "LlamaForCausalLM",
    "mistral": "MistralForCausalLM",
    "qwen2": "Qwen2ForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
}
# What transformers assumes for a field that config.json leaves out.
_COMMON = {"hidden_act": "silu", "rms_norm_eps": 1e-6, "tie_word_embeddings": False, "head_dim": None}
_QWEN = {"num_key_value_heads": 32, "max_position_embeddings": 32768, "sliding_window": 4096, "max_window_layers": 28}
_DEFAULTS: dict[str, dict[str, Any]] = {
    "llama": {**_COMMON, "max_position_embeddings": 2048},
    "mistral": {**_COMMON, "num_key_value_heads": 8, "max_position_embeddings": 131072, "sliding_window": 4096},
    "qwen2": {**_COMMON, **_QWEN},
    "qwen3": {**_COMMON, **_QWEN, "head_dim": 128},
}
ACTIVATIONS = {
    "silu": "silu", "swish": "silu", "gelu": "gelu", "gelu_pytorch_tanh": "gelu_tanh", "gelu_new": "gelu_tanh",
    "relu2": "relu2",
}
HF_ACTIVATIONS = {"silu": "silu", "gelu": "gelu", "gelu_tanh": "gelu_pytorch_tanh", "relu2": "relu2"}


def activation(config: dict[str, Any]) -> str:
    """Our name of `hidden_act`."""
    given = config.get("hidden_act", "silu")
    if given not in ACTIVATIONS:
        raise IntarsiaError(f"hidden_act {given!r} is not known; known: {', '.join(ACTIVATIONS)}.")
    return ACTIVATIONS[given]


def architecture_from_config(config: dict[str, Any]) -> Architecture:
    """The architecture that a config.json of one of the families describes.

    Raises `IntarsiaError` for another `model_type`, a missing field or a feature that is not supported.
    """
    family = config.get("model_type")
    if family not in CLASSES:
        raise IntarsiaError(f"model_type {family!r} is not known; known: {', '.join(CLASSES)}.")
    config = {**_DEFAULTS[family], **config}
    try:
        layers, heads = config["num_hidden_layers"], config["num_attention_heads"]
        hidden, intermediate, vocab = config["hidden_size"], config["intermediate_size"], config["vocab_size"]
    except KeyError as error:
        raise IntarsiaError(f"config.json of this {family} model lacks {error}.") from error
    bias = bool(config.get("attention_bias")) and family in ("llama", "qwen3")
    blocks: list[Attention | FeedForward] = []
    for window in _windows(family, config, layers):
        blocks.append(
            Attention(
                heads, config.get("num_key_value_heads") or heads, config["head_dim"] or hidden // heads,
                qkv_bias=bias or family == "qwen2", out_bias=bias, qk_norm=family == "qwen3", sliding_window=window,
            )
        )
        ffn_bias = family == "llama" and bool(config.get("mlp_bias"))
        blocks.append(FeedForward(intermediate, activation(config), bias=ffn_bias))
    return Architecture(
        hidden_size=hidden,
        vocab_size=vocab,
        blocks=tuple(blocks),
        norm_eps=config["rms_norm_eps"],
        rope=rope_from_config(config),
        tied_embeddings=bool(config["tie_word_embeddings"]),
        max_positions=config["max_position_embeddings"],
        family=family,
    )


def _windows(family: str, config: dict[str, Any], layers: int) -> list[int | None]:
    """The sliding window of each layer."""
    window = config.get("sliding_window")
    if family == "mistral":
        return [window] * layers
    if family == "llama" or not config.get("use_sliding_window") or window is None:
        return [None] * layers
    types = config.get("layer_types")
    if types is None:
        return [window if i >= config["max_window_layers"] else None for i in range(layers)]
    if len(types) != layers or set(types) - {"full_attention", "sliding_attention"}:
        raise IntarsiaError(
            f"layer_types must say full_attention or sliding_attention for each of {layers} layers; given: {types}."
        )
    return [window if kind == "sliding_attention" else None for kind in types]


def why_not(arch: Architecture, family: str) -> str | None:
    """Why stock `family` cannot express this architecture, as the end of a sentence; None if it can."""
    blocks = arch.blocks
    attentions, ffns = blocks[::2], blocks[1::2]
    if not blocks or len(blocks) % 2 or not all(isinstance(b, Attention) for b in attentions):
        return "its blocks are not an alternation of attention and FFN"
    if not all(isinstance(b, FeedForward) for b in ffns):
        return "its blocks are not an alternation of attention and FFN"
    if len(set(ffns)) > 1 or len({_without_window(b) for b in attentions}) > 1:
        return "its layers differ in width"
    if arch.rope is None or not attentions[0].rope:
        return "it has no rotary positions"
    return _why_not_layer(arch, family, attentions[0], ffns[0]) or _why_not_windows(family, attentions)


def _without_window(block: Attention) -> Attention:
    return dataclasses.replace(block, sliding_window=None)


def _why_not_layer(arch: Architecture, family: str, attention: Attention, ffn: FeedForward) -> str | None:
    if not ffn.gated:
        return "its FFN is not gated"
    if ffn.bias and family != "llama":
        return "its FFN has biases"
    none, all_four, all_but_out = (False, False), (True, True), (True, False)
    biases = {"llama": (none, all_four), "mistral": (none,), "qwen2": (all_but_out,), "qwen3": (none, all_four)}
    if (attention.qkv_bias, attention.out_bias) not in biases[family]:
        return "its attention has other biases"
    if attention.qk_norm != (family == "qwen3"):
        return "it has q/k norms" if attention.qk_norm else "it has no q/k norms"
    if family == "llama" and arch.hidden_size % attention.num_heads:
        return f"transformers wants a width ({arch.hidden_size}) that its {attention.num_heads} heads divide"
    return None


def _why_not_windows(family: str, attentions: tuple[Attention, ...]) -> str | None:
    windows = {b.sliding_window for b in attentions}
    if family == "llama" and windows != {None}:
        return "it has sliding windows"
    if family == "mistral" and len(windows) > 1:
        return "its layers differ in their windows"
    return "it has windows of several lengths" if len(windows - {None}) > 1 else None


def config_from_architecture(arch: Architecture, family: str) -> dict[str, Any]:
    """The config.json fields of `arch` in a stock family, spelt so that transformers 4 and 5 and the servers read them.

    Raises `IntarsiaError` with the reason where the family cannot express it.
    """
    if family not in CLASSES:
        raise IntarsiaError(f"family {family!r} is not known; known: {', '.join(CLASSES)}.")
    reason = why_not(arch, family)
    if reason:
        raise IntarsiaError(f"this model cannot be written as {family}: {reason}. Write it as `intarsia` instead.")
    attention, ffn = arch.attentions[0], arch.feed_forwards[0]
    config: dict[str, Any] = {
        "model_type": family,
        "architectures": [CLASSES[family]],
        "vocab_size": arch.vocab_size,
        "hidden_size": arch.hidden_size,
        "intermediate_size": ffn.intermediate_size,
        "num_hidden_layers": len(arch.blocks) // 2,
        "num_attention_heads": attention.num_heads,
        "num_key_value_heads": attention.num_kv_heads,
        "head_dim": attention.head_dim,
        "hidden_act": HF_ACTIVATIONS[ffn.activation],
        "max_position_embeddings": arch.max_positions,
        "rms_norm_eps": arch.norm_eps,
        "tie_word_embeddings": arch.tied_embeddings,
        **rope_to_config(arch.rope),
    }
    windows = [b.sliding_window for b in arch.attentions]
    if family in ("llama", "qwen3"):
        config["attention_bias"] = attention.qkv_bias
    if family == "llama":
        config["mlp_bias"] = ffn.bias
    elif family == "mistral":
        config["sliding_window"] = windows[0]
    else:
        config.update(_qwen_windows(windows))
    return config


def _qwen_windows(windows: list[int | None]) -> dict[str, Any]:
    window = next((w for w in windows if w is not None), None)
    if window is None:
        return {"use_sliding_window": False, "sliding_window": None}
    full = [i for i, w in enumerate(windows) if w is None]
    return {
        "use_sliding_window": True,
        "sliding_window": window,
        "max_window_layers": max(full, default=-1) + 1,  # for readers that know no layer_types
        "layer_types": ["full_attention" if w is None else "sliding_attention" for w in windows],
    }


def layout(arch: Architecture) -> Layout:
    """Where every parameter lies."""
    shapes = our_shapes(arch)
    return {theirs: whole(name, shapes[name]) for name, theirs in llama_names(arch).items()}
