"""Writing GGUF for llama.cpp: the kinds llama, qwen2, qwen3, nemotron_h and granitehybrid, in f32, bf16 or q8_0.

What llama.cpp cannot read is refused with the reason. Vectors, convolutions and decays stay float32, as llama.cpp's
own converter keeps them; matrices whose rows are no multiple of 32 are bfloat16 where q8_0 is asked for.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType
from gguf.quants import quantize

from intarsia.arch import Architecture, Attention, Experts, FeedForward, Mamba2, Rope
from intarsia.base.errors import IntarsiaError
from intarsia.base.files import atomic_path
from intarsia.base.progress import Progress
from intarsia.formats import families, gguf_fit, granite_hybrid, nemotron_h
from intarsia.formats.gguf_model import permute
from intarsia.formats.gguf_names import GRANITE_HYBRID, NEMOTRON_H, Place, places
from intarsia.formats.gguf_tokens import tokenizer_metadata
from intarsia.formats.ssm_config import first
from intarsia.formats.tokenizer import Tokenizer, check_vocabulary
from intarsia.model import Decoder
from intarsia.ops.rope import frequencies

QUANTISATIONS = {
    "f32": GGMLQuantizationType.F32, "bf16": GGMLQuantizationType.BF16, "q8_0": GGMLQuantizationType.Q8_0,
}  # fmt: skip
_FILE_TYPES = {"f32": 0, "bf16": 32, "q8_0": 7}
_FLOAT32 = ("ssm_conv1d", "ssm_a", "ssm_d", "ssm_norm")


def save_gguf(
    model: Decoder, path: str | os.PathLike, tokenizer: Tokenizer | None = None, quantisation: str = "bf16"
) -> Path:
    """Write a model and its tokenizer as one GGUF file at `path`; returns the path.

    Raises `IntarsiaError` where llama.cpp has no kind for the model or the tokenizer, for an unknown quantisation and
    for a path that does not end in .gguf.
    """
    path, arch = Path(path).expanduser(), model.arch
    if path.suffix != ".gguf" or path.is_dir():
        raise IntarsiaError(f"{path} is no name for a GGUF file: give one that ends in .gguf.")
    if quantisation not in QUANTISATIONS:
        raise IntarsiaError(f"quantisation {quantisation!r} is not written; known: {', '.join(QUANTISATIONS)}.")
    kind = gguf_kind(arch)
    if kind == GRANITE_HYBRID:
        model = gguf_fit.fit_granite(model)
        arch = model.arch
    fields = {"general.file_type": _FILE_TYPES[quantisation], "general.quantization_version": 2}
    fields.update({f"{kind}.{key}": value for key, value in _metadata(arch, kind).items()})
    if tokenizer is not None:
        check_vocabulary(tokenizer, arch)
        fields.update(tokenizer_metadata(tokenizer, arch.vocab_size))
    with atomic_path(path) as unfinished:
        writer = gguf.GGUFWriter(unfinished, kind)
        for key, value in fields.items():
            _add(writer, key, value)
        _write(writer, model, kind, QUANTISATIONS[quantisation])
    return path


def gguf_kind(arch: Architecture) -> str:
    """The `general.architecture` that llama.cpp reads this model as. Raises `IntarsiaError` if there is none."""
    if first(arch.blocks, Mamba2) is None:
        return _transformer_kind(arch)
    granite = granite_hybrid.why_not(arch) or gguf_fit.why_not(arch)
    reasons = {GRANITE_HYBRID: granite, NEMOTRON_H: nemotron_h.why_not(arch)}
    if first(arch.blocks, Experts):
        reasons[NEMOTRON_H] = reasons[NEMOTRON_H] or "its experts are not written to GGUF yet"
    if any(f.activation != "relu2" for f in arch.feed_forwards):
        reasons[NEMOTRON_H] = reasons[NEMOTRON_H] or "its FFN is not squared ReLU"
    kind = next((kind for kind, reason in reasons.items() if reason is None), None)
    if kind is None:
        told = "; ".join(f"{kind}: {reason}" for kind, reason in reasons.items())
        raise IntarsiaError(f"llama.cpp has no kind for this hybrid ({told}). Keep it as a folder.")
    for b in arch.blocks:
        if isinstance(b, Mamba2) and (b.proj_bias or b.dt_min or b.dt_max is not None):
            raise IntarsiaError("llama.cpp knows no biases of Mamba-2's projections and no bounds of its time steps.")
    return kind


def why_not_gguf(arch: Architecture) -> str | None:
    """Why this model is not written to GGUF, as a sentence; None if it is."""
    try:
        _metadata(arch, gguf_kind(arch))
    except IntarsiaError as error:
        return str(error).rstrip(".")
    return None


def _transformer_kind(arch: Architecture) -> str:
    if any(b.sliding_window for b in arch.attentions):
        raise IntarsiaError("sliding windows are not written to GGUF: llama.cpp's kinds for these models ignore them.")
    reasons = {kind: families.why_not(arch, kind) for kind in ("llama", "qwen2", "qwen3")}
    kind = next((kind for kind, reason in reasons.items() if reason is None), None)
    if kind is None or arch.feed_forwards[0].activation != "silu":
        raise IntarsiaError(
            f"llama.cpp has no kind for this model: {reasons['llama'] or 'its FFN is not SwiGLU'}. Keep it as a "
            "folder; nemotron-nas is one that llama.cpp's own converter reads."
        )
    return kind


def _metadata(arch: Architecture, kind: str) -> dict[str, Any]:
    """Fields under `<kind>.`; a list holds one entry for each layer, 0 where the layer has no such part."""
    attention, mamba, ffn = (first(arch.blocks, cls) for cls in (Attention, Mamba2, FeedForward))
    layers: list[tuple] = [(b,) for b in arch.blocks] if kind == NEMOTRON_H else _pairs(arch)
    width = ffn.intermediate_size if ffn else 0
    fields: dict[str, Any] = {
        "block_count": len(layers),
        "context_length": arch.max_positions,
        "embedding_length": arch.hidden_size,
        "vocab_size": arch.vocab_size,
        "feed_forward_length": width,
        "attention.head_count": attention.num_heads if attention else 1,
        "attention.head_count_kv": attention.num_kv_heads if attention else 0,
        "attention.layer_norm_rms_epsilon": float(arch.norm_eps),
    }
    if attention is not None:
        fields.update(dict.fromkeys(("attention.key_length", "attention.value_length"), attention.head_dim))
        if arch.rope is not None and attention.rope:
            fields.update({"rope.dimension_count": attention.head_dim, **_rope_fields(arch.rope, arch, attention)})
    if mamba is not None:
        kv_heads = attention.num_kv_heads if attention else 0
        attends = [any(isinstance(b, Attention) for b in layer) for layer in layers]
        feeds = [any(isinstance(b, FeedForward) for b in layer) for layer in layers]
        fields["attention.head_count_kv"] = [kv_heads if has else 0 for has in attends]
        if kind == NEMOTRON_H:
            fields["attention.layer_norm_epsilon"] = float(arch.norm_eps)  # read, and not used
            fields["feed_forward_length"] = [width if has else 0 for has in feeds]
        else:
            fields["rope.scaling.finetuned"] = arch.rope is not None and attention is not None and attention.rope
        fields.update({
            "ssm.conv_kernel": mamba.conv_kernel, "ssm.inner_size": mamba.inner_size,
            "ssm.state_size": mamba.state_size, "ssm.group_count": mamba.num_groups,
            "ssm.time_step_rank": mamba.num_heads,  # what llama.cpp keeps the heads in
        })  # fmt: skip
    return fields


def _pairs(arch: Architecture) -> list[tuple]:
    return list(zip(arch.blocks[::2], arch.blocks[1::2]))


def _rope_fields(rope: Rope, arch: Architecture, attention: Attention) -> dict[str, Any]:
    fields: dict[str, Any] = {"rope.freq_base": float(rope.theta)}
    name = (rope.scaling or {}).get("rope_type", "default")
    if name in ("linear", "yarn"):
        fields.update({"rope.scaling.type": name, "rope.scaling.factor": float(rope.scaling["factor"])})
    if name == "yarn":
        known = {"rope_type", "factor", "original_max_position_embeddings", "beta_fast", "beta_slow"}
        if set(rope.scaling) - known:
            strange = ", ".join(sorted(set(rope.scaling) - known))
            raise IntarsiaError(f"yarn scaling with {strange} is not written to GGUF.")
        fields["rope.scaling.original_context_length"] = rope.scaling["original_max_position_embeddings"]
        for ours in ("beta_fast", "beta_slow"):
            if ours in rope.scaling:
                fields[f"rope.scaling.yarn_{ours}"] = float(rope.scaling[ours])
    _rope_factors(arch, attention)
    return fields


def _rope_factors(arch: Architecture, attention: Attention | None) -> np.ndarray | None:
    """What llama.cpp divides every frequency by, for scalings that it knows by their outcome only."""
    rope = arch.rope
    name = None if rope is None or not rope.scaling else rope.scaling.get("rope_type")
    if attention is None or not attention.rope or name not in ("llama3", "longrope"):
        return None
    if name == "longrope" and rope.scaling["short_factor"] != rope.scaling["long_factor"]:
        raise IntarsiaError("longrope with other factors for long texts is not written to GGUF.")
    plain, _ = frequencies(Rope(rope.theta), attention.head_dim, arch.max_positions)
    scaled, magnitude = frequencies(rope, attention.head_dim, arch.max_positions)
    if magnitude != 1:
        raise IntarsiaError(f"{name} scaling with an attention factor of {magnitude:g} is not written to GGUF.")
    return (plain / scaled).float().numpy()


def _add(writer: gguf.GGUFWriter, key: str, value: Any) -> None:
    if isinstance(value, bool):
        writer.add_bool(key, value)
    elif isinstance(value, int):
        writer.add_uint32(key, value)
    elif isinstance(value, float):
        writer.add_float32(key, value)
    elif isinstance(value, str):
        writer.add_string(key, value)
    else:
        writer.add_array(key, value)


@torch.no_grad()
def _write(writer: gguf.GGUFWriter, model: Decoder, kind: str, wanted: GGMLQuantizationType) -> None:
    """Header, then one tensor after another: only one is converted at a time."""
    where, parameters = places(model.arch, kind), dict(model.named_parameters())
    factors = _rope_factors(model.arch, first(model.arch.blocks, Attention))
    if factors is not None:
        writer.add_tensor_info("rope_freqs.weight", factors.shape, factors.dtype, factors.nbytes)
    for place in where.values():
        used = _quantisation(place, wanted)
        block, block_bytes = GGML_QUANT_SIZES[used]
        size = int(np.prod(place.shape)) // block * block_bytes
        writer.add_tensor_info(place.name, place.shape, np.dtype(np.float32), size, used)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    if factors is not None:
        writer.write_tensor_data(factors)
    with Progress("writing GGUF", sum(p.numel() for p in parameters.values())) as progress:
        for name, place in where.items():
            writer.write_tensor_data(_converted(parameters[name], place, _quantisation(place, wanted)))
            progress.advance(parameters[name].numel())
    writer.close()


def _quantisation(place: Place, wanted: GGMLQuantizationType) -> GGMLQuantizationType:
    if len(place.shape) == 1 or any(part in place.name for part in _FLOAT32):
        return GGMLQuantizationType.F32
    fits = place.shape[-1] % GGML_QUANT_SIZES[wanted][0] == 0
    return wanted if fits else GGMLQuantizationType.BF16


def _converted(parameter: torch.Tensor, place: Place, used: GGMLQuantizationType) -> np.ndarray:
    data = parameter.detach().float().cpu()
    if place.negated:
        data = -data.exp()
    if place.head_dim:
        rows = data[:, None] if data.dim() == 1 else data
        data = permute(rows, place.head_dim).reshape(data.shape)
    return quantize(data.reshape(place.shape).contiguous().numpy(), used)
