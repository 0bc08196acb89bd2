"""Which steps are left out: a loss or gradient that is no number, and a loss far above those before it."""

from __future__ import annotations

import math
import statistics
from typing import Any

import torch

from intarsia.base.errors import IntarsiaError
from intarsia.data import Samples
from intarsia.train.recipe import Guard as Settings

NAMED = 4  # samples told of a step that is left out


class Guard:
    """Judges steps by the losses that were accepted before; `state` is all it knows, JSON-able."""

    def __init__(self, settings: Settings, state: dict[str, Any] | None = None):
        self.settings = settings
        known = state or {"losses": [], "skipped": 0, "in_a_row": 0}
        self.losses, self.skipped, self.in_a_row = list(known["losses"]), known["skipped"], known["in_a_row"]

    @property
    def state(self) -> dict[str, Any]:
        return {"losses": self.losses, "skipped": self.skipped, "in_a_row": self.in_a_row}

    def judge(self, loss: float, norm: float) -> str:
        """Why a step must not be taken, or "". Counts it either way."""
        why = self._why(loss, norm)
        if not why:
            self.losses = [*self.losses, loss][-self.settings.window :]
            self.in_a_row = 0
            return ""
        self.skipped += 1
        self.in_a_row += 1
        return why

    def _why(self, loss: float, norm: float) -> str:
        if not math.isfinite(loss):
            return f"the loss is {loss}"
        if not math.isfinite(norm):
            return f"the gradient's norm is {norm}"
        if len(self.losses) < self.settings.window:
            return ""
        mean, spread = statistics.fmean(self.losses), statistics.pstdev(self.losses)
        if loss > mean + self.settings.spike * max(spread, 0.01 * mean):
            return f"the loss jumped from {mean:.3f} (± {spread:.3f}) to {loss:.3f}"
        return ""

    def check_going_on(self, step: int) -> None:
        """Raise `IntarsiaError` where so many steps in a row were left out that training is over."""
        if self.in_a_row >= self.settings.most:
            raise IntarsiaError(
                f"{self.in_a_row} steps in a row were left out, the last of them step {step}: the training has "
                "diverged. Go back to an earlier checkpoint (remove the later ones), or begin anew with a lower "
                "optimizer.lr, a longer schedule.warmup, or loss.z = 1e-4."
            )


def worst(samples: Samples, first: int, losses: torch.Tensor) -> list[dict[str, Any]]:
    """Where the samples of a step that is left out come from, the most suspicious first.

    `losses` (batch,) are the mean losses of samples `first`, `first` + 1, ...; what is no number is worse than any.
    """
    order = torch.where(losses.isfinite(), losses, torch.inf).argsort(descending=True, stable=True)
    named = []
    for index in order[:NAMED].tolist():
        place = samples.place(first + index)
        named.append({"sample": first + index, "source": place.source, "epoch": place.epoch, "row": place.row,
                      "loss": float(losses[index])})  # fmt: skip
    return named
