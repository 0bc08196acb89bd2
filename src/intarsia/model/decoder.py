"""The decoder: embedding, residual blocks, final norm, head.

Shape letters: B batch, L length, D model, V vocabulary.
"""

from __future__ import annotations

import torch
from torch import nn

from intarsia.arch import Architecture, Attention, Block
from intarsia.base.errors import IntarsiaError
from intarsia.model.cache import Memory
from intarsia.model.decode import NativeDecoder
from intarsia.model.mixers import Mixer, make_mixer
from intarsia.model.parts import Scale, Tables
from intarsia.model.rows import Rows
from intarsia.ops.linear import Projection, linear
from intarsia.ops.norm import rms_norm
from intarsia.ops.rope import tables


class ResidualBlock(nn.Module):
    """`x + mixer(norm(x))`."""

    def __init__(self, spec: Block, arch: Architecture, dtype: torch.dtype, device=None):
        super().__init__()
        self.spec, self.eps = spec, arch.norm_eps
        self.norm = Scale(arch.hidden_size, dtype=dtype, device=device)
        self.mixer: Mixer = make_mixer(spec, arch.hidden_size, arch.norm_eps, dtype, device)

    def update(
        self,
        x: torch.Tensor,
        tables: Tables | None = None,
        cache: Memory | None = None,
        index: int = 0,
        rows: Rows | None = None,
    ) -> torch.Tensor:
        """What the block adds to the stream: mixer(norm(x)), (B, L, D)."""
        return self.mixer(rms_norm(x, self.norm.weight, self.eps), tables, cache, index, rows)

    def forward(
        self,
        x: torch.Tensor,
        tables: Tables | None = None,
        cache: Memory | None = None,
        index: int = 0,
        rows: Rows | None = None,
    ) -> torch.Tensor:
        return x + self.update(x, tables, cache, index, rows)


