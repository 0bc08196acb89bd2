"""Documents from files and folders.

One document a file: `.txt .md .rst .py`. One a line: `.jsonl`, also packed as `.jsonl.gz` and `.jsonl.zst` (needs
zstandard). One a row: `.parquet` (needs pyarrow).
"""

from __future__ import annotations

import contextlib
import gzip
import importlib
import json
import os
import zlib
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from types import ModuleType
from typing import Any

from intarsia.base.errors import IntarsiaError

TEXT = (".txt", ".md", ".rst", ".py")
LINES = (".jsonl", ".jsonl.gz", ".jsonl.zst")
TABLE = ".parquet"
READABLE = ", ".join((*TEXT, *LINES, TABLE))
PACKED = (".gz", ".zst", TABLE)

Field = str | tuple[str, ...]
Paths = str | os.PathLike | Iterable[str | os.PathLike]


@dataclass(frozen=True)
class Source:
    """A file to read, or a part of it, and the category that its documents belong to.

    `start` and `stop` (None: the end) count bytes of `.jsonl`, whose lines beginning there belong to the part, and row
    groups of `.parquet`. Other files are read whole.
    """

    path: Path
    category: str
    start: int = 0
    stop: int | None = None

    @property
    def bytes(self) -> int:
        """About how much there is to read: bytes of the file."""
        if self.stop is not None and not self.path.name.endswith(PACKED):
            return self.stop - self.start
        return self.path.stat().st_size


def sources(inputs: Paths | Mapping[str, Paths]) -> list[Source]:
    """Every readable file of `inputs` (files or folders, searched in depth), in order.

    With a mapping, its keys are the categories. Otherwise the category is the stem of a `.jsonl` or `.parquet` file,
    and the name of the folder for the others (of the given folder, where a folder was given). Raises `IntarsiaError`
    for a missing path, another kind of file, an empty folder.
    """
    if isinstance(inputs, Mapping):
        return [replace(s, category=name) for name, paths in inputs.items() for s in sources(paths)]
    found: list[Source] = []
    for given in [inputs] if isinstance(inputs, (str, os.PathLike)) else inputs:
        path = Path(given).expanduser()
        if path.is_dir():
            files = sorted(p for p in path.rglob("*") if p.is_file() and _kind(p) and not _hidden(p, path))
            if not files:
                raise IntarsiaError(f"the folder {path} holds no text: files that can be read end in {READABLE}.")
            found += [Source(file, _category(file, path)) for file in files]
        elif path.is_file():
            if not _kind(path):
                raise IntarsiaError(f"{path} is no text that can be read: files that can be end in {READABLE}.")
            found.append(Source(path, _category(path, path.parent)))
        else:
            raise IntarsiaError(f"there is no file or folder {path}.")
    if not found:
        raise IntarsiaError(f"no input was given: name files or folders of {READABLE}.")
    return list(dict.fromkeys(found))


