"""The parent's answers to the text of a distillation, stored once a run, so that students need no parent.

One file, a record a step: final hidden states, or the largest logits with the mass of all others. A record is appended
when it is whole, so that how far the file got is what its length says; it is read as mapped memory.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch

from intarsia.base.files import append_bytes, read_json, write_json
from intarsia.base.progress import Progress
from intarsia.formats import open_checkpoint
from intarsia.model import Decoder

FILE, NOTE = "answers.bin", "answers.json"
Answer = Mapping[str, torch.Tensor]  # of one step: columns by name


class Answers:
    """What `store` wrote. `vocab_size` is that of the model that answered; step -> columns, mapped and not copied."""

    def __init__(self, folder: Path):
        note = read_json(folder / NOTE)
        self.vocab_size, self.columns = note["vocab_size"], _columns(note)
        # Copy-on-write: what is read could be written to without harm, as torch wants it.
        self.rows = np.memmap(folder / FILE, np.uint8, "c", shape=(note["steps"], _record(self.columns)))

    def __getitem__(self, step: int) -> dict[str, torch.Tensor]:
        row, start, found = torch.from_numpy(self.rows[step]), 0, {}
        for name, (shape, dtype) in self.columns.items():
            size = shape.numel() * dtype.itemsize
            found[name] = row[start : start + size].view(dtype).view(shape)
            start += size
        return found


def store(folder: Path, steps: int, vocab_size: int, answer: Callable[[int], Answer]) -> None:
    """Write the answers of `steps` steps to a folder, going on after those that are there.

    `answer`: step -> columns, of the same shapes and dtypes every time.
    """
    file, note = folder / FILE, folder / NOTE
    if not note.exists():
        # The widest numbers stand first, so that every column begins at a multiple of its numbers' size.
        first = sorted(answer(0).items(), key=lambda column: -column[1].dtype.itemsize)
        columns = [[name, list(t.shape), str(t.dtype).removeprefix("torch.")] for name, t in first]
        write_json(note, {"steps": steps, "vocab_size": vocab_size, "columns": columns})
    columns = _columns(read_json(note))
    size = _record(columns)
    done = file.stat().st_size // size if file.exists() else 0
    if file.exists():
        os.truncate(file, done * size)  # a record that a kill cut short
    with Progress("parent's answers", steps, done=done) as progress:
        for step in range(done, steps):
            found = answer(step)
            parts = [found[name].contiguous().cpu().flatten().view(torch.uint8).numpy() for name in columns]
            append_bytes(file, b"".join(part.tobytes() for part in parts).ljust(size, b"\0"))
            progress.advance()


def _columns(note: Mapping[str, Any]) -> dict[str, tuple[torch.Size, torch.dtype]]:
    return {name: (torch.Size(shape), getattr(torch, dtype)) for name, shape, dtype in note["columns"]}


def _record(columns: Mapping[str, tuple[torch.Size, torch.dtype]]) -> int:
    """Bytes of a step, a multiple of 8."""
    return -(-sum(shape.numel() * dtype.itemsize for shape, dtype in columns.values()) // 8) * 8


@contextlib.contextmanager
def set_aside(model: Decoder, path: Path) -> Iterator[None]:
    """Meanwhile the weights of the model's blocks take no memory; afterwards they are read again from the checkpoint at
    `path` that they came from. Embedding, final norm and head stay."""
    kept = {f"blocks.{name}": (p, p.shape) for name, p in model.blocks.named_parameters()}
    for parameter, _ in kept.values():
        parameter.data = parameter.data.new_empty(0)
    try:
        yield
    finally:
        for entry in open_checkpoint(path).stored:
            if entry.name in kept:
                parameter, shape = kept[entry.name]
                parameter.data = parameter.data.new_empty(shape)
                entry.read(parameter.data)
