"""GGUF models of the llama, mistral, qwen2, qwen3, nemotron_h and granitehybrid kinds: metadata -> Architecture,
tensors under our names."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import numpy as np
import torch
from gguf.constants import GGMLQuantizationType

from intarsia.arch import Architecture, Attention, FeedForward, Rope
from intarsia.base.errors import IntarsiaError
from intarsia.formats.checkpoint import Checkpoint, StoredTensor
from intarsia.formats.gguf_file import GgufFile, GgufTensor, read_gguf
from intarsia.formats.gguf_hybrid import FAMILIES, HYBRIDS, Metadata, clean, hybrid_blocks
from intarsia.formats.gguf_names import Place, places
from intarsia.formats.layout import our_shapes

PIECE = 1 << 18  # elements dequantised at a time: numpy's intermediate arrays are several times that

TRANSFORMERS = ("llama", "mistral", "qwen2", "qwen3")
KINDS = (*TRANSFORMERS, *HYBRIDS)
_DTYPES = {GGMLQuantizationType.F16: torch.float16, GGMLQuantizationType.BF16: torch.bfloat16}


def open_gguf(path: Path) -> Checkpoint:
    """Open a GGUF model. `config` is its metadata, the tokenizer included."""
    file = read_gguf(path)
    arch = _architecture(file)
    return Checkpoint(path, arch, file.metadata, _stored(file, arch))


def _architecture(file: GgufFile) -> Architecture:
    kind = file.metadata.get("general.architecture")
    if kind not in KINDS:
        raise IntarsiaError(f"{file.path} is a GGUF of the kind {kind!r}; kinds that are read: {', '.join(KINDS)}.")
    meta = Metadata(file)
    if meta.get("expert_count"):
        raise IntarsiaError(f"{file.path} is a mixture of experts, which is not read yet.")
    blocks = hybrid_blocks(meta) if kind in HYBRIDS else _transformer_blocks(meta)
    attention = next((b for b in blocks if isinstance(b, Attention)), None)
    rotary = attention is not None and attention.rope
    return Architecture(
        hidden_size=meta.need("embedding_length"),
        vocab_size=_embedding(file).shape[0],
        blocks=blocks,
        norm_eps=clean(meta.need("attention.layer_norm_rms_epsilon")),
        rope=_rope(file, kind, attention.head_dim, meta.need("context_length")) if rotary else None,
        tied_embeddings="output.weight" not in file.tensors,
        max_positions=meta.need("context_length"),
        family=FAMILIES.get(kind, kind),
    )


def _transformer_blocks(meta: Metadata) -> tuple[Attention | FeedForward, ...]:
    tensors = meta.file.tensors
    layers, hidden, heads = meta.need("block_count"), meta.need("embedding_length"), meta.need("attention.head_count")
    kv_heads, intermediate = meta.get("attention.head_count_kv", heads), meta.need("feed_forward_length")
    if any(isinstance(v, list) for v in (heads, kv_heads, intermediate)):
        raise IntarsiaError(f"{meta.file.path} has different widths per layer, which is not read from GGUF yet.")
    attention = Attention(
        heads, kv_heads, meta.head_dim(hidden // heads),
        qkv_bias="blk.0.attn_q.bias" in tensors,
        out_bias="blk.0.attn_output.bias" in tensors,
        qk_norm="blk.0.attn_q_norm.weight" in tensors,
        sliding_window=meta.get("attention.sliding_window") or None,
    )  # fmt: skip
    return (attention, FeedForward(intermediate, bias="blk.0.ffn_up.bias" in tensors)) * layers


def _embedding(file: GgufFile) -> GgufTensor:
    if "token_embd.weight" not in file.tensors:
        raise IntarsiaError(f"{file.path} has no tensor token_embd.weight: it is no whole model.")
    return file.tensors["token_embd.weight"]


def _rope(file: GgufFile, kind: str, head_dim: int, context: int) -> Rope:
    meta = file.metadata
    theta = clean(meta.get(f"{kind}.rope.freq_base", 10_000.0))
    if "rope_freqs.weight" in file.tensors:
        with open(file.path, "rb") as handle:
            factors = file.rows(file.tensors["rope_freqs.weight"], 0, 1, handle)[0]
        return Rope(theta, _scaling_from_factors(factors, theta, head_dim, context))
    name = meta.get(f"{kind}.rope.scaling.type", "linear" if f"{kind}.rope.scale_linear" in meta else "none")
    factor = meta.get(f"{kind}.rope.scaling.factor", meta.get(f"{kind}.rope.scale_linear"))
    if name == "none" or not factor:
        return Rope(theta)
    scaling: dict[str, Any] = {"rope_type": name, "factor": clean(factor)}
    original = meta.get(f"{kind}.rope.scaling.original_context_length")
    if name == "yarn":
        scaling["original_max_position_embeddings"] = original or context
        for field, ours in (("yarn_beta_fast", "beta_fast"), ("yarn_beta_slow", "beta_slow")):
            if f"{kind}.rope.scaling.{field}" in meta:
                scaling[ours] = clean(meta[f"{kind}.rope.scaling.{field}"])
    elif name != "linear":
        raise IntarsiaError(f"{file.path} scales RoPE by {name!r}, which is not known; known: linear, yarn, llama3.")
    return Rope(theta, scaling)


def _scaling_from_factors(factors: np.ndarray, theta: float, head_dim: int, context: int) -> dict[str, Any] | None:
    """GGUF keeps the outcome of llama3 scaling, one divisor per frequency, and not its parameters: find those again.

    Published models use low 1 and high 4 over 8192 positions; anything else is kept exactly, as `longrope` with equal
    factors, which transformers reads too.
    """
    if np.allclose(factors, 1):
        return None
    inverse = theta ** -(np.arange(0, head_dim, 2) / head_dim)
    for original in (8192, 4096, 2048, 16384, 32768, context):
        turns = original * inverse / (2 * np.pi)
        smooth = np.clip((turns - 1.0) / (4.0 - 1.0), 0, 1)
        factor = float(factors.max())
        if np.allclose(1 / ((1 - smooth) / factor + smooth), factors, rtol=1e-4):
            return {
                "rope_type": "llama3", "factor": round(factor, 4), "low_freq_factor": 1.0, "high_freq_factor": 4.0,
                "original_max_position_embeddings": original,
            }
    values = [float(f) for f in factors]
    return {
        "rope_type": "longrope", "short_factor": values, "long_factor": values, "factor": 1.0, "attention_factor": 1.0,
        "original_max_position_embeddings": context,
    }


def _stored(file: GgufFile, arch: Architecture) -> list[StoredTensor]:
    shapes = our_shapes(arch)
    ours = {place.name: (name, place) for name, place in places(arch, file.metadata["general.architecture"]).items()}
    stored = []
    for tensor in file.tensors.values():
        if tensor.name.startswith("rope_"):  # frequencies: already in the architecture
            continue
        # A stranger keeps its name, and one of another shape its shape: the loader reports both.
        name, place = ours.get(tensor.name, (tensor.name, Place(tensor.name, tensor.shape)))
        shape = shapes.get(name, tensor.shape) if tensor.shape == place.shape else tensor.shape
        dtype = _DTYPES.get(tensor.kind, torch.float32)
        read = functools.partial(_read, file, tensor, place)
        stored.append(StoredTensor(name, tensor.name, file.path, shape, dtype, read, tensor.quantised))
    return stored


@torch.no_grad()
def _read(file: GgufFile, tensor: GgufTensor, place: Place, out: torch.Tensor) -> None:
    """Dequantise into `out`, a group of rows at a time, and undo what llama.cpp did to it."""
    head_dim = place.head_dim
    with open(file.path, "rb") as handle:
        if out.dim() == 1:
            vector = torch.tensor(file.rows(tensor, 0, tensor.rows, handle)).flatten()
            if place.negated:
                vector = (-vector).log()
            out.copy_(unpermute(vector[:, None], head_dim)[:, 0] if head_dim else vector)
            return
        unit = head_dim or 1  # a permuted matrix is only read in whole heads
        step = max(1, PIECE // (out.shape[1] * unit)) * unit
        for first in range(0, out.shape[0], step):
            count = min(step, out.shape[0] - first)
            piece = torch.tensor(file.rows(tensor, first, count, handle))
            out[first : first + count].copy_(unpermute(piece, head_dim) if head_dim else piece)


def unpermute(rows: torch.Tensor, head_dim: int) -> torch.Tensor:
    """Rows of whole heads (H*P, D) from llama.cpp's interleaved pairs to the halves of Hugging Face."""
    return rows.unflatten(0, (-1, head_dim // 2, 2)).transpose(1, 2).flatten(0, 2)


def permute(rows: torch.Tensor, head_dim: int) -> torch.Tensor:
    """The inverse of `unpermute`: what llama.cpp wants to read."""
    return rows.unflatten(0, (-1, 2, head_dim // 2)).transpose(1, 2).flatten(0, 2)
