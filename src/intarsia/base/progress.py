"""Progress with time left: one live line on a terminal, plain lines in a log."""

from __future__ import annotations

import sys
import time


def duration(seconds: float) -> str:
    """`4 s`, `3 min 05 s`, `1 h 20 min`."""
    seconds = max(0, round(seconds))
    if seconds < 60:
        return f"{seconds} s"
    if seconds < 3600:
        return f"{seconds // 60} min {seconds % 60:02d} s"
    return f"{seconds // 3600} h {seconds % 3600 // 60:02d} min"


class Progress:
    """Count `total` units of one stage and say how far it is and how long it will still take.

    Prints nothing in the first two seconds, then rewrites one line on a terminal, or prints a plain line at most
    every `interval` seconds elsewhere. `done` may start above zero when work is resumed: the rate counts only
    what this process did. Use as a context manager; the last line says the time taken.
    """

    def __init__(self, title: str, total: float, done: float = 0, interval: float = 15.0, stream=None):
        self.title, self.total, self.done, self.interval = title, total, done, interval
        self.stream = stream or sys.stderr
        self.live = self.stream.isatty()
        self.began = self.last = time.monotonic()
        self.first = done
        self.shown = False

    def __enter__(self) -> Progress:
        return self

    def __exit__(self, kind, value, trace) -> None:
        if self.shown and kind is None:
            self._print(f"{self.title}: done in {duration(time.monotonic() - self.began)}", last=True)
        elif self.shown and self.live:
            print(file=self.stream)

    def advance(self, amount: float = 1, note: str = "") -> None:
        """Count `amount` more units; `note` (a loss, a rate) stands at the end of the line."""
        self.done += amount
        now = time.monotonic()
        wait = 0.2 if self.live else self.interval
        if now - self.began < 2 or now - self.last < (wait if self.shown else 0):
            return
        self.last = now
        rate = (self.done - self.first) / (now - self.began)
        left = duration((self.total - self.done) / rate) if rate > 0 else "unknown"
        share = 100 * self.done / self.total if self.total else 100
        self._print(f"{self.title}: {share:3.0f} %, {left} left{'  ' + note if note else ''}")

    def _print(self, text: str, last: bool = False) -> None:
        self.shown = True
        if self.live:
            print(f"\r\x1b[2K{text}", end="\n" if last else "", file=self.stream, flush=True)
        else:
            print(text, file=self.stream, flush=True)