class Decoder(nn.Module):
    """A language model of any `Architecture`.

    Parameters come uninitialised: load them (`formats.load`) or draw them (`model.initialise`). Tied embeddings
    have no `head`; `head_weight` is the matrix either way.
    """

    def __init__(
        self, arch: Architecture, dtype: torch.dtype = torch.float32, device: torch.device | str | None = None
    ):
        super().__init__()
        self.arch = arch
        self._kept_tables: dict[tuple, Tables] = {}
        self.native: NativeDecoder | None = None  # decodes a packed model, where it can (`model.packed`)
        with _no_init():
            self.embed = nn.Embedding(arch.vocab_size, arch.hidden_size, dtype=dtype, device=device)
            self.blocks = nn.ModuleList(ResidualBlock(b, arch, dtype, device) for b in arch.blocks)
            self.norm = Scale(arch.hidden_size, dtype=dtype, device=device)
            if not arch.tied_embeddings:
                self.head = Projection(arch.hidden_size, arch.vocab_size, bias=False, dtype=dtype, device=device)

    @property
    def head_weight(self) -> torch.Tensor:
        """(V, D)."""
        return self.embed.weight if self.arch.tied_embeddings else self.head.weight

    @property
    def dtype(self) -> torch.dtype:
        return self.norm.weight.dtype

    @property
    def device(self) -> torch.device:
        return self.norm.weight.device

    def rope_tables(self, start: int, length: int, positions: torch.Tensor | None = None) -> dict[int, Tables]:
        """cos and sin for positions start .. start+length-1, one pair for each head dim in the model, (L, P).

        With `positions` (B, L), all below start+length, for those: (B, 1, L, P).
        """
        if self.arch.rope is None:
            return {}
        dims = {b.head_dim for b in self.arch.blocks if isinstance(b, Attention) and b.rope}
        long = {p: self._long_tables(p, start + length) for p in dims}
        if positions is None:
            return {p: tuple(t[start : start + length] for t in pair) for p, pair in long.items()}
        return {p: tuple(t[positions][:, None] for t in pair) for p, pair in long.items()}

    @torch.inference_mode(False)  # what generation made first, training may use later
    def _long_tables(self, head_dim: int, length: int) -> Tables:
        """Tables for positions 0 .. length-1 at least, in the model's dtype; kept, and doubled when too short."""
        key = (head_dim, self.dtype, self.device)
        kept = self._kept_tables.get(key)
        if kept is None or kept[0].shape[0] < length:
            length = max(256, 1 << (length - 1).bit_length())
            cos, sin = tables(self.arch.rope, head_dim, self.arch.max_positions, 0, length, self.device)
            self._kept_tables[key] = kept = (cos.to(self.dtype), sin.to(self.dtype))
        return kept

    def embed_tokens(self, input_ids: torch.Tensor) -> torch.Tensor:
        """(B, L) int64 -> the stream (B, L, D) before the first block."""
        return self.embed(input_ids)

    def run(
        self,
        x: torch.Tensor,
        start: int = 0,
        stop: int | None = None,
        cache: Memory | None = None,
        rope: dict[int, Tables] | None = None,
        rows: Rows | None = None,
    ) -> torch.Tensor:
        """The stream (B, L, D) after blocks start .. stop-1. With a cache, x are the tokens after those it holds.

        `rows` (see `rows`) tells of padding and packed documents; None asks the cache.
        """
        stop = len(self.blocks) if stop is None else stop
        if rows is None and cache is not None:
            rows = cache.rows(x)
        if rope is None:
            positions = None if rows is None else rows.positions
            rope = self.rope_tables(cache.length if cache else 0, x.shape[1], positions)
        for index in range(start, stop):
            block = self.blocks[index]
            x = block(x, rope.get(getattr(block.spec, "head_dim", 0)), cache, index, rows)
        if cache is not None and stop == len(self.blocks):
            cache.advance(x.shape[1], rows)
        return x

    def rows(
        self,
        input_ids: torch.Tensor,
        cache: Memory | None = None,
        segments: torch.Tensor | None = None,
        keep: torch.Tensor | None = None,
    ) -> Rows | None:
        """What `run` must know of these tokens; see `forward`. None when every row is one text without padding."""
        for name, given in (("segments", segments), ("keep", keep)):
            if given is not None and given.shape != input_ids.shape:
                raise IntarsiaError(
                    f"{name} of shape {tuple(given.shape)} do not fit tokens of shape {tuple(input_ids.shape)}: there "
                    "is one for every token of this call."
                )
        if segments is not None and bool((segments[:, 1:] < segments[:, :-1]).any()):
            raise IntarsiaError("segments must not decrease along a row: number its documents in the order they stand.")
        if cache is not None:
            if segments is not None:
                raise IntarsiaError("a cache continues one text a row: give packed documents without a cache.")
            return cache.rows(input_ids, None if keep is None else keep.bool())
        if keep is not None and bool(keep.all()):
            keep = None
        if keep is None and segments is None:
            return None
        return Rows(input_ids.shape, input_ids.device, None if keep is None else keep.bool(), segments)

    def final_norm(self, x: torch.Tensor) -> torch.Tensor:
        return rms_norm(x, self.norm.weight, self.arch.norm_eps)

    def hidden(
        self,
        input_ids: torch.Tensor,
        cache: Memory | None = None,
        segments: torch.Tensor | None = None,
        keep: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """(B, L) -> (B, L, D) after the final norm: what the head reads. Arguments as in `forward`."""
        rows = self.rows(input_ids, cache, segments, keep)
        return self.final_norm(self.run(self.embed_tokens(input_ids), cache=cache, rows=rows))

    def head_logits(self, x: torch.Tensor) -> torch.Tensor:
        """The stream (B, L, D) after the last block -> logits (B, L, V), in the model's dtype."""
        return self.project(self.final_norm(x))

    def project(self, hidden: torch.Tensor) -> torch.Tensor:
        """The head alone: states (..., D) after the final norm -> logits (..., V)."""
        if not self.arch.tied_embeddings:
            return self.head(hidden)
        packed = getattr(self.embed, "project", None)
        return linear(hidden, self.embed.weight) if packed is None else packed(hidden)

    def forward(
        self,
        input_ids: torch.Tensor,
        cache: Memory | None = None,
        segments: torch.Tensor | None = None,
        keep: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """(B, L) int64 -> logits (B, L, V), in the model's dtype.

        `segments` (B, L) integers, non-decreasing, mark documents packed into a row: attention, convolutions, scans
        and positions begin anew in each, as if each were a row of its own. `keep` (B, L) boolean is False where a token
        is padding, on either side or between: it changes no logit of a real token, now or later. Raises
        `IntarsiaError` for segments with a cache.
        """
        return self.project(self.hidden(input_ids, cache, segments, keep))


class _no_init:
    """Skip the default initialisation of torch layers: every parameter is loaded or drawn by us, and drawing twice
    costs seconds on a large model."""

    _kinds = (nn.Linear, nn.Embedding)

    def __enter__(self) -> None:
        self._saved = [k.reset_parameters for k in self._kinds]
        for k in self._kinds:
            k.reset_parameters = lambda module: None  # type: ignore[method-assign]

    def __exit__(self, *_: object) -> None:
        for k, original in zip(self._kinds, self._saved):
            k.reset_parameters = original  # type: ignore[method-assign]
