"""safetensors files, read into memory that already exists and written without a copy.

The `safetensors` package maps the file and returns fresh tensors, which counts twice against a process's memory. The
layout is simple: u64 header length, a JSON header {name: {dtype, shape, data_offsets}}, raw little-endian data.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import torch

from intarsia.base.errors import IntarsiaError
from intarsia.base.files import read_json, write_json
from intarsia.formats.checkpoint import PIECE, StoredTensor

DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
_NAMES = {dtype: name for name, dtype in DTYPES.items()}


def stored_tensors(folder: Path) -> list[StoredTensor]:
    """All tensors of a folder's model.safetensors or of the shards that model.safetensors.index.json lists, under the
    names that the files give. Raises `IntarsiaError` for files that are missing, cut short or of another kind.
    """
    index = folder / "model.safetensors.index.json"
    if not index.is_file():
        return _file_tensors(_single_file(folder))
    weight_map: dict[str, str] = read_json(index).get("weight_map", {})
    stored = []
    for shard in sorted(set(weight_map.values())):
        path = folder / shard
        if not path.is_file():
            raise IntarsiaError(f"{folder} lacks the shard {shard} that {index.name} lists: copy or download it again.")
        inside = _file_tensors(path)
        names = {entry.source for entry in inside}
        lost = [name for name, file in weight_map.items() if file == shard and name not in names]
        if lost:
            raise IntarsiaError(f"{path} lacks the tensor {lost[0]!r} that {index.name} places there.")
        stored += inside
    return stored


def _single_file(folder: Path) -> Path:
    files = sorted(folder.glob("*.safetensors"))
    if (folder / "model.safetensors") in files:
        return folder / "model.safetensors"
    if len(files) == 1:
        return files[0]
    if files:
        raise IntarsiaError(f"{folder} has {len(files)} .safetensors files and no model.safetensors.index.json.")
    other = [f.name for f in folder.iterdir() if f.suffix in (".bin", ".pt", ".pth")]
    hint = f" ({other[0]} is a pickle, which can run code and is not read: convert it to safetensors)" if other else ""
    raise IntarsiaError(f"{folder} is no checkpoint: it has config.json but no .safetensors file{hint}.")


def _file_tensors(path: Path) -> list[StoredTensor]:
    header, start = read_header(path)
    stored = []
    for name, entry in header.items():
        if entry["dtype"] not in DTYPES:
            raise IntarsiaError(
                f"tensor {name!r} in {path} is stored as {entry['dtype']}; dtypes that are read: {', '.join(DTYPES)}."
            )
        dtype, shape = DTYPES[entry["dtype"]], tuple(entry["shape"])
        read = Reader(path, start + entry["data_offsets"][0], dtype)
        stored.append(StoredTensor(name, name, path, shape, dtype, read))
    return stored


def read_header(path: Path) -> tuple[dict[str, Any], int]:
    """({name: {dtype, shape, data_offsets}}, where the data begins); checks that the file is whole."""
    size = path.stat().st_size
    with open(path, "rb") as handle:
        length = int.from_bytes(handle.read(8), "little")
        raw = handle.read(length) if length <= size else b""
    if len(raw) < length or size < 8:
        raise IntarsiaError(f"{path} is cut short: its header alone needs {8 + length} bytes and the file has {size}.")
    try:
        header = json.loads(raw)
        header.pop("__metadata__", None)
        needed = 8 + length + max((e["data_offsets"][1] for e in header.values()), default=0)
    except (ValueError, AttributeError, KeyError, TypeError) as error:
        raise IntarsiaError(f"{path} is not a safetensors file, or is damaged: its header is not readable.") from error
    if size < needed:
        raise IntarsiaError(
            f"{path} is cut short: its tensors need {needed} bytes and the file has {size}. Copy or download it again."
        )
    return header, 8 + length


@dataclass(frozen=True)
class Reader:
    """Fills a tensor with what stands from byte `offset` of a file on."""

    path: Path
    offset: int
    dtype: torch.dtype

    def after(self, elements: int) -> Reader:
        """A reader of what follows that many elements."""
        return Reader(self.path, self.offset + elements * self.dtype.itemsize, self.dtype)

    @torch.no_grad()
    def __call__(self, out: torch.Tensor) -> None:
        direct = out.dtype == self.dtype and out.device.type == "cpu"
        flat = out.detach().view(-1)
        buffer = None if direct else torch.empty(min(PIECE, flat.numel()), dtype=self.dtype)
        with open(self.path, "rb", buffering=0) as handle:
            handle.seek(self.offset)
            for piece in flat.split(PIECE):
                target = piece if buffer is None else buffer[: piece.numel()]
                _fill(handle, target, self.path)
                if buffer is not None:
                    piece.copy_(target)


def _fill(handle: BinaryIO, tensor: torch.Tensor, path: Path) -> None:
    view = memoryview(tensor.view(torch.uint8).numpy())
    while view:
        got = handle.readinto(view)
        if not got:
            raise IntarsiaError(f"{path} ended while it was read: it is being changed, or the disk fails.")
        view = view[got:]


@dataclass(frozen=True)
class OutTensor:
    """A tensor to write under a foreign name: `parts` of one dtype, one behind another. Where a single part is smaller
    than `shape`, the rest is zeros."""

    name: str
    parts: tuple[torch.Tensor, ...]
    shape: tuple[int, ...]

    @property
    def dtype(self) -> torch.dtype:
        return self.parts[0].dtype

    @property
    def bytes(self) -> int:
        return torch.Size(self.shape).numel() * self.dtype.itemsize

    def data(self) -> Iterator[torch.Tensor]:
        """What to write, in order, as CPU tensors."""
        for part in self.parts:
            part = part.detach()
            if len(self.parts) == 1 and part.numel() != torch.Size(self.shape).numel():
                padded = part.new_zeros(self.shape)
                padded[tuple(slice(0, n) for n in part.shape)] = part
                part = padded
            yield part.cpu().contiguous()


def write_shards(folder: Path, tensors: list[OutTensor], shard_bytes: int) -> None:
    """Write model.safetensors, or shards of at most `shard_bytes` (a larger tensor gets its own) with their index."""
    shards: list[list[OutTensor]] = [[]]
    filled = 0
    for tensor in tensors:
        if shards[-1] and filled + tensor.bytes > shard_bytes:
            shards.append([])
            filled = 0
        shards[-1].append(tensor)
        filled += tensor.bytes
    if len(shards) == 1:
        _write(folder / "model.safetensors", shards[0])
        return
    weight_map = {}
    for number, shard in enumerate(shards, 1):
        name = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        _write(folder / name, shard)
        weight_map.update({tensor.name: name for tensor in shard})
    total = sum(tensor.bytes for tensor in tensors)
    write_json(folder / "model.safetensors.index.json", {"metadata": {"total_size": total}, "weight_map": weight_map})


@torch.no_grad()
def _write(path: Path, tensors: list[OutTensor]) -> None:
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    position = 0
    for out in tensors:
        end = position + out.bytes
        dtype = _NAMES[out.dtype]
        header[out.name] = {"dtype": dtype, "shape": list(out.shape), "data_offsets": [position, end]}
        position = end
    raw = json.dumps(header, separators=(",", ":")).encode()
    raw += b" " * (-len(raw) % 8)  # the data begins aligned
    with open(path, "wb") as handle:
        handle.write(len(raw).to_bytes(8, "little") + raw)
        for out in tensors:
            for part in out.data():
                handle.write(memoryview(part.view(-1).view(torch.uint8).numpy()))
