"""One line of JSON asks, one line answers: whoever measures speaks with peers that may be missing, or may crash.

A request is {"do": name, ...arguments}; the answer {"ok": result} or {"error": sentence}. Standard library alone, for
a peer may run under a Python that has nothing else of ours.
"""

from __future__ import annotations

import json
import os
import select
import subprocess
import sys
import tempfile
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

HOME = Path(__file__).parents[1]  # `python -m peers.x` finds this package from here


class PeerError(Exception):
    """A peer could not do what it was asked: the sentence for the table's notes."""


def own_environment() -> dict[str, str]:
    """The environment without what importing our package has put there: each process waits in its own way."""
    return {name: value for name, value in os.environ.items() if name != "GOMP_SPINCOUNT"}


class Peer:
    """A running peer, from this side. It is started by the first request."""

    def __init__(self, name: str, module: str, python: str = sys.executable, threads: int | None = None):
        self.name, self.command = name, [python, "-m", module]
        self.environment = own_environment()
        if paths := os.environ.get("PYTHONPATH"):  # the peer runs in another folder and must find the same package
            self.environment["PYTHONPATH"] = os.pathsep.join(map(os.path.abspath, paths.split(os.pathsep)))
        if threads is not None:
            self.environment["OMP_NUM_THREADS"] = str(threads)
        self.process: subprocess.Popen[bytes] | None = None
        self.log = tempfile.TemporaryFile()  # noqa: SIM115  it lives as long as the peer
        self.gone = ""  # why it will not answer any more

    def __enter__(self) -> Peer:
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def ask(self, do: str, seconds: float = 900, **arguments: Any) -> Any:
        """What the peer answers; raises `PeerError` where it cannot, is too slow, or has died."""
        if self.gone:
            raise PeerError(self.gone)
        try:
            self._start()
            assert self.process and self.process.stdin and self.process.stdout
            self.process.stdin.write(json.dumps({"do": do, **arguments}).encode() + b"\n")
            self.process.stdin.flush()
            if not select.select([self.process.stdout], [], [], seconds)[0]:
                raise TimeoutError(f"no answer to '{do}' in {seconds:g} seconds")
            line = self.process.stdout.readline()
        except OSError as error:  # a TimeoutError is one
            self._end(f"{error}")
            raise PeerError(self.gone) from error
        if not line:
            self._end(f"died at '{do}'")
            raise PeerError(self.gone)
        answer = json.loads(line)
        if "error" in answer:
            raise PeerError(f"{self.name}, at '{do}': {answer['error']}")
        return answer["ok"]

    def stop(self) -> None:
        """End the process, politely first."""
        if self.process is None:
            return
        if self.process.stdin:
            self.process.stdin.close()
        try:
            self.process.wait(10)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
        self.process = None

    def _start(self) -> None:
        if self.process is None:
            pipe = subprocess.PIPE
            self.process = subprocess.Popen(
                self.command, stdin=pipe, stdout=pipe, stderr=self.log, cwd=HOME, env=self.environment
            )

    def _end(self, why: str) -> None:
        if self.process is not None:
            if self.process.poll() is None:
                self.process.kill()
            code = self.process.wait()
            why += f" (exit code {code})" if code and not why.startswith("no answer") else ""
            self.process = None
        self.log.seek(0)
        said = [line for line in self.log.read().decode(errors="replace").splitlines() if line.strip()]
        self.gone = f"{self.name} {why}" + (f"; its last words: {said[-1].strip()[:200]}" if said else "")


def serve(handlers: dict[str, Callable[..., Any]]) -> None:
    """Answer requests from standard input until it ends. What libraries print goes to standard error."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    for line in sys.stdin:
        request = json.loads(line)
        try:
            answer = {"ok": handlers[request.pop("do")](**request)}
        except Exception as error:  # any fault of a peer is its answer
            traceback.print_exc()
            answer = {"error": f"{type(error).__name__}: {' '.join(str(error).split())}"[:300]}
        print(json.dumps(answer), file=answers, flush=True)
