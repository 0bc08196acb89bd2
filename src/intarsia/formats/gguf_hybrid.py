"""GGUF metadata of the kinds with Mamba-2 blocks: nemotron_h and granitehybrid."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np

from intarsia.arch import Attention, Block, FeedForward, Mamba2
from intarsia.base.errors import IntarsiaError
from intarsia.formats.gguf_file import GgufFile
from intarsia.formats.gguf_names import GRANITE_HYBRID, NEMOTRON_H

HYBRIDS = (NEMOTRON_H, GRANITE_HYBRID)
FAMILIES = {GRANITE_HYBRID: "granitemoehybrid"}
_MULTIPLIERS = ("embedding_scale", "residual_scale", "logit_scale")


def clean(value: float) -> float:
    """A float32 of the metadata as the decimal that was meant: 9.999999747e-06 -> 1e-05."""
    return float(str(np.float32(value)))


@dataclass(frozen=True)
class Metadata:
    """The fields `<kind>.*` of a file."""

    file: GgufFile

    @property
    def kind(self) -> str:
        return self.file.metadata["general.architecture"]

    def get(self, key: str, default: Any = None) -> Any:
        return self.file.metadata.get(f"{self.kind}.{key}", default)

    def need(self, key: str) -> Any:
        value = self.get(key)
        if value is None:
            raise IntarsiaError(f"{self.file.path} lacks the metadata field {self.kind}.{key}.")
        return value

    def per_layer(self, key: str) -> list[int]:
        """A field that is a number for all layers or a list of one for each."""
        value, layers = self.need(key), self.need("block_count")
        values = value if isinstance(value, list) else [value] * layers
        if len(values) != layers:
            raise IntarsiaError(f"{self.file.path}: {self.kind}.{key} has {len(values)} entries for {layers} layers.")
        return values

    def head_dim(self, default: int) -> int:
        """Width of an attention head, all of which is rotated."""
        head_dim = self.get("attention.key_length", default)
        if self.get("rope.dimension_count", head_dim) != head_dim:
            raise IntarsiaError(f"{self.file.path} rotates only a part of each head, which is not supported.")
        return head_dim


def hybrid_blocks(meta: Metadata) -> tuple[Block, ...]:
    """The blocks of a nemotron_h (a layer is one of them) or granitehybrid model (a mixer and an FFN)."""
    kv_heads, widths = meta.per_layer("attention.head_count_kv"), meta.per_layer("feed_forward_length")
    heads = meta.per_layer("attention.head_count")
    head_dim = meta.head_dim(meta.need("embedding_length") // max(1, *heads))
    rope = meta.kind == GRANITE_HYBRID and bool(meta.get("rope.scaling.finetuned", True))
    _check_multipliers(meta, head_dim)
    blocks: list[Block] = []
    for layer, (count, kv_count, width) in enumerate(zip(heads, kv_heads, widths)):
        if meta.kind == NEMOTRON_H and width:
            blocks.append(FeedForward(width, "relu2", gated=False, bias=_has(meta, layer, "ffn_up.bias")))
            continue
        blocks.append(_attention(meta, layer, count, kv_count, head_dim, rope) if kv_count else _mamba(meta, layer))
        if meta.kind == GRANITE_HYBRID:
            blocks.append(FeedForward(width, bias=_has(meta, layer, "ffn_up.bias")))
    return tuple(blocks)


def _has(meta: Metadata, layer: int, name: str) -> bool:
    return f"blk.{layer}.{name}" in meta.file.tensors


def _attention(meta: Metadata, layer: int, heads: int, kv_heads: int, head_dim: int, rope: bool) -> Attention:
    return Attention(
        heads, kv_heads, head_dim, qkv_bias=_has(meta, layer, "attn_q.bias"),
        out_bias=_has(meta, layer, "attn_output.bias"), rope=rope,
    )  # fmt: skip


def _mamba(meta: Metadata, layer: int) -> Mamba2:
    heads, inner = meta.need("ssm.time_step_rank"), meta.need("ssm.inner_size")
    if inner % heads:
        raise IntarsiaError(f"{meta.file.path}: {heads} Mamba-2 heads do not divide {inner} inner channels.")
    return Mamba2(
        heads, inner // heads, meta.need("ssm.state_size"), meta.need("ssm.group_count"),
        conv_kernel=meta.need("ssm.conv_kernel"), conv_bias=_has(meta, layer, "ssm_conv1d.bias"),
    )  # fmt: skip


def _check_multipliers(meta: Metadata, head_dim: int) -> None:
    """0 means absent, to llama.cpp too."""
    needed = {**dict.fromkeys(_MULTIPLIERS, 1.0), "attention.scale": head_dim**-0.5}
    for key, value in needed.items():
        found = meta.get(key)
        if found and not math.isclose(found, value, rel_tol=1e-5):
            name = f"{meta.kind}.{key}"
            raise IntarsiaError(f"{meta.file.path}: {name} {found:g} is not supported; supported: {value:g}.")
