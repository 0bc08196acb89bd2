"""The GGUF container: header, metadata, and where each tensor lies.

The `gguf` package reads it too, but through one small numpy view per token of the vocabulary: seven seconds for a
135M model, and with the whole file mapped. Dequantisation, the hard part, stays with `gguf.quants`.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType
from gguf.quants import dequantize

from intarsia.base.errors import IntarsiaError

_SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
_STRING, _ARRAY = 8, 9
_LENGTH = struct.Struct("<Q")
_PLAIN = {GGMLQuantizationType.F32, GGMLQuantizationType.F16, GGMLQuantizationType.BF16, GGMLQuantizationType.F64}


@dataclass(frozen=True)
class GgufTensor:
    """`shape` in torch order (rows, columns); `offset` from the start of the file, both in bytes."""

    name: str
    shape: tuple[int, ...]
    kind: GGMLQuantizationType
    offset: int
    bytes: int

    @property
    def quantised(self) -> bool:
        return self.kind not in _PLAIN

    @property
    def rows(self) -> int:
        """1 for a vector."""
        return int(np.prod(self.shape)) // self.shape[-1]


@dataclass
class GgufFile:
    path: Path
    metadata: dict[str, Any]
    tensors: dict[str, GgufTensor]

    def rows(self, tensor: GgufTensor, first: int, count: int, handle: BinaryIO) -> np.ndarray:
        """Rows first .. first+count-1 as float32 (count, columns); a vector is one row."""
        columns = tensor.shape[-1]
        row_bytes = tensor.bytes // tensor.rows
        handle.seek(tensor.offset + first * row_bytes)
        raw = np.frombuffer(handle.read(count * row_bytes), dtype=np.uint8).reshape(count, row_bytes)
        if tensor.kind == GGMLQuantizationType.F64:
            return raw.view(np.float64).astype(np.float32)
        try:
            # As one long row: the package works through 16 rows at a time, and short rows leave it mostly overhead.
            return dequantize(raw.reshape(1, -1), tensor.kind).reshape(count, columns)
        except NotImplementedError as error:
            raise IntarsiaError(
                f"tensor {tensor.name!r} in {self.path} is quantised as {tensor.kind.name}, which the gguf package "
                "cannot dequantise; convert the file to another quantisation."
            ) from error


def read_gguf(path: Path) -> GgufFile:
    """Header and metadata of a GGUF file (version 2 or 3, little endian); no weights are read.

    Raises `IntarsiaError` for a file that is no GGUF, is split, uses an unknown tensor type or is cut short.
    """
    with open(path, "rb") as handle:
        if handle.read(4) != b"GGUF":
            raise IntarsiaError(f"{path} is not a GGUF file (it does not begin with the letters GGUF).")
        try:
            return _parse(path, handle)
        except (struct.error, EOFError, UnicodeDecodeError, MemoryError) as error:
            size = path.stat().st_size
            raise IntarsiaError(f"{path} is cut short or damaged: its header exceeds its {size} bytes.") from error


def _parse(path: Path, handle: BinaryIO) -> GgufFile:
    (version,) = _take(handle, "I")
    if version not in (2, 3):
        raise IntarsiaError(f"{path} is GGUF version {version}; versions 2 and 3 (little endian) are read.")
    tensor_count, field_count = _take(handle, "QQ")
    metadata = {}
    for _ in range(field_count):
        key = _string(handle)
        metadata[key] = _value(handle, _take(handle, "I")[0])
    if metadata.get("split.count", 0) > 1:
        parts = metadata["split.count"]
        raise IntarsiaError(f"{path} is one of {parts} parts of a split GGUF; merge them into one file first.")
    entries = [_tensor_entry(path, handle) for _ in range(tensor_count)]
    alignment = metadata.get("general.alignment", 32)
    base = -(-handle.tell() // alignment) * alignment
    tensors = {}
    for name, shape, kind, offset in entries:
        block, block_bytes = GGML_QUANT_SIZES[kind]
        count = int(np.prod(shape))
        tensors[name] = GgufTensor(name, shape, kind, base + offset, count // block * block_bytes)
    _check_size(path, tensors)
    return GgufFile(path, metadata, tensors)


def _check_size(path: Path, tensors: dict[str, GgufTensor]) -> None:
    size = path.stat().st_size
    needed = max((t.offset + t.bytes for t in tensors.values()), default=0)
    if size < needed:
        raise IntarsiaError(
            f"{path} is cut short: its tensors need {needed} bytes and the file has {size}. Copy or download it again."
        )


def _tensor_entry(path: Path, handle: BinaryIO) -> tuple[str, tuple[int, ...], GGMLQuantizationType, int]:
    name = _string(handle)
    (dims,) = _take(handle, "I")
    shape = tuple(reversed(_take(handle, f"{dims}Q")))
    kind, offset = _take(handle, "IQ")
    try:
        return name, shape, GGMLQuantizationType(kind), offset
    except ValueError as error:
        raise IntarsiaError(f"tensor {name!r} in {path} has the unknown GGML type {kind}.") from error


def _take(handle: BinaryIO, layout: str) -> tuple:
    layout = "<" + layout
    return struct.unpack(layout, handle.read(struct.calcsize(layout)))


def _string(handle: BinaryIO) -> str:
    (length,) = _LENGTH.unpack(handle.read(8))
    data = handle.read(length)
    if len(data) < length:
        raise EOFError
    # Pieces of a byte-level vocabulary need not be valid UTF-8 on their own.
    return data.decode("utf-8", errors="surrogateescape")


def _value(handle: BinaryIO, kind: int) -> Any:
    if kind == _STRING:
        return _string(handle)
    if kind == _ARRAY:
        inner, length = _take(handle, "IQ")
        if inner in _SCALARS:
            return list(_take(handle, f"{length}{_SCALARS[inner]}"))
        if inner == _STRING:
            return [_string(handle) for _ in range(length)]
        return [_value(handle, inner) for _ in range(length)]
    if kind not in _SCALARS:
        raise EOFError
    return _take(handle, _SCALARS[kind])[0]
