"""Checkpoints of a training: everything that it needs to go on to the same bits, on any number of ranks.

    checkpoints/step_000000120/
        *.distcp, .metadata    masters and moments (torch.distributed.checkpoint: every rank writes its shards, and
                               any number of ranks reads them back)
        state.json             step, guard, the size and SHA-256 of every file; written last

A checkpoint appears under its name when it is whole. One that was damaged afterwards is named, and the one before it
is taken.
"""

from __future__ import annotations

import shutil
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.api import CheckpointException

from intarsia.base.errors import IntarsiaError
from intarsia.base.files import atomic_path, hash_file, read_json, write_json
from intarsia.train.optimizer import MasterAdamW
from intarsia.train.parallel import Layout
from intarsia.train.ranks import Ranks

STATE = "state.json"


class Checkpoints:
    """The checkpoints of one run folder; the newest `keep` stay."""

    def __init__(self, folder: Path, keep: int, ranks: Ranks):
        self.folder, self.keep, self.ranks = folder, keep, ranks

    def save(self, optimizer: MasterAdamW, layout: Layout, **facts: Any) -> None:
        """Write the state at `optimizer.steps`; `facts` come back from `load`. Raises `IntarsiaError` on a full disk,
        and what was there before is still there."""
        path = self.folder / f"step_{optimizer.steps:09d}"
        with self._writing(path) as temporary:
            _quietly(dcp.save, layout.to_file(optimizer.tensors()), temporary)
            self.ranks.wait()
            if self.ranks.first:
                files = {p.name: [p.stat().st_size, hash_file(p)] for p in sorted(temporary.iterdir())}
                write_json(temporary / STATE, {"step": optimizer.steps, "files": files, **facts})
        if self.ranks.first:
            for old in self.there()[: -self.keep]:
                shutil.rmtree(old, ignore_errors=True)

    @contextmanager
    def _writing(self, path: Path) -> Iterator[Path]:
        """A folder beside `path` that all ranks write into and the first one puts in place."""
        if self.ranks.first:
            with atomic_path(path) as temporary:
                yield self.ranks.agree(temporary)
        else:
            yield self.ranks.agree(None)
        self.ranks.wait()

    def there(self) -> list[Path]:
        """From the oldest to the newest."""
        return sorted(self.folder.glob("step_*"))

    def load(self, path: Path | None, optimizer: MasterAdamW, layout: Layout) -> dict[str, Any]:
        """Continue from a checkpoint: its facts, or {} where there is none yet."""
        if path is None:
            return {}
        state = read_json(path / STATE)
        tensors = layout.to_file(optimizer.tensors())
        _quietly(dcp.load, tensors, path)
        layout.from_file(tensors, optimizer.tensors())
        optimizer.restored(state["step"])
        return state

    def newest_whole(self) -> Path | None:
        """The checkpoint to go on from. One that is damaged is told of; raises `IntarsiaError` where all are."""
        faults = []
        for path in reversed(self.there()):
            fault = _fault(path)
            if not fault:
                if faults:
                    print(f"{'; '.join(faults)}: going on from {path.name}, the one before.", file=sys.stderr)
                return path
            faults.append(fault)
        if faults:
            raise IntarsiaError(
                f"no whole checkpoint is left in {self.folder} ({'; '.join(faults)}): put one back from a copy, or "
                f"begin anew with: rm -r {self.folder}"
            )
        return None


def _fault(path: Path) -> str:
    """What is wrong with a checkpoint, or ""."""
    try:
        files = read_json(path / STATE)["files"]
    except (OSError, IntarsiaError, KeyError, TypeError):
        return f"the checkpoint {path} is damaged ({STATE} is missing or cut short)"
    for name, (size, sha256) in files.items():
        file = path / name
        if not file.is_file():
            return f"the checkpoint {path} is damaged ({name} is missing)"
        if file.stat().st_size != size:
            return f"the checkpoint {path} is damaged ({name} has {file.stat().st_size:,} bytes instead of {size:,})"
        if hash_file(file) != sha256:
            return f"the checkpoint {path} is damaged ({name} has other bytes than were written)"
    return ""


def _quietly(act: Any, tensors: dict[str, Any], path: Path) -> None:
    """torch.distributed.checkpoint without its remark that one process is alone; a full disk is an OSError."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            act(tensors, checkpoint_id=path)
        except (CheckpointException, RuntimeError) as error:
            raise OSError(_reason(error)) from error


def _reason(error: BaseException) -> str:
    """The innermost cause in one line."""
    if isinstance(error, CheckpointException):
        error = next(iter(error.failures.values()))[0]
    while isinstance(error, Exception) and (error.__cause__ or error.__context__) and not isinstance(error, OSError):
        error = error.__cause__ or error.__context__
    return getattr(error, "strerror", None) or " ".join(str(error).split())[:200]
