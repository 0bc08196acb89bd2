"""Decoding a packed model in native code: one call moves a token of every sequence through all blocks.

At batch 1 a decoder in torch spends as long between its small ops as in them; this is the same mathematics (float32
between the blocks, keys, values and conv inputs in bfloat16 as in `Cache`) without the ops.

Shape letters: S sequences, T tokens of a page, K KV heads, P head dim, V vocabulary.
"""

from __future__ import annotations

import ctypes
import weakref
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING

import torch

from intarsia.arch import Architecture, Attention, FeedForward, Mamba2
from intarsia.base.errors import IntarsiaError
from intarsia.model.cache import Cache, Pair
from intarsia.ops import backends
from intarsia.ops.packed import Packed, join

if TYPE_CHECKING:
    from intarsia.model.decoder import Decoder, ResidualBlock

WIDEST_CONV = 4  # taps for which there is a native step


def refusal(model: Decoder) -> str:
    """Why this packed model decodes in torch; "" when it takes the native step."""
    if model.dtype != torch.bfloat16:
        return f"the native step keeps its memory in bfloat16 and the model is {model.dtype}".replace("torch.", "")
    name, why = backends.explain("decode_step", torch.empty(0, dtype=torch.bfloat16))
    if name != "native":
        return why
    for block in model.arch.blocks:
        if not isinstance(block, (Attention, FeedForward, Mamba2)):
            return f"the native step has no block of kind {type(block).__name__}"
        if isinstance(block, Mamba2) and block.conv_kernel > WIDEST_CONV:
            return f"the native convolution has up to {WIDEST_CONV} taps"
    if len({b.head_dim for b in _rotated(model)}) > 1:
        return "its attention blocks rotate heads of several widths"
    return ""


