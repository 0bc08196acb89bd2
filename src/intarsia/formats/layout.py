"""Where our tensors lie in a foreign file: renamed, reshaped, one behind another in one tensor, or split over several.

A format describes its files once, as a layout {foreign name: `Foreign`}; reading and writing both follow it.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch

from intarsia.base.errors import IntarsiaError
from intarsia.formats.checkpoint import StoredTensor
from intarsia.formats.names import our_shapes
from intarsia.formats.safetensors_file import OutTensor


@dataclass(frozen=True)
class Piece:
    """One of our tensors, or element `index` of its first dimension (one expert of many)."""

    name: str
    index: int | None = None

    def numel(self, shapes: dict[str, tuple[int, ...]]) -> int:
        shape = shapes[self.name]
        return torch.Size(shape if self.index is None else shape[1:]).numel()


@dataclass(frozen=True)
class Foreign:
    """A tensor of the format: its pieces lie one behind another, each row by row. Where a single piece is smaller than
    `shape`, the rest is zeros."""

    shape: tuple[int, ...]
    pieces: tuple[Piece, ...]


Layout = dict[str, Foreign]


def whole(name: str, shape: tuple[int, ...]) -> Foreign:
    """A tensor of ours under another name, with as many elements."""
    return Foreign(shape, (Piece(name),))


def out_tensors(layout: Layout, parameters: dict[str, torch.Tensor]) -> list[OutTensor]:
    """What to write for a model with these parameters."""

    def part(piece: Piece) -> torch.Tensor:
        tensor = parameters[piece.name]
        return tensor if piece.index is None else tensor[piece.index]

    return [OutTensor(name, tuple(map(part, f.pieces)), f.shape) for name, f in layout.items()]


def arrange(
    entries: Iterable[StoredTensor], layout: Layout, shapes: dict[str, tuple[int, ...]], canonical: Callable[[str], str]
) -> list[StoredTensor]:
    """The tensors of a file as ours. `shapes` are those of our parameters, `canonical` gives a source's name in the
    layout. A stranger keeps its name, for the caller to report. Raises `IntarsiaError` for a tensor of a wrong shape
    and for one of ours that is there in part.
    """
    stored: list[StoredTensor] = []
    slices: dict[str, dict[int, StoredTensor]] = {}
    for entry in entries:
        foreign = layout.get(canonical(entry.source))
        if foreign is None:
            stored.append(entry)
            continue
        if entry.shape != foreign.shape:
            raise IntarsiaError(
                f"tensor {entry.source!r} in {entry.file} has the shape {entry.shape}; the model needs {foreign.shape}."
            )
        start = 0
        for piece in foreign.pieces:
            shape = shapes[piece.name] if piece.index is None else shapes[piece.name][1:]
            part = dataclasses.replace(entry, name=piece.name, shape=shape, read=entry.read.after(start))
            start += part.numel
            if piece.index is None:
                stored.append(part)
            elif piece.index in slices.setdefault(piece.name, {}):
                raise IntarsiaError(f"{entry.file.parent} holds {entry.source!r} twice.")
            else:
                slices[piece.name][piece.index] = part
    return stored + [_gathered(name, shapes[name], parts) for name, parts in slices.items()]


@dataclass(frozen=True)
class _Gather:
    """Reads a tensor whose slices stand in tensors of their own."""

    parts: dict[int, StoredTensor]

    def __call__(self, out: torch.Tensor) -> None:
        for index, part in self.parts.items():
            part.read(out[index])


def _gathered(name: str, shape: tuple[int, ...], parts: dict[int, StoredTensor]) -> StoredTensor:
    first = next(iter(parts.values()))
    if len(parts) < shape[0]:
        lost = next(i for i in range(shape[0]) if i not in parts)
        raise IntarsiaError(
            f"{first.file.parent} holds {len(parts)} of {shape[0]} parts of {name} (part {lost} is missing): the "
            "checkpoint is not whole."
        )
    return dataclasses.replace(first, name=name, shape=shape, read=_Gather(parts))


def block_of(name: str) -> tuple[int, str]:
    """`blocks.3.mixer.q.weight` -> (3, "mixer.q.weight")."""
    _, index, rest = name.split(".", 2)
    return int(index), rest


__all__ = ["Foreign", "Layout", "Piece", "arrange", "block_of", "our_shapes", "out_tensors", "whole"]