def parts(source: Source, size: int) -> list[Source]:
    """The file in parts of about `size` bytes, where its kind can be entered in the middle; else the file itself."""
    if source.path.suffix == ".jsonl" and source.bytes > size:
        return [replace(source, start=first, stop=min(first + size, source.bytes))
                for first in range(0, source.bytes, size)]
    if source.path.suffix == TABLE and source.bytes > size:
        with _table(source.path) as table:
            groups = table.num_row_groups
            step = max(1, size * groups // source.bytes)
        return [replace(source, start=first, stop=min(first + step, groups)) for first in range(0, groups, step)]
    return [source]


def documents(source: Source, field: Field = "text") -> Iterator[str]:
    """The documents of one file or part: the text in `field`, or, where it is several, one JSON object of those that a
    row has (`.jsonl` and `.parquet` only).

    Raises `IntarsiaError` naming file and line for what is empty, binary or no JSON, and naming the package where one
    is missing that reads the file.
    """
    empty = True
    for text in {"lines": _lines, "rows": _rows, "text": _whole}[_kind(source.path)](source, field):
        if text.strip():
            empty = False
            yield text
    if empty and source.start == 0 and source.stop is None:
        raise IntarsiaError(f"{source.path} is empty: it holds no text. Fill it or leave it out.")


def _kind(path: Path) -> str | None:
    if path.name.endswith(LINES):
        return "lines"
    if path.suffix == TABLE:
        return "rows"
    return "text" if path.suffix in TEXT else None


def _hidden(path: Path, root: Path) -> bool:
    return any(part.startswith(".") for part in path.relative_to(root).parts)


def _category(path: Path, folder: Path) -> str:
    if _kind(path) == "text":
        return folder.resolve().name or "text"
    return path.name.removesuffix(".gz").removesuffix(".zst").removesuffix(".jsonl").removesuffix(TABLE)


def _decode(data: bytes, where: str) -> str:
    if b"\0" in data:
        raise IntarsiaError(f"{where} is binary (it holds NUL bytes), not text. Leave it out.")
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise IntarsiaError(
            f"{where} is not UTF-8 text (byte {error.start} is 0x{data[error.start]:02x}). Convert it or leave it out."
        ) from error


def _whole(source: Source, field: Field) -> Iterator[str]:
    if not isinstance(field, str):
        raise IntarsiaError(f"{source.path} is plain text and has no fields: {' and '.join(field)} are read from rows "
                            f"of {', '.join((*LINES, TABLE))}.")
    yield _decode(source.path.read_bytes(), str(source.path))


def _lines(source: Source, field: Field) -> Iterator[str]:
    path, damaged = source.path, [EOFError, gzip.BadGzipFile, zlib.error]
    if path.suffix == ".zst":
        damaged.append(_package("zstandard", path).ZstdError)
    try:
        with _open(path) as handle:
            if source.start:
                handle.seek(source.start - 1)
                handle.readline()  # the line that began before belongs to the part before
            place = handle.tell() if path.suffix == ".jsonl" else 0
            for number, line in enumerate(handle, 1):
                if source.stop is not None and place >= source.stop:
                    break
                if line.strip():
                    where = f"the line at byte {place:,}" if source.start else f"line {number}"
                    yield _text_of(line, field, f"{path}, {where},")
                place += len(line)
    except tuple(damaged) as error:
        raise IntarsiaError(f"{path} is damaged or cut short: {error}. Get it again or leave it out.") from error


def _open(path: Path):
    if path.suffix == ".gz":
        return gzip.open(path)
    if path.suffix == ".zst":
        return contextlib.closing(_unpacked(path))
    return open(path, "rb")


def _unpacked(path: Path) -> Iterator[bytes]:
    """Lines of a `.zst` file. zstandard's own reader takes a file that is cut short for one that ends there."""
    zstandard = _package("zstandard", path)
    rest, unpack = b"", None
    with open(path, "rb") as raw:
        while block := raw.read(1 << 20):
            while block:
                if unpack is None or unpack.eof:
                    unpack = zstandard.ZstdDecompressor().decompressobj()
                lines = (rest + unpack.decompress(block)).split(b"\n")
                rest, block = lines.pop(), unpack.unused_data
                yield from (line + b"\n" for line in lines)
    if unpack is None or not unpack.eof:
        raise EOFError("the last frame has no end")
    yield rest


def _rows(source: Source, field: Field) -> Iterator[str]:
    path = source.path
    with _table(path) as table:
        wanted = [field] if isinstance(field, str) else list(field)
        columns = [name for name in wanted if name in table.schema_arrow.names]
        if not columns:
            raise IntarsiaError(f"{path} has no column '{wanted[0]}': it has {', '.join(table.schema_arrow.names)}. "
                                "Name the column that holds the text.")
        stop = table.num_row_groups if source.stop is None else source.stop
        row = 0
        for batch in table.iter_batches(1024, row_groups=range(source.start, stop), columns=columns):
            for text in batch.column(0).to_pylist() if isinstance(field, str) else map(_object, batch.to_pylist()):
                row += 1
                where = f"{path}, row {row} of row groups from {source.start},"
                if text is not None and not isinstance(text, str):
                    raise IntarsiaError(f"{where} holds a {type(text).__name__} in '{field}', which is no text.")
                if text and "\0" in text:
                    raise IntarsiaError(f"{where} is binary (its '{field}' holds NUL characters). Leave it out.")
                yield text or ""


@contextlib.contextmanager
def _table(path: Path) -> Iterator[Any]:
    _package("pyarrow", path)
    from pyarrow import ArrowException, parquet

    try:
        with parquet.ParquetFile(path) as table:
            yield table
    except (ArrowException, OSError) as error:
        raise IntarsiaError(f"{path} is damaged or no parquet: {error}. Get it again or leave it out.") from error


def _package(name: str, path: Path) -> ModuleType:
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        raise IntarsiaError(
            f"{path} needs the package {name}, which is not installed: install it with pip install 'intarsia[data]', "
            "or convert the file to .jsonl or .jsonl.gz."
        ) from error


def _object(row: dict[str, Any]) -> str:
    return json.dumps(row, ensure_ascii=False, sort_keys=True)


def _text_of(line: bytes, field: Field, where: str) -> str:
    text = _decode(line, where)
    try:
        row = json.loads(text)
    except json.JSONDecodeError as error:
        raise IntarsiaError(
            f"{where} is not JSON ({error.msg}). Every line must be an object like {{\"text\": ...}}."
        ) from error
    if not isinstance(field, str) and isinstance(row, dict) and field[0] in row:
        return _object({name: row[name] for name in field if name in row})
    if not isinstance(field, str):
        field = field[0]
    if not isinstance(row, dict) or not isinstance(row.get(field), str):
        has = f"it has {', '.join(row) or 'none'}" if isinstance(row, dict) else f"it is a {type(row).__name__}"
        raise IntarsiaError(f"{where} has no text in a field '{field}': {has}. Name the field that holds the text.")
    try:
        row[field].encode()
    except UnicodeEncodeError as error:
        raise IntarsiaError(f"{where} holds half a surrogate pair, which is no text. Repair it.") from error
    if "\0" in row[field]:
        raise IntarsiaError(f"{where} is binary (its '{field}' holds NUL characters), not text. Leave it out.")
    return row[field]
