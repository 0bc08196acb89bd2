"""Files that are whole or absent: atomic writes, JSON, JSON lines, fingerprints.

Everything that a run keeps goes through here, so that `kill -9` or a full disk at any moment leaves
either the old file or the new one, never half of one.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
import os
import re
import shutil
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from intarsia.base.errors import IntarsiaError

# What a kill leaves: names that `atomic_path` gives, and those that safetensors gives to what it writes into.
_LEFTOVER = re.compile(r"\..+\.[0-9a-f]{8}\.(tmp|old)|\.tmp[0-9A-Za-z]{6}")


def _disk_error(path: Path, error: Exception) -> IntarsiaError:
    folder = path if path.is_dir() else path.parent
    free = shutil.disk_usage(folder).free / 2**20 if folder.exists() else 0.0
    return IntarsiaError(
        f"could not write {path}: {getattr(error, 'strerror', None) or error} ({free:.0f} MiB free there). "
        "Nothing that was finished is lost: free some space and run the same command again."
    )


@contextlib.contextmanager
def atomic_path(path: str | os.PathLike) -> Iterator[Path]:
    """Yield a temporary file or folder name beside `path`; on success rename it to `path`, on failure remove it.

    An existing folder at `path` is replaced. Raises `IntarsiaError` when the disk refuses.
    """
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex[:8]}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        yield temporary
        _sync(temporary)
        if path.is_dir() and temporary.is_dir():
            old = path.with_name(f".{path.name}.{uuid.uuid4().hex[:8]}.old")
            os.replace(path, old)
            os.replace(temporary, path)
            shutil.rmtree(old, ignore_errors=True)
        else:
            os.replace(temporary, path)
    except (OSError, SafetensorError) as error:  # safetensors reports a full disk as its own error
        raise _disk_error(path, error) from error
    finally:
        if temporary.is_dir():
            shutil.rmtree(temporary, ignore_errors=True)
        else:
            temporary.unlink(missing_ok=True)


def remove_leftovers(folder: str | os.PathLike) -> None:
    """Remove what `atomic_path` had begun or set aside under `folder` when its process was killed.

    Only for a folder in which no other process writes.
    """
    for path in [p for p in Path(folder).rglob(".*") if _LEFTOVER.fullmatch(p.name)]:
        if path.is_dir():
            shutil.rmtree(path, ignore_errors=True)
        else:
            path.unlink(missing_ok=True)


def _sync(path: Path) -> None:
    if path.is_file():
        with open(path, "rb") as handle:
            os.fsync(handle.fileno())


def write_text(path: str | os.PathLike, text: str) -> None:
    """Write `text` as UTF-8, atomically."""
    with atomic_path(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def write_json(path: str | os.PathLike, value: Any) -> None:
    """Write `value` as indented JSON, atomically. Dataclasses and pydantic models are accepted."""
    write_text(path, json.dumps(value, indent=1, default=plain) + "\n")


def read_json(path: str | os.PathLike) -> Any:
    """Read a JSON file; a damaged one is an `IntarsiaError` that names it."""
    try:
        return json.loads(Path(path).read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise IntarsiaError(f"{path} is not readable as JSON ({error}). Delete it to have it made again.") from error


def append_jsonl(path: str | os.PathLike, row: Any) -> None:
    """Append one row as a line of JSON and flush it to the operating system."""
    path = Path(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        torn = path.exists() and path.stat().st_size > 0 and not _ends_with_newline(path)
        with open(path, "a", encoding="utf-8") as handle:
            # A line that a kill cut short stays cut short; it must not swallow the next one.
            handle.write(("\n" if torn else "") + json.dumps(row, default=plain) + "\n")
    except OSError as error:
        raise _disk_error(path, error) from error


def append_bytes(path: str | os.PathLike, data: bytes) -> None:
    """Append bytes and flush them to the operating system."""
    path = Path(path)
    try:
        with open(path, "ab") as handle:
            handle.write(data)
    except OSError as error:
        raise _disk_error(path, error) from error


def _ends_with_newline(path: Path) -> bool:
    with open(path, "rb") as handle:
        handle.seek(-1, os.SEEK_END)
        return handle.read(1) == b"\n"


def read_jsonl(path: str | os.PathLike) -> list[Any]:
    """All whole rows of a JSON-lines file; a last line cut short by a kill is left out. Missing file: no rows."""
    path = Path(path)
    if not path.exists():
        return []
    rows = []
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
        with contextlib.suppress(json.JSONDecodeError):
            rows.append(json.loads(line))
    return rows


def plain(value: Any) -> Any:
    """Turn dataclasses, pydantic models, paths, sets and numpy scalars into what JSON can hold."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return dataclasses.asdict(value)
    if hasattr(value, "model_dump"):
        return value.model_dump(mode="json")
    if isinstance(value, Path):
        return str(value)
    if isinstance(value, (set, frozenset)):
        return sorted(value)
    if hasattr(value, "tolist"):
        return value.tolist()
    raise TypeError(f"cannot write {type(value).__name__} as JSON")


def fingerprint(*parts: Any) -> str:
    """A short stable hash (16 hex digits) of any JSON-able values: what an artefact was made from."""
    text = json.dumps(parts, sort_keys=True, default=plain)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def hash_file(path: str | os.PathLike) -> str:
    """SHA-256 of a file's bytes, 64 hex digits."""
    with open(path, "rb") as handle:
        return hashlib.file_digest(handle, "sha256").hexdigest()
