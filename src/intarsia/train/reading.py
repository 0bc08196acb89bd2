"""The samples of a step, as tensors, for one rank: read ahead while the step before is computed."""

from __future__ import annotations

from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
import torch

from intarsia.base.errors import IntarsiaError
from intarsia.data import Batch, Samples
from intarsia.train.ranks import Ranks
from intarsia.train.trainee import Tensors, to_tensors


@dataclass(frozen=True)
class Step:
    """What a rank reads of one step: passes of some rows each, and which samples of the step the rows are."""

    passes: list[Batch]
    rows: list[slice]  # of every pass, counted from the step's first sample, with the stride of the ranks

    def tensors(self, device: torch.device) -> list[Tensors]:
        return [to_tensors(batch, device) for batch in self.passes]


class Reader:
    """Steps of `batch` samples, `micro` of them in one pass; a pure function of the step's number."""

    def __init__(self, samples: Samples, batch: int, micro: int, ranks: Ranks, vocab_size: int):
        self.samples, self.batch, self.micro, self.vocab_size = samples, batch, micro, vocab_size
        self.rank, self.stride = ranks.data
        if batch % self.stride:
            raise IntarsiaError(f"a step of {batch} samples cannot be shared by {self.stride} ranks: choose "
                                "batch_tokens so that it has a multiple of as many samples.")
        self.thread = ThreadPoolExecutor(1, "reader")
        self.ahead: tuple[int, Future[Step]] | None = None

    def step(self, number: int) -> Step:
        """Step `number`; the one after it is begun to be read."""
        known = self.ahead[1] if self.ahead and self.ahead[0] == number else self.thread.submit(self._read, number)
        step = known.result()
        self.ahead = (number + 1, self.thread.submit(self._read, number + 1))
        return step

    def close(self) -> None:
        self.thread.shutdown(cancel_futures=True)

    def _read(self, number: int) -> Step:
        own, passes, rows = self.batch // self.stride, [], []
        for first in range(0, own, self.micro):
            count = min(self.micro, own - first)
            start = self.rank + first * self.stride
            passes.append(self.samples.batch(number * self.batch + start, count, self.stride))
            rows.append(slice(start, start + count * self.stride, self.stride))
            self._check(passes[-1], number * self.batch + start)
        return Step(passes, rows)

    def _check(self, batch: Batch, first: int) -> None:
        """Raise `IntarsiaError` for a token that the model does not have: the file has changed since it was built."""
        bad = np.flatnonzero(((batch.tokens < 0) | (batch.tokens >= self.vocab_size)).any(1))
        if bad.size:
            place = self.samples.place(first + int(bad[0]) * self.stride)
            path = self.samples.corpus.path / place.source / f"{self.samples.split}.bin"
            raise IntarsiaError(
                f"{path} is damaged: row {place.row} of {place.source} holds a token over the vocabulary of "
                f"{self.vocab_size:,}. See `intarsia data check {self.samples.corpus.path}`, and build it again."
            )
