"""Our training loop as a peer: the steps of a recipe, as `intarsia train` takes them."""

from __future__ import annotations

# Before torch, as the command line does: it says how torch's threads wait.
import intarsia  # noqa: F401 # isort: skip

import time
from pathlib import Path
from typing import Any

import torch

from intarsia.base.recipe import load_recipe
from intarsia.base.runfolder import RunFolder
from intarsia.train.loop import take_step
from intarsia.train.ranks import joined
from intarsia.train.recipe import Recipe
from intarsia.train.start import prepare
from peers.protocol import serve


class Training:
    """One run, a few steps at a time."""

    def load(self, recipe: str, changes: list[str], out: str) -> str:
        self.grid = joined()
        self.job = prepare(load_recipe(Recipe, recipe, changes), RunFolder(Path(out)), self.grid.__enter__())
        return f"torch {torch.__version__}"

    def train(self, steps: int) -> dict[str, Any]:
        """Seconds of each step: reading, forward, backward, clipping, AdamW on float32 masters."""
        seconds = []
        for _ in range(steps):
            began = time.perf_counter()
            row = take_step(self.job, self.job.optimizer.steps)
            seconds.append(time.perf_counter() - began)
        return {"seconds": seconds, "loss": row["loss"]}


if __name__ == "__main__":
    peer = Training()
    serve({"load": peer.load, "train": peer.train})
