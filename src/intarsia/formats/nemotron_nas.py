"""nemotron-nas (DeciLM): the Llama-shaped format with per-layer widths that servers read (TensorRT-LLM, vLLM,
llama.cpp, mlx-lm). Published example: Llama-3.1-Nemotron-51B.

An FFN is written as `ffn_mult`, from which a reader computes round_up_256(int(2 * ffn_mult * hidden / 3)): widths
between multiples of 256 are padded with zero channels, which changes the file's size and nothing that the model
computes. Linear blocks are read by TensorRT-LLM and llama.cpp; vLLM and SGLang know only absent ones.
"""

from __future__ import annotations

from typing import Any

from intarsia.arch import Architecture, Attention, Block, FeedForward, Linear, pair_layers
from intarsia.base.errors import IntarsiaError
from intarsia.formats.families import HF_ACTIVATIONS, activation
from intarsia.formats.layout import Foreign, Layout, Piece, our_shapes
from intarsia.formats.names import llama_names
from intarsia.formats.rope_config import rope_from_config, rope_to_config

MODEL_TYPE = "nemotron-nas"


def padded_width(intermediate: int) -> int:
    """The next multiple of 256."""
    return -(-intermediate // 256) * 256


def _width(ffn_mult: float, hidden: int) -> int:
    return padded_width(int(2 * ffn_mult * hidden / 3))


def why_not(arch: Architecture) -> str | None:
    """Why the format cannot express this architecture, as the end of a sentence; None if it can."""
    if not all(isinstance(b, (Attention, FeedForward, Linear)) for b in arch.blocks):
        return "it has blocks other than attention, FFN and linear layers"
    attentions = set(arch.attentions)
    if len({(b.num_heads, b.head_dim) for b in attentions}) > 1:
        counts = sorted({b.num_heads for b in attentions})
        return f"its layers differ in their query heads ({', '.join(map(str, counts))}); only KV heads may differ"
    for b in attentions:
        if b.qkv_bias or b.out_bias or b.qk_norm or b.sliding_window:
            return "its attention has biases, q/k norms or sliding windows"
        if b.num_heads * b.head_dim != arch.hidden_size:
            return f"its heads ({b.num_heads} x {b.head_dim}) do not span the stream ({arch.hidden_size})"
    for f in arch.feed_forwards:
        if not f.gated or f.bias or f.activation != arch.feed_forwards[0].activation:
            return "its FFNs are not gated, have biases or differ in their activation"
    if any(isinstance(b, Linear) and b.bias for b in arch.blocks):
        return "its linear blocks have biases"
    return "it has no rotary positions" if arch.rope is None or not all(b.rope for b in attentions) else None


def to_config(arch: Architecture) -> dict[str, Any]:
    """The config.json fields; raises `IntarsiaError` with the reason where the format cannot express `arch`."""
    reason = why_not(arch)
    if reason:
        raise IntarsiaError(f"this model cannot be written as {MODEL_TYPE}: {reason}.")
    layers = pair_layers(arch.blocks)
    heads = arch.attentions[0].num_heads if arch.attentions else 1
    act = arch.feed_forwards[0].activation if arch.feed_forwards else "silu"

    def slot(index: int | None) -> Block | None:
        return None if index is None else arch.blocks[index]

    return {
        "model_type": MODEL_TYPE,
        "architectures": ["DeciLMForCausalLM"],
        "vocab_size": arch.vocab_size,
        "hidden_size": arch.hidden_size,
        "intermediate_size": None,
        "num_hidden_layers": len(layers),
        "num_attention_heads": heads,
        "num_key_value_heads": None,
        "hidden_act": HF_ACTIVATIONS[act],
        "attention_bias": False,
        "mlp_bias": False,
        "max_position_embeddings": arch.max_positions,
        "rms_norm_eps": arch.norm_eps,
        "tie_word_embeddings": arch.tied_embeddings,
        "rope_scaling": None,
        **rope_to_config(arch.rope),
        "block_configs": [
            {"attention": _attention_config(slot(a)), "ffn": _ffn_config(slot(f), arch.hidden_size)} for a, f in layers
        ],
    }


def _attention_config(block: Block | None) -> dict[str, Any]:
    return {
        "n_heads_in_group": block.group if isinstance(block, Attention) else None,
        "no_op": block is None,
        "replace_with_linear": isinstance(block, Linear),
    }


def _ffn_config(block: Block | None, hidden: int) -> dict[str, Any]:
    mult = None
    if isinstance(block, FeedForward):
        width = padded_width(block.intermediate_size)
        mult = 3 * width / (2 * hidden)
        assert _width(mult, hidden) == width
    return {"ffn_mult": mult, "no_op": block is None, "replace_with_linear": isinstance(block, Linear)}


def from_config(config: dict[str, Any]) -> Architecture:
    """The inverse of `to_config` up to the padding; the family of the result is `llama`."""
    try:
        hidden, heads, layers = config["hidden_size"], config["num_attention_heads"], config["block_configs"]
        blocks: list[Block] = []
        for layer in layers:
            attention, ffn = layer["attention"], layer["ffn"]
            if attention.get("replace_with_linear"):
                blocks.append(Linear())
            elif not attention.get("no_op"):
                head_dim = config.get("head_dim") or hidden // heads
                blocks.append(Attention(heads, heads // attention["n_heads_in_group"], head_dim))
            if ffn.get("replace_with_linear"):
                blocks.append(Linear())
            elif not ffn.get("no_op"):
                blocks.append(FeedForward(_width(ffn["ffn_mult"], hidden), activation(config)))
        return Architecture(
            hidden_size=hidden,
            vocab_size=config["vocab_size"],
            blocks=tuple(blocks),
            norm_eps=config.get("rms_norm_eps", 1e-6),
            rope=rope_from_config(config),
            tied_embeddings=bool(config.get("tie_word_embeddings")),
            max_positions=config.get("max_position_embeddings", 2048),
            family="llama",
        )
    except (KeyError, TypeError) as error:
        raise IntarsiaError(f"config.json of this {MODEL_TYPE} model lacks or misspells {error}.") from error


def layout(arch: Architecture) -> Layout:
    """Where every parameter lies, FFNs padded with zero channels to a multiple of 256."""
    shapes = our_shapes(arch)
    return {
        theirs: Foreign(_padded_shape(arch, name, shapes[name]), (Piece(name),))
        for name, theirs in llama_names(arch).items()
    }


def _padded_shape(arch: Architecture, name: str, shape: tuple[int, ...]) -> tuple[int, ...]:
    parts = name.split(".")
    if parts[0] != "blocks" or not isinstance(arch.blocks[int(parts[1])], FeedForward) or parts[2] != "mixer":
        return shape
    rows, columns = shape
    return (rows, padded_width(columns)) if parts[3] == "down" else (padded_width(rows), columns)
