"""Megatron's indexed data set: token sequences in `<name>.bin`, their lengths and places in `<name>.idx`.

The `.idx`: magic `MMIDIDX\\0\\0`, u64 version 1, u8 dtype code, u64 sequences, u64 documents + 1, int32 lengths,
int64 byte offsets, int64 document boundaries. Megatron-LM, NeMo and datatrove read and write the same files.
A sequence is a document here.
"""

from __future__ import annotations

import contextlib
import functools
import os
import shutil
import struct
from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np

from intarsia.base.errors import IntarsiaError
from intarsia.base.files import atomic_path

MAGIC = b"MMIDIDX\x00\x00"
HEADER = struct.Struct("<QBQQ")
CODES = {1: np.uint8, 2: np.int8, 3: np.int16, 4: np.int32, 5: np.int64, 6: np.float64, 7: np.float32, 8: np.uint16}
UINT16, INT32 = 8, 4


def best_dtype(vocab_size: int) -> np.dtype:
    """uint16 when every token fits with Megatron's own margin (vocabulary under 65,500), else int32."""
    return np.dtype(np.uint16 if vocab_size < 65_500 else np.int32).newbyteorder("<")


class Writer:
    """Append documents to an open `.bin`; made by `writer`, which finishes the pair."""

    def __init__(self, handle, vocab_size: int):
        self.handle, self.vocab_size, self.dtype = handle, vocab_size, best_dtype(vocab_size)
        self.lengths: list[int] = []

    def add(self, tokens: list[int] | np.ndarray) -> None:
        """Append one document of token ids (N,). Raises `IntarsiaError` for an id outside the vocabulary."""
        array = np.asarray(tokens, dtype=np.int64)
        if array.size and not 0 <= array.min() <= array.max() < self.vocab_size:
            wrong = array.max() if array.max() >= self.vocab_size else array.min()
            raise IntarsiaError(
                f"the tokenizer gave the id {wrong}, but its vocabulary has {self.vocab_size:,} entries: "
                "the tokenizer does not fit the model. Use the one that came with the checkpoint."
            )
        self.handle.write(array.astype(self.dtype).tobytes())
        self.lengths.append(array.size)


@contextlib.contextmanager
def writer(stem: str | os.PathLike, vocab_size: int) -> Iterator[Writer]:
    """Write `<stem>.bin` as documents come, then `<stem>.idx`; neither appears when the block fails.

    The `.idx` is renamed into place last, so that a pair whose `.idx` is there is whole.
    """
    index, data = _pair(stem)
    with atomic_path(index) as new_index:
        with atomic_path(data) as new_data, open(new_data, "wb") as handle:
            made = Writer(handle, vocab_size)
            yield made
        _write_index(new_index, np.asarray(made.lengths, dtype="<i4"), made.dtype)


def merge(stems: Iterable[str | os.PathLike], out: str | os.PathLike) -> int:
    """Write the documents of several pairs (of one dtype), one pair after the other, as one; the number of tokens."""
    index, data = _pair(out)
    lengths, dtypes = [np.zeros(0, "<i4")], set()
    with atomic_path(index) as new_index:
        with atomic_path(data) as new_data, open(new_data, "wb") as handle:
            for stem in stems:
                pair = Indexed(stem)
                with open(_pair(stem)[1], "rb") as piece:
                    shutil.copyfileobj(piece, handle, 1 << 20)
                lengths.append(pair.lengths)
                dtypes.add(pair.dtype)
        if len(dtypes) != 1:
            raise IntarsiaError(f"the pieces of {out} have {len(dtypes)} token types: they are joined only if it is 1.")
        joined = np.concatenate(lengths)
        _write_index(new_index, joined, dtypes.pop())
    return int(joined.sum(dtype=np.int64))


def _pair(stem: str | os.PathLike) -> tuple[Path, Path]:
    """`<stem>.idx` and `<stem>.bin`; a stem may have dots in it."""
    stem = Path(stem)
    return stem.with_name(stem.name + ".idx"), stem.with_name(stem.name + ".bin")