class NativeDecoder:
    """The native view of a packed model. It shares the model's weights and must not outlive a change of them."""

    def __init__(self, model: Decoder):
        why = refusal(model)
        if why:
            raise IntarsiaError(f"this model cannot be decoded in native code: {why}.")
        from intarsia.ops.native import decode
        from intarsia.ops.native.packed import struct

        self._native, self._struct = decode, struct
        self._keep: list[torch.Tensor] = []  # what the structures point to
        self.arch, self.windows = model.arch, _windows(model)
        self._rope_dim = next((b.head_dim for b in _rotated(model)), None)
        self._model = weakref.proxy(model)
        head = model.embed.packed if model.arch.tied_embeddings else model.head.packed
        self._blocks = (decode.BlockStruct * len(model.blocks))(*(self._block(b) for b in model.blocks))
        self._embedding, self._head = struct(model.embed.packed), struct(head)
        self._struct_of_model = decode.ModelStruct(
            model.arch.hidden_size, model.arch.vocab_size, len(model.blocks), ctypes.addressof(self._blocks),
            self._float(model.norm.weight), ctypes.addressof(self._embedding), ctypes.addressof(self._head),
            model.arch.norm_eps,
        )  # fmt: skip
        self._memories: weakref.WeakKeyDictionary = weakref.WeakKeyDictionary()

    def __call__(
        self,
        ids: torch.Tensor,
        lengths: torch.Tensor,
        memory: object,
        tables: Sequence[torch.Tensor],
        slots: torch.Tensor,
    ) -> torch.Tensor:
        """The next token of S sequences, ids (S,) int64 -> logits (S, V) float32 of the one after it.

        lengths (S,) int32: tokens of each sequence, this one included. `memory`: what `memory_of` made of the tensors
        where they remember. tables: for each of `windows`, the pages of every sequence in order, (S, most) int32. slots
        (S,) int32: where its Mamba states are.
        """
        rope = None
        if self._rope_dim is not None:
            rope = self._model.rope_tables(0, int(lengths.max()))[self._rope_dim]
        logits = self._native.decode_step(
            self._struct_of_model, memory, ids, lengths, slots, tables, rope, self._head.outputs
        )
        return logits[:, : self.arch.vocab_size]

    def memory_of(self, owner: object, pairs: Callable[[], Mapping[int, Pair]]) -> object:
        """What `pairs` of `owner` give, made once for as long as `owner` lives.

        The memory of each block, by its index: keys and values (pages, T, K, P) bfloat16, in any strides that leave
        a head's numbers together; or conv inputs (slots, K-1, C) bfloat16 and states (slots, H, P, N) float32."""
        if owner in self._memories:
            return self._memories[owner]
        made = self._memories[owner] = (self._native.MemoryStruct * len(self.arch.blocks))()
        for index, (first, second) in pairs().items():
            made[index] = self._native.MemoryStruct(
                first.data_ptr(), second.data_ptr(), first.stride(0), second.stride(0),
                first.stride(1), first.stride(2), first.shape[1],
            )  # fmt: skip
        return made

    def takes(self, cache: Cache) -> bool:
        """A cache without padding in which no window has begun to slide: there a text is one page."""
        return cache.counts is None and cache.keep is None and all(
            entry is None or not isinstance(block, Attention) or entry[0].shape[2] == cache.max_length
            for block, entry in zip(self.arch.blocks, cache.entries)
        )  # fmt: skip

    def step(self, ids: torch.Tensor, cache: Cache) -> torch.Tensor:
        """ids (B,) behind what the cache holds -> logits (B, V) float32; the cache moves on."""
        cache.reserve(1)
        memory = self.memory_of(cache, lambda: _pages(cache, self.arch))
        rows = torch.arange(len(ids), dtype=torch.int32)
        lengths = torch.full_like(rows, cache.length + 1)
        logits = self(ids, lengths, memory, [rows[:, None]] * len(self.windows), rows)
        cache.advance(1, None)
        return logits

    def _block(self, block: ResidualBlock):
        make = {Attention: self._attention, FeedForward: self._feed_forward, Mamba2: self._mamba2}[type(block.spec)]
        name, fields = make(block.mixer, block.spec)
        return self._native.BlockStruct(
            mixer=self._native.MIXERS.index(name), norm=self._float(block.norm.weight), **fields
        )

    def _attention(self, mixer, spec: Attention):
        first = self._joined(mixer.q, mixer.k, mixer.v)
        at_key, at_value = (sum(_filled(layer) for layer in before) for before in ([mixer.q], [mixer.q, mixer.k]))
        window = spec.sliding_window
        return "attention", {
            "first": first, "second": self._struct(mixer.o.packed), "heads": spec.num_heads,
            "kv_heads": spec.num_kv_heads, "dim": spec.head_dim, "at_key": at_key, "at_value": at_value,
            "rope": int(spec.rope and self.arch.rope is not None), "window": window or 0,
            "table": self.windows.index(window),
            "q_norm": self._float(mixer.q_norm.weight) if spec.qk_norm else None,
            "k_norm": self._float(mixer.k_norm.weight) if spec.qk_norm else None,
        }  # fmt: skip

    def _feed_forward(self, mixer, spec: FeedForward):
        first = self._joined(mixer.gate, mixer.up) if spec.gated else self._struct(mixer.up.packed)
        return "ffn", {
            "first": first, "second": self._struct(mixer.down.packed),
            "activation": self._native.ACTIVATIONS.index(spec.activation),
            "at_up": _filled(mixer.gate) if spec.gated else 0,
        }  # fmt: skip

    def _mamba2(self, mixer, spec: Mamba2):
        bias = mixer.conv.bias
        return "mamba2", {
            "first": self._struct(mixer.in_proj.packed), "second": self._struct(mixer.out_proj.packed),
            "heads": spec.num_heads, "dim": spec.head_dim, "state": spec.state_size, "groups": spec.num_groups,
            "kernel": spec.conv_kernel, "norm_groups": spec.groups_of_norm, "conv": self._float(mixer.conv.weight),
            "conv_bias": None if bias is None else self._float(bias), "A": self._float(-mixer.A_log.float().exp()),
            "D": self._float(mixer.D), "dt_bias": self._float(mixer.dt_bias),
            "gate_norm": self._float(mixer.norm.weight),
            "dt_min": spec.dt_min, "dt_max": self._native.NO_BOUND if spec.dt_max is None else spec.dt_max,
        }  # fmt: skip

    def _joined(self, *layers):
        """Layers that read the same, as one matrix; the layers become views of it."""
        whole = layers[0].whole  # blocks that several models share are joined once
        if whole is None:
            whole, parts = join([layer.packed for layer in layers])
            layers[0].whole = whole
            for layer, part in zip(layers, parts):
                layer.packed = part
        self._hold(whole)
        return self._struct(whole)

    def _hold(self, packed: Packed) -> None:
        self._keep += packed.tensors

    def _float(self, tensor: torch.Tensor) -> int:
        self._keep.append(tensor.detach().float().contiguous())
        return self._keep[-1].data_ptr()


def _pages(cache: Cache, arch: Architecture) -> dict[int, Pair]:
    """The entries of a cache as pages, a text each."""
    return {
        i: tuple(t.transpose(1, 2) for t in entry) if isinstance(block, Attention) else entry
        for i, (block, entry) in enumerate(zip(arch.blocks, cache.entries))
        if entry is not None
    }


def _filled(layer) -> int:
    """Outputs of a packed layer with their filling."""
    return layer.packed.codes.shape[0] * layer.packed.codes.shape[-2]


def _rotated(model: Decoder) -> list[Attention]:
    return [] if model.arch.rope is None else [b for b in model.arch.attentions if b.rope]


def _windows(model: Decoder) -> list[int | None]:
    """The different windows of its attention blocks, the unlimited one first: the order of the tables."""
    return sorted({b.sliding_window for b in model.arch.attentions}, key=lambda w: (w is not None, w or 0))
