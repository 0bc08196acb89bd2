"""Compiles the native library, once for every level of processor; `python -m intarsia.ops.native.build` does it here.

Used by setup.py too, in an environment without the package's dependencies: standard library only. A level that this
compiler cannot make is left out, and the next lower one runs.
"""

from __future__ import annotations

import hashlib
import os
import platform
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

HERE = Path(__file__).parent
SOURCES = HERE / "cpp"
_AVX512 = ["-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl", "-mavx2", "-mfma", "-mf16c", "-mbmi2"]
_DOTS = [*_AVX512, "-mavx512bf16", "-mavx512vnni"]
LEVELS: dict[str, list[str]] = {  # lowest first: the library's `intarsia_level` answers with a place in this list
    "plain": [],
    "avx2": ["-mavx2", "-mfma", "-mf16c", "-mbmi2"],
    "avx512": _AVX512,
    "avx512bf16": _DOTS,
    "amx": [*_DOTS, "-mamx-tile", "-mamx-bf16"],
}
COMMON = ["-std=c++17", "-O3", "-fno-math-errno", "-ffp-contract=fast", "-fvisibility=hidden", "-fPIC", "-shared",
          "-pthread", "-Wall", "-Wextra", "-Wno-psabi", "-Wno-uninitialized", "-Wno-maybe-uninitialized"]  # fmt: skip


class BuildError(Exception):
    """What went wrong, in the compiler's words."""


def levels() -> list[str]:
    """Those worth compiling on this kind of machine."""
    return list(LEVELS) if platform.machine().lower() in ("x86_64", "amd64") else ["plain"]


def library_path(level: str, folder: Path = HERE) -> Path:
    return folder / f"lib_{level}.so"


def sources_key() -> str:
    """Changes with every change of the sources: a library built from others is not loaded."""
    digest = hashlib.sha256()
    for path in [*sorted(SOURCES.glob("*.[ch]*")), Path(__file__)]:
        digest.update(path.name.encode() + b"\0" + path.read_bytes())
    return digest.hexdigest()[:16]


def compiler() -> list[str]:
    """CXX from the environment, which may be several words, else the first that is there."""
    for words in filter(None, (shlex.split(os.environ.get("CXX", "")), ["g++"], ["clang++"], ["c++"])):
        if shutil.which(words[0]):
            return words
    raise BuildError("there is no C++ compiler (g++, clang++, or the environment's CXX)")


def compile_level(level: str, target: Path) -> None:
    """Write the library of one level to `target`, whole or not at all. Raises BuildError."""
    target.parent.mkdir(parents=True, exist_ok=True)
    partial = target.with_name(f".{target.name}.{os.getpid()}")
    sources = [str(path) for path in sorted(SOURCES.glob("*.cpp"))]
    key = f'-DINTARSIA_SOURCES="{sources_key()}"'
    try:
        done = subprocess.run(
            [*compiler(), *COMMON, *LEVELS[level], key, *sources, "-o", str(partial)], capture_output=True, text=True
        )
        if done.returncode:
            raise BuildError(f"the compiler failed on the level {level}:\n{done.stderr[-4000:]}")
        if done.stderr:
            print(done.stderr, file=sys.stderr)
        os.replace(partial, target)
    except OSError as error:
        raise BuildError(f"the level {level} could not be built: {error}") from error
    finally:
        partial.unlink(missing_ok=True)


def main() -> int:
    """Build every level beside this file; 0 if one succeeded."""
    built = []
    for level in levels():
        try:
            compile_level(level, library_path(level))
            built.append(level)
            print(f"built {library_path(level).name}")
        except BuildError as error:
            print(error, file=sys.stderr)
    return 0 if built else 1


if __name__ == "__main__":
    sys.exit(main())
