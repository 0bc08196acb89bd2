"""The work of a build in pieces: each is read, judged and encoded on its own, by one process or many, once.

A piece is a few files or a part of one. Two passes go over the pieces of a category, and what each leaves is whole or
absent, so that a build that was killed goes on with the pieces that are missing:

    <piece>.scan.npz     digest (16 bytes), UTF-8 bytes and broken filter of every document
    <piece>.shard/       its chosen documents: {train,heldout}.{bin,idx} and what stands beside them (marks.py)
"""

from __future__ import annotations

import hashlib
import multiprocessing
import os
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import FIRST_COMPLETED, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from intarsia.base.errors import IntarsiaError
from intarsia.base.files import atomic_path
from intarsia.base.progress import Progress
from intarsia.data.conversations import Encoded
from intarsia.data.filters import RULES, Filters
from intarsia.data.indexed import writer
from intarsia.data.marks import Marks
from intarsia.data.sources import Field, Source, documents, parts

SPLITS = ("train", "heldout")
PIECE_BYTES = 16 << 20  # of files: what is done again after a kill
BATCH_BYTES = 1 << 20  # text given to the tokenizer at once
DIGEST = 16  # bytes of SHA-256 that name a document

Report = Callable[[int], None]  # is told of bytes of text done


def pieces(files: list[Source], size: int | None = None) -> list[tuple[Source, ...]]:
    """The files, in order, cut and gathered into pieces of about `size` bytes."""
    size = size or PIECE_BYTES
    made: list[list[Source]] = [[]]
    room = size
    for part in (part for file in files for part in parts(file, size)):
        if made[-1] and part.bytes > room:
            made.append([])
            room = size
        made[-1].append(part)
        room -= part.bytes
    return [tuple(piece) for piece in made]


@dataclass(frozen=True)
class Scan:
    """First pass over a piece: what its documents are, without their text."""

    piece: tuple[Source, ...]
    field: Field
    filters: Filters
    target: Path

    @property
    def bytes(self) -> int:
        return sum(part.bytes for part in self.piece)

    def run(self, tokenizer: Any, report: Report) -> None:
        digests, sizes, broken = [], [], []
        for part in self.piece:
            left = part.bytes
            for text in documents(part, self.field):
                data = text.encode()
                digests.append(hashlib.sha256(data).digest()[:DIGEST])
                sizes.append(len(data))
                rule = self.filters.broken(text)
                broken.append(0 if rule is None else 1 + RULES.index(rule))
                report(done := min(len(data), left))
                left -= done
            report(left)
        with atomic_path(self.target) as temporary, open(temporary, "wb") as handle:
            np.savez(
                handle,
                digests=np.frombuffer(b"".join(digests), ">u8").astype(np.uint64).reshape(-1, 2),
                sizes=np.asarray(sizes, np.int64),
                broken=np.asarray(broken, np.uint8),
            )


@dataclass(frozen=True)
class Encode:
    """Second pass: tokens of the documents that were chosen. `split` (N,) int8: 0 train, 1 held out, -1 neither."""

    piece: tuple[Source, ...]
    field: Field
    separator: int | None
    split: np.ndarray
    bytes: int
    target: Path

    def run(self, tokenizer: Any, report: Report) -> None:
        end = [] if self.separator is None else [self.separator]
        marks = (Marks(), Marks())
        with atomic_path(self.target) as folder:
            folder.mkdir()
            with writer(folder / "train", tokenizer.vocab_size) as train, \
                    writer(folder / "heldout", tokenizer.vocab_size) as heldout:
                for batch in self._batches():
                    made = _encoded(tokenizer, [text for text, *_ in batch])
                    for document, (_, split, size) in zip(made, batch, strict=True):
                        (train, heldout)[split].add([*document.tokens, *end])
                        marks[split].add(document, size)
                    report(sum(size for *_, size in batch))
            kind = getattr(tokenizer, "kind", "text")
            for name, those in zip(SPLITS, marks, strict=True):
                those.save(folder, name, masked=kind != "text", paired=kind == "preferences")

    def _batches(self) -> Iterator[list[tuple[str, int, int]]]:
        batch, held, number = [], 0, -1
        texts = (text for part in self.piece for text in documents(part, self.field))
        for number, (split, text) in enumerate(zip(self.split, texts)):  # noqa: B007
            if split >= 0:
                size = len(text.encode())
                batch.append((text, int(split), size))
                held += size
            if held >= BATCH_BYTES:
                yield batch
                batch, held = [], 0
        if batch:
            yield batch
        if number + 1 != len(self.split) or next(texts, None) is not None:
            names = " or ".join(dict.fromkeys(str(part.path) for part in self.piece))
            raise IntarsiaError(f"{names} changed while it was read: run the same command again.")


def _encoded(tokenizer: Any, texts: list[str]) -> list[Encoded]:
    if hasattr(tokenizer, "encode_documents"):
        return tokenizer.encode_documents(texts)
    if hasattr(tokenizer, "encode_batch"):
        return [Encoded(ids) for ids in tokenizer.encode_batch(texts)]
    return [Encoded(tokenizer.encode(text)) for text in texts]


class Workers:
    """Who does the tasks: this process (`count` 1, where the tokenizer's own threads work) or `count` others.

    A context manager; the processes start when they are first needed.
    """

    def __init__(self, tokenizer: Any, count: int):
        # Fresh processes: a fork would copy the tokenizer's threads in whatever state they are.
        self.tokenizer, self.count, self.spawn = tokenizer, count, multiprocessing.get_context("spawn")
        self.pool: ProcessPoolExecutor | None = None
        self.counter: Any = None  # bytes done by all of them

    def __enter__(self) -> Workers:
        return self

    def __exit__(self, *_) -> None:
        if self.pool is not None:
            self.pool.shutdown(cancel_futures=True)

    def run(self, tasks: list[Scan] | list[Encode], title: str) -> None:
        """Run the tasks whose target is not there yet, with progress over all."""
        left = [task for task in tasks if not task.target.exists()]
        total = sum(task.bytes for task in tasks)
        with Progress(title, total, total - sum(task.bytes for task in left)) as progress:
            if self.count <= 1 or len(left) <= 1:
                for task in left:
                    task.run(self.tokenizer, progress.advance)
            else:
                self._run_in_pool(left, progress)

    def _run_in_pool(self, tasks: list[Scan] | list[Encode], progress: Progress) -> None:
        if self.pool is None:
            self.counter = self.spawn.Value("q", 0)
            self.pool = ProcessPoolExecutor(self.count, self.spawn, _start, (self.tokenizer, self.counter))
        before = self.counter.value
        try:
            running = {self.pool.submit(_run, task) for task in tasks}
            while running:
                done, running = wait(running, timeout=0.5, return_when=FIRST_COMPLETED)
                progress.advance(self.counter.value - before - (progress.done - progress.first))
                for future in done:
                    future.result()
        except BrokenProcessPool as error:
            raise IntarsiaError(
                "a worker was killed, most often for lack of memory: run the same command again, with fewer --workers. "
                "What was finished is kept."
            ) from error


_worker: tuple[Any, Report] | None = None  # of this process


def _start(tokenizer: Any, counter: Any) -> None:
    global _worker
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # the processes are the parallelism

    def report(count: int) -> None:
        with counter.get_lock():
            counter.value += count

    _worker = (tokenizer, report)
    threading.Thread(target=_follow_parent, daemon=True).start()


def _follow_parent() -> None:
    """End with the parent, even where it was killed and could tell nobody."""
    multiprocessing.parent_process().join()
    os._exit(1)


def _run(task: Scan | Encode) -> None:
    task.run(*_worker)
