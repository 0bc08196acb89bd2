"""What every format gives: an architecture and a list of tensors that can be read one by one.

Weights are read straight into the memory where they will stay, in pieces of a few MiB, because a mapped file counts
as the process's memory and a second copy of the weights is what makes loading a large model fail.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from intarsia.arch import Architecture
from intarsia.base.errors import IntarsiaError

PIECE = 1 << 20  # elements converted at a time

TOKENIZER_FILES = (
    "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "vocab.json",
    "merges.txt", "tokenizer.model", "chat_template.jinja", "chat_template.json",
)


@dataclass(frozen=True)
class StoredTensor:
    """One tensor on disk: `name` is ours, `source` the file's. `dtype` is what it holds once read (a quantised tensor
    reads as float32); `read(out)` fills a tensor of the same shape and any floating dtype, on any device.
    """

    name: str
    source: str
    file: Path
    shape: tuple[int, ...]
    dtype: torch.dtype
    read: Callable[[torch.Tensor], None] = field(repr=False)
    quantised: bool = False

    @property
    def numel(self) -> int:
        return torch.Size(self.shape).numel()


@dataclass
class Checkpoint:
    """An opened checkpoint. `config` is its own metadata; `tokenizer_files` are paths, empty for GGUF."""

    path: Path
    architecture: Architecture
    config: dict[str, Any]
    stored: list[StoredTensor]
    tokenizer_files: list[Path] = field(default_factory=list)

    def tensors(self, dtype: torch.dtype | None = None) -> Iterator[tuple[str, torch.Tensor]]:
        """Our names with freshly read CPU tensors, one at a time, in `dtype` (None: as stored)."""
        for entry in self.stored:
            out = torch.empty(entry.shape, dtype=dtype or entry.dtype)
            entry.read(out)
            yield entry.name, out

    def natural_dtype(self) -> torch.dtype:
        """The dtype that most weights are stored in. Quantised weights have none: bfloat16 where the CPU multiplies it
        natively, float32 elsewhere."""
        if any(entry.quantised for entry in self.stored):
            return torch.bfloat16 if native_bfloat16() else torch.float32
        totals: dict[torch.dtype, int] = {}
        for entry in self.stored:
            totals[entry.dtype] = totals.get(entry.dtype, 0) + entry.numel
        return max(totals, key=totals.__getitem__) if totals else torch.float32


def native_bfloat16() -> bool:
    """Whether this CPU has bfloat16 matrix instructions (AMX or AVX512-BF16)."""
    flags = torch.cpu.get_capabilities() if hasattr(torch.cpu, "get_capabilities") else {}
    return bool(flags.get("amx_bf16") or flags.get("avx512_bf16"))


def check_finite(entry: StoredTensor, tensor: torch.Tensor) -> None:
    """Raise `IntarsiaError` naming tensor and file if any element is NaN or infinite."""
    for piece in tensor.view(-1).split(PIECE):
        # A sum is not finite if any term is not; only then is it worth asking which.
        if not piece.sum(dtype=torch.float32).isfinite() and not piece.isfinite().all():
            bad = int((~tensor.isfinite()).sum())
            raise IntarsiaError(
                f"tensor {entry.source!r} in {entry.file} holds {bad} values that are NaN or infinite (of "
                f"{tensor.numel()}): the file is damaged or the model has diverged. Get it again, or load it with "
                "check=False."
            )
