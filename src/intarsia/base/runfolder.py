"""The run folder: everything one run makes, and how it continues after being killed at any moment.

    run.json             what the run is: parent, recipe (two runs never share a folder)
    environment.json     the machine and the versions
    metrics.jsonl        rows with a time
    stages/<stage>/      artefacts of a stage; done.json says what it was made from, how long it took, and facts

A stage is done when its done.json carries the fingerprint of what it is made from. Unfinished work of the same
fingerprint is kept for the stage to continue from; work of another fingerprint is removed and made again.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import shutil
import threading
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from intarsia.base.errors import IntarsiaError
from intarsia.base.files import append_jsonl, plain, read_json, read_jsonl, remove_leftovers, write_json
from intarsia.base.machine import environment, peak_rss_bytes


class RunFolder:
    """`runs/<name>`. Making the object makes the folder; `claim` says whose it is and `lock` keeps others out."""

    def __init__(self, path: str | os.PathLike):
        self.path = Path(path)
        if self.path.exists() and not self.path.is_dir():
            raise IntarsiaError(f"{self.path} is a file; a run needs a folder: choose another one with --out.")
        try:
            self.path.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise IntarsiaError(f"could not make the run folder {self.path}: {error.strerror}.") from error

    @contextlib.contextmanager
    def lock(self) -> Iterator[RunFolder]:
        """Hold the folder while a process works in it; a second process gets an `IntarsiaError`.

        The operating system drops the lock with the process that holds it, however that ended, so that a lock is
        never stale. The file says who holds it.
        """
        file = self.path / "lock"
        try:
            file.touch()
        except OSError as error:
            raise IntarsiaError(f"could not write in {self.path}: {error.strerror}.") from error
        with open(file, "a+", encoding="utf-8") as handle:
            try:
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                handle.seek(0)
                holder = handle.read().strip() or "unknown"
                raise IntarsiaError(
                    f"another process (number {holder}) is working in {self.path}: wait for it, stop it, or choose "
                    "another folder with --out."
                ) from None
            with contextlib.suppress(OSError):  # on a full disk it is held all the same, only not signed
                handle.truncate(0)
                handle.write(str(os.getpid()))
                handle.flush()
            remove_leftovers(self.path)
            yield self

    def claim(self, notes: Mapping[str, Any] | None = None, /, **identity: Any) -> None:
        """Say what this run is (parent=, recipe=, ...: JSON-able); refuse a folder that something else was made in.

        The first call writes run.json; a later one compares with it and names what differs. `notes` stand beside the
        identity for people to read: they are told where it differs, and are no reason to refuse.
        """
        file = self.path / "run.json"
        given, notes = _as_json(identity), _as_json(notes or {})
        if not file.exists():
            strangers = [p.name for p in self.path.iterdir() if p.name != "lock" and not p.name.startswith(".")]
            if strangers:
                raise IntarsiaError(
                    f"{self.path} is not empty and is no run folder (it holds {', '.join(sorted(strangers)[:3])}): "
                    "choose another folder with --out."
                )
            write_json(file, given | notes)
            return
        made = read_json(file)
        differing = [key for key in {**made, **given} if key not in notes and made.get(key) != given.get(key)]
        if differing:
            told = [key for key in notes if made.get(key) != notes[key]]
            differing = [_difference(key, made.get(key), (given | notes).get(key)) for key in [*told, *differing]]
            raise IntarsiaError(
                f"{self.path} belongs to another run: {'; '.join(differing)}. "
                f"Choose another folder with --out, or remove this one with: rm -r {self.path}"
            )

    def stage(self, name: str, fingerprint: str) -> Stage:
        """The stage of this name, made from what `fingerprint` stands for."""
        return Stage(self.path / "stages" / name, fingerprint)

    def metrics(self, row: dict[str, Any]) -> None:
        """Append a row to metrics.jsonl; `time` (seconds since 1970) is added."""
        append_jsonl(self.path / "metrics.jsonl", {"time": round(time.time(), 3), **row})

    def write_environment(self, **more: Any) -> None:
        """Write environment.json: versions, processor, threads, torch's build, and whatever else is given."""
        write_json(self.path / "environment.json", environment() | more)

    def peak_rss_bytes(self) -> int:
        """Most main memory that any process held while it worked on the stages that are here."""
        files = [*self.path.glob("stages/*/done.json"), *self.path.glob("stages/*/attempt.json")]
        return max([peak_rss_bytes(), *(read_json(file).get("peak_rss_bytes", 0) for file in files)])

    def seconds(self) -> dict[str, float]:
        """Seconds of every finished stage, all attempts together, in the order in which they finished."""
        done = [(file.parent.name, read_json(file)) for file in self.path.glob("stages/*/done.json")]
        return {name: facts["seconds"] for name, facts in sorted(done, key=lambda item: item[1]["finished"])}


