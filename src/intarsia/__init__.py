"""Intarsia: make language models cheaper to run without making them worse.

The verbs of the command line, as functions: `load`, `save`, `generate`, `evaluate`, `compress`, `train`. Importing this
package is quick; torch is imported when a verb is first used, transformers only by `intarsia.hf`.
"""

from __future__ import annotations

import importlib
import os
import sys
from types import ModuleType
from typing import Any

# OpenMP's threads, which are torch's, wait for work by spinning, at first for milliseconds, and meanwhile the threads
# of our native code want their cores: prompts took 1.4 times as long (docs/log.md, 2026-11-27). GNU's OpenMP reads its
# settings when torch is imported; where that is over, native code runs on its threads (`ops/native/library.py`).
_given = os.environ.get("OMP_WAIT_POLICY", ""), os.environ.get("GOMP_SPINCOUNT", "")
SPINNING = _given[0].upper() == "ACTIVE" or ("torch" in sys.modules and _given == ("", ""))
if _given == ("", ""):
    os.environ["GOMP_SPINCOUNT"] = "2000"

__version__ = "0.1.0"
__all__ = ["compress", "evaluate", "generate", "load", "save", "train"]

_VERBS = {
    "load": "intarsia.formats.load",
    "save": "intarsia.formats.save",
    "generate": "intarsia.engine.generate.generate",
    "evaluate": "intarsia.evaluate.evaluate",
    "compress": "intarsia.compress.pipeline.compress",
    "train": "intarsia.train.loop.train",
}


def _find(verb: str) -> Any:
    module, _, name = _VERBS[verb].rpartition(".")
    return getattr(importlib.import_module(module), name)


def __getattr__(name: str) -> Any:
    if name not in _VERBS:
        raise AttributeError(f"module 'intarsia' has no attribute {name!r}")
    if _is_room(name):
        return importlib.import_module(f"intarsia.{name}")
    return _find(name)


def __dir__() -> list[str]:
    return sorted({*globals(), *_VERBS})


def _is_room(name: str) -> bool:
    return _VERBS.get(name, "").startswith(f"intarsia.{name}.")


class _CallableRoom(ModuleType):
    """`evaluate`, `compress` and `train` are a room of the house and a verb at once: calling the room does the verb."""

    def __call__(self, *arguments: Any, **options: Any) -> Any:
        return _find(self.__name__.rpartition(".")[2])(*arguments, **options)


class _Package(ModuleType):
    """Python sets a package's attribute when a room is first imported, from wherever: it becomes callable then."""

    def __setattr__(self, name: str, value: Any) -> None:
        if _is_room(name) and isinstance(value, ModuleType):
            value.__class__ = _CallableRoom
        super().__setattr__(name, value)


sys.modules[__name__].__class__ = _Package
