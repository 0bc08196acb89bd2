"""Documents from files and folders: `.txt .md .rst .py` (one a file), `.jsonl` and `.jsonl.gz` (one a line)."""

from __future__ import annotations

import gzip
import json
import os
import zlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from intarsia.base.errors import IntarsiaError

TEXT = (".txt", ".md", ".rst", ".py")
LINES = (".jsonl", ".jsonl.gz")
READABLE = ", ".join(TEXT + LINES)


@dataclass(frozen=True)
class Source:
    """A file to read and the category that its documents belong to."""

    path: Path
    category: str


def sources(inputs: str | os.PathLike | Iterable[str | os.PathLike]) -> list[Source]:
    """Every readable file of `inputs` (files or folders, searched in depth), in order.

    The category is the stem of a `.jsonl` file, and the name of the folder for the others (of the given folder,
    where a folder was given). Raises `IntarsiaError` for a missing path, another kind of file, an empty folder.
    """
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


def documents(source: Source, field: str = "text") -> Iterator[str]:
    """The documents of one file. Raises `IntarsiaError` naming file and line for what is empty, binary or no JSON."""
    empty = True
    for text in _lines(source.path, field) if _kind(source.path) == "lines" else _whole(source.path):
        if text.strip():
            empty = False
            yield text
    if empty:
        raise IntarsiaError(f"{source.path} is empty: it holds no text. Fill it or leave it out.")


def _kind(path: Path) -> str | None:
    if path.name.endswith(LINES):
        return "lines"
    return "text" if path.suffix in TEXT else None


def _hidden(path: Path, root: Path) -> bool:
    return any(part.startswith(".") for part in path.relative_to(root).parts)


def _category(path: Path, folder: Path) -> str:
    if _kind(path) == "lines":
        return path.name.removesuffix(".gz").removesuffix(".jsonl")
    return folder.resolve().name or "text"


def _decode(data: bytes, where: str) -> str:
    if b"\0" in data:
        raise IntarsiaError(f"{where} is binary (it holds NUL bytes), not text. Leave it out.")
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise IntarsiaError(
            f"{where} is not UTF-8 text (byte {error.start} is 0x{data[error.start]:02x}). Convert it or leave it out."
        ) from error


def _whole(path: Path) -> Iterator[str]:
    yield _decode(path.read_bytes(), str(path))


def _lines(path: Path, field: str) -> Iterator[str]:
    try:
        with gzip.open(path) if path.suffix == ".gz" else open(path, "rb") as handle:
            for number, line in enumerate(handle, 1):
                if line.strip():
                    yield _text_of(line, field, f"{path}, line {number},")
    except (EOFError, gzip.BadGzipFile, zlib.error) as error:
        raise IntarsiaError(f"{path} is damaged or cut short: {error}. Get it again or leave it out.") from error


def _text_of(line: bytes, field: str, where: str) -> str:
    text = _decode(line, where)
    try:
        row = json.loads(text)
    except json.JSONDecodeError as error:
        raise IntarsiaError(
            f"{where} is not JSON ({error.msg}). Every line must be an object like {{\"text\": ...}}."
        ) from error
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