class Stage:
    """One step of a run and the folder of its artefacts.

        with run.stage("library", fingerprint) as stage:
            if not stage.done:
                ...  # write into stage.folder, continue from what is there
                stage.finish(options=54)
    """

    HEARTBEAT = 2.0  # seconds of work that a `kill -9` may leave uncounted

    def __init__(self, folder: Path, fingerprint: str):
        self.folder, self.fingerprint = folder, fingerprint
        self._began: float | None = None
        self._stop = threading.Event()
        self._heart: threading.Thread | None = None
        if folder.exists() and self._made_from() != fingerprint:
            self.remove()
        if not folder.exists():
            write_json(folder / "attempt.json", {"fingerprint": fingerprint, "seconds": 0.0})
        known = self.facts or read_json(folder / "attempt.json")
        self._before = 0.0 if self.done else known["seconds"]
        self._peak_before = known.get("peak_rss_bytes", 0)

    def remove(self) -> None:
        """Remove the stage with all its work."""
        # done.json goes first: a kill now must not leave half a folder that says it is whole.
        (self.folder / "done.json").unlink(missing_ok=True)
        shutil.rmtree(self.folder)

    def _made_from(self) -> str | None:
        """The fingerprint of what lies in the folder; None when it does not say."""
        for name in ("done.json", "attempt.json"):
            with contextlib.suppress(IntarsiaError, KeyError, OSError):
                return read_json(self.folder / name)["fingerprint"]
        return None

    @property
    def done(self) -> bool:
        return (self.folder / "done.json").exists()

    @property
    def facts(self) -> dict[str, Any]:
        """What `finish` wrote; empty before."""
        return read_json(self.folder / "done.json") if self.done else {}

    def part(self, name: str, number: int) -> Path:
        """Where process `number` of those that share the stage leaves rows."""
        return self.folder / f"{name}.{number}.jsonl"

    def rows(self, name: str) -> list[Any]:
        """The rows that any process has left, of this run and of earlier ones that ended."""
        return [row for file in sorted(self.folder.glob(f"{name}.*.jsonl")) for row in read_jsonl(file)]

    @property
    def seconds(self) -> float:
        """Seconds of work so far, interrupted attempts included."""
        if self.done:
            return self.facts["seconds"]
        return self._before + (time.monotonic() - self._began if self._began is not None else 0.0)

    def __enter__(self) -> Stage:
        if not self.done:
            self._began = time.monotonic()
            self._heart = threading.Thread(target=self._beat, daemon=True)
            self._heart.start()
        else:
            (self.folder / "attempt.json").unlink(missing_ok=True)  # a kill between the last two lines of `finish`
        return self

    def _stop_heart(self) -> None:
        """No note is written after this: one in the making could bring back what `finish` removes."""
        self._stop.set()
        if self._heart is not None:
            self._heart.join()

    def __exit__(self, *_: object) -> None:
        self._stop_heart()
        if self._began is not None and not self.done:
            self._note()

    def _beat(self) -> None:
        while not self._stop.wait(self.HEARTBEAT):
            with contextlib.suppress(IntarsiaError):  # a full disk is told by the work itself
                self._note()

    def _note(self) -> None:
        attempt = {"fingerprint": self.fingerprint, "seconds": self.seconds, "peak_rss_bytes": self._peak()}
        write_json(self.folder / "attempt.json", attempt)

    def _peak(self) -> int:
        return max(self._peak_before, peak_rss_bytes())

    def finish(self, seconds: float | None = None, **facts: Any) -> None:
        """Mark the stage done. `seconds` of this attempt come from `with` unless given; earlier ones are added."""
        self._stop_heart()
        total = self.seconds if seconds is None else self._before + seconds
        finished = time.strftime("%Y-%m-%dT%H:%M:%S")
        done = {"fingerprint": self.fingerprint, "seconds": round(total, 3), "peak_rss_bytes": self._peak(),
                "finished": finished}  # fmt: skip
        write_json(self.folder / "done.json", done | facts)
        (self.folder / "attempt.json").unlink(missing_ok=True)


def _as_json(value: Any) -> Any:
    """The value as it will read back from a file, so that both compare equal."""
    return json.loads(json.dumps(value, default=plain))


def _difference(key: str, made: Any, given: Any) -> str:
    """`parent was A, now B`; for tables, only the keys that differ."""
    if isinstance(made, dict) and isinstance(given, dict):
        inner = [k for k in {**made, **given} if made.get(k) != given.get(k)]
        return ", ".join(_difference(f"{key}.{k}", made.get(k), given.get(k)) for k in inner)
    return f"{key} was {_show(made)} and is now {_show(given)}"


def _show(value: Any) -> str:
    return "not there" if value is None else str(value)


def losses(folder: str | os.PathLike) -> list[dict[str, Any]]:
    """One row of a training's metrics for every step: of a step that was done again after an interruption, the last."""
    rows = {row["step"]: row for row in read_jsonl(Path(folder) / "metrics.jsonl") if "loss" in row and "step" in row}
    return [rows[step] for step in sorted(rows)]
