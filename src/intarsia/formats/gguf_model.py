"""GGUF models of the llama, mistral, qwen2 and qwen3 kinds: metadata -> Architecture, tensors under our names."""

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

PIECE = 1 << 18  # elements dequantised at a time: numpy's intermediate arrays are several times that

KINDS = {"llama": "llama", "mistral": "mistral", "qwen2": "qwen2", "qwen3": "qwen3"}

_OUTER = {"token_embd.weight": "embed.weight", "output_norm.weight": "norm.weight", "output.weight": "head.weight"}
_ATTENTION = {
    "attn_norm": "norm", "attn_q": "mixer.q", "attn_k": "mixer.k", "attn_v": "mixer.v", "attn_output": "mixer.o",
    "attn_q_norm": "mixer.q_norm", "attn_k_norm": "mixer.k_norm",
}
_FFN = {"ffn_norm": "norm", "ffn_gate": "mixer.gate", "ffn_up": "mixer.up", "ffn_down": "mixer.down"}
_DTYPES = {GGMLQuantizationType.F16: torch.float16, GGMLQuantizationType.BF16: torch.bfloat16}


def open_gguf(path: Path) -> Checkpoint:
    """Open a GGUF model. `config` is its metadata, the tokenizer included."""
    file = read_gguf(path)
    arch = _architecture(file)
    return Checkpoint(path, arch, file.metadata, _stored(file, arch))


def _architecture(file: GgufFile) -> Architecture:
    meta = file.metadata
    kind = meta.get("general.architecture")
    if kind not in KINDS:
        raise IntarsiaError(f"{file.path} is a GGUF of the kind {kind!r}; kinds that are read: {', '.join(KINDS)}.")

    def need(key: str) -> Any:
        if f"{kind}.{key}" not in meta:
            raise IntarsiaError(f"{file.path} lacks the metadata field {kind}.{key}.")
        return meta[f"{kind}.{key}"]

    if meta.get(f"{kind}.expert_count"):
        raise IntarsiaError(f"{file.path} is a mixture of experts, which is not read yet.")
    layers, hidden, heads = need("block_count"), need("embedding_length"), need("attention.head_count")
    kv_heads = meta.get(f"{kind}.attention.head_count_kv", heads)
    intermediate = need("feed_forward_length")
    if any(isinstance(v, list) for v in (heads, kv_heads, intermediate)):
        raise IntarsiaError(f"{file.path} has different widths per layer, which is not read from GGUF yet.")
    head_dim = meta.get(f"{kind}.attention.key_length", hidden // heads)
    if meta.get(f"{kind}.rope.dimension_count", head_dim) != head_dim:
        raise IntarsiaError(f"{file.path} rotates only a part of each head, which is not supported.")
    attention = Attention(
        heads, kv_heads, head_dim,
        qkv_bias="blk.0.attn_q.bias" in file.tensors,
        out_bias="blk.0.attn_output.bias" in file.tensors,
        qk_norm="blk.0.attn_q_norm.weight" in file.tensors,
        sliding_window=meta.get(f"{kind}.attention.sliding_window") or None,
    )
    ffn = FeedForward(intermediate, bias="blk.0.ffn_up.bias" in file.tensors)
    return Architecture.transformer(
        layers, attention, ffn,
        hidden_size=hidden,
        vocab_size=_embedding(file).shape[0],
        norm_eps=_clean(need("attention.layer_norm_rms_epsilon")),
        rope=_rope(file, kind, head_dim, need("context_length")),
        tied_embeddings="output.weight" not in file.tensors,
        max_positions=need("context_length"),
        family=KINDS[kind],
    )


def _embedding(file: GgufFile) -> GgufTensor:
    if "token_embd.weight" not in file.tensors:
        raise IntarsiaError(f"{file.path} has no tensor token_embd.weight: it is no whole model.")
    return file.tensors["token_embd.weight"]


def _clean(value: float) -> float:
    """A float32 of the metadata as the decimal that was meant: 9.999999747e-06 -> 1e-05."""
    return float(str(np.float32(value)))


def _rope(file: GgufFile, kind: str, head_dim: int, context: int) -> Rope:
    meta = file.metadata
    theta = _clean(meta.get(f"{kind}.rope.freq_base", 10_000.0))
    if "rope_freqs.weight" in file.tensors:
        with open(file.path, "rb") as handle:
            factors = file.rows(file.tensors["rope_freqs.weight"], 0, 1, handle)[0]
        return Rope(theta, _scaling_from_factors(factors, theta, head_dim, context))
    name = meta.get(f"{kind}.rope.scaling.type", "linear" if f"{kind}.rope.scale_linear" in meta else "none")
    factor = meta.get(f"{kind}.rope.scaling.factor", meta.get(f"{kind}.rope.scale_linear"))
    if name == "none" or not factor:
        return Rope(theta)
    scaling: dict[str, Any] = {"rope_type": name, "factor": _clean(factor)}
    original = meta.get(f"{kind}.rope.scaling.original_context_length")
    if name == "yarn":
        scaling["original_max_position_embeddings"] = original or context
        for field, ours in (("yarn_beta_fast", "beta_fast"), ("yarn_beta_slow", "beta_slow")):
            if f"{kind}.rope.scaling.{field}" in meta:
                scaling[ours] = _clean(meta[f"{kind}.rope.scaling.{field}"])
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


def _our_name(name: str) -> str | None:
    """`blk.3.attn_q.weight` -> `blocks.6.mixer.q.weight`; None for what is no weight of ours."""
    if name in _OUTER:
        return _OUTER[name]
    parts = name.split(".")
    if len(parts) == 4 and parts[0] == "blk":
        layer, part, tail = int(parts[1]), parts[2], parts[3]
        if part in _ATTENTION:
            return f"blocks.{2 * layer}.{_ATTENTION[part]}.{tail}"
        if part in _FFN:
            return f"blocks.{2 * layer + 1}.{_FFN[part]}.{tail}"
    return None


def _stored(file: GgufFile, arch: Architecture) -> list[StoredTensor]:
    permuted = file.metadata["general.architecture"] in ("llama", "mistral")
    stored = []
    for tensor in file.tensors.values():
        if tensor.name.startswith("rope_"):  # frequencies: already in the architecture
            continue
        name = _our_name(tensor.name) or tensor.name  # a stranger keeps its name and is reported by the loader
        head_dim = 0
        if permuted and tensor.name.split(".")[-2] in ("attn_q", "attn_k"):
            head_dim = arch.attentions[0].head_dim
        read = functools.partial(_read, file, tensor, head_dim)
        dtype = _DTYPES.get(tensor.kind, torch.float32)
        stored.append(StoredTensor(name, tensor.name, file.path, tensor.shape, dtype, read, tensor.quantised))
    return stored


@torch.no_grad()
def _read(file: GgufFile, tensor: GgufTensor, head_dim: int, out: torch.Tensor) -> None:
    """Dequantise into `out`, a group of rows at a time; `head_dim` > 0 undoes the row permutation of q and k."""
    with open(file.path, "rb") as handle:
        if out.dim() == 1:
            vector = torch.tensor(file.rows(tensor, 0, 1, handle)[0])
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