def _write_index(path: Path, lengths: np.ndarray, dtype: np.dtype) -> None:
    """The `.idx` of documents that lie end to end: `lengths` (S,) int32."""
    ends = np.cumsum(lengths, dtype="<i8") * dtype.itemsize
    with open(path, "wb") as handle:
        code = UINT16 if dtype.itemsize == 2 else INT32
        handle.write(MAGIC + HEADER.pack(1, code, lengths.size, lengths.size + 1))
        handle.write(lengths.astype("<i4").tobytes())
        handle.write(np.concatenate([np.zeros(min(1, lengths.size), "<i8"), ends[:-1]]).astype("<i8").tobytes())
        handle.write(np.arange(lengths.size + 1, dtype="<i8").tobytes())


class Indexed:
    """Memory-mapped reader. `len` is the number of sequences, `[i]` the tokens of one, `.tokens` all of them (N,).

    `.lengths` (S,) int32 and `.starts` (S,) int64 in tokens; `.boundaries` (D+1,) int64, the first sequence of each
    document and the end. Sequences lie end to end, as every writer leaves them.
    Raises `IntarsiaError` when the pair is missing, cut short, of another format, or the two do not belong together.
    """

    def __init__(self, stem: str | os.PathLike):
        index, data = _pair(stem)
        for path in (index, data):
            if not path.is_file():
                raise IntarsiaError(f"there is no {path}: tokens are a pair of .bin and .idx. Build the data again.")
        start, size = len(MAGIC) + HEADER.size, index.stat().st_size
        with open(index, "rb") as handle:
            head = handle.read(start)
        if head[: len(MAGIC)] != MAGIC or len(head) < start:
            raise IntarsiaError(f"{index} is no index of tokens (no MMIDIDX at its head). Build the data again.")
        version, code, sequences, boundaries = HEADER.unpack_from(head, len(MAGIC))
        if version != 1 or code not in CODES:
            raise IntarsiaError(f"{index} has version {version} and dtype code {code}; version 1 is read here.")
        if np.dtype(CODES[code]).kind == "f":
            raise IntarsiaError(f"{index} describes floating-point numbers (dtype code {code}), which are no tokens.")
        if size != start + sequences * 12 + boundaries * 8:
            raise IntarsiaError(f"{index} is cut short or too long. Build the data again.")
        self.dtype = np.dtype(CODES[code]).newbyteorder("<")
        raw = np.memmap(index, np.uint8, "r")
        self.lengths = np.frombuffer(raw, "<i4", sequences, start)
        offsets = np.frombuffer(raw, "<i8", sequences, start + sequences * 4)
        self.boundaries = np.frombuffer(raw, "<i8", boundaries, start + sequences * 12)
        ends = np.cumsum(self.lengths, dtype=np.int64)
        self.starts = ends - self.lengths
        if not self._agrees(offsets):
            raise IntarsiaError(f"{index} contradicts itself: lengths, places and document boundaries do not fit each "
                                "other. Build the data again, or get the file again.")
        count = int(ends[-1]) if sequences else 0
        if data.stat().st_size != count * self.dtype.itemsize:
            raise IntarsiaError(
                f"{data} does not hold the {count:,} tokens of its index ({data.stat().st_size:,} bytes instead of "
                f"{count * self.dtype.itemsize:,}): it is cut short or of another build. Build the data again."
            )
        # An empty file cannot be mapped.
        self.tokens = np.memmap(data, self.dtype, "r") if count else np.zeros(0, self.dtype)

    def _agrees(self, offsets: np.ndarray) -> bool:
        bounds = self.boundaries
        return bool(
            (self.lengths >= 0).all()
            and np.array_equal(offsets, self.starts * self.dtype.itemsize)
            and bounds.size and bounds[0] == 0 and bounds[-1] == len(self.lengths) and (np.diff(bounds) >= 0).all()
        )

    def __len__(self) -> int:
        return len(self.lengths)

    def __getitem__(self, index: int) -> np.ndarray:
        start = int(self.starts[index])
        return self.tokens[start : start + int(self.lengths[index])]

    @functools.cached_property
    def edges(self) -> np.ndarray:
        """Where in `tokens` each document begins, and the end: (D+1,) int64."""
        return np.append(self.starts, self.tokens.size)[self.boundaries]

    def document(self, index: int) -> np.ndarray:
        """The tokens of document number `index`, of whatever sequences it is."""
        return self.tokens[int(self.edges[index]) : int(self.edges[index + 1])]
