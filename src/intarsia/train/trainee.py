"""The model as a training sees it: tokens and targets in, the loss out, everything inside one module's forward.

Shape letters: B rows of a pass, L length, D model, V vocabulary.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from intarsia.data.samples import Batch
from intarsia.model import Decoder
from intarsia.ops.losses import LEARNING, kl_divergence, next_token_loss


class Tensors(NamedTuple):
    """A batch on the device: tokens, targets (B, L) int64; segments (B, L) int32, None where each row is one text;
    gaps (B, L) float32 of pairs of answers."""

    tokens: torch.Tensor
    targets: torch.Tensor
    segments: torch.Tensor | None
    gaps: torch.Tensor | None = None


def to_tensors(batch: Batch, device: torch.device) -> Tensors:
    tokens, targets, segments = (torch.from_numpy(a) for a in (batch.tokens, batch.targets, batch.segments))
    one = bool((segments == 0).all())
    gaps = None if batch.gaps is None else torch.from_numpy(batch.gaps).to(device)
    return Tensors(tokens.to(device), targets.to(device), None if one else segments.to(device), gaps)


class Answers(nn.Module):
    """A teacher: its hidden states (B, L, D) and head (V, D)."""

    def __init__(self, model: Decoder):
        super().__init__()
        self.model = model.eval().requires_grad_(False)

    @torch.no_grad()
    def forward(self, tokens: torch.Tensor, segments: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor]:
        return self.model.hidden(tokens, segments=segments), self.model.head_weight


class Trainee(nn.Module):
    """`model` with its loss: cross-entropy with a z-loss, and, with a teacher, the share `kl` of KL(teacher || model).

    A teacher is given to each call and is no part of the module, so that nothing of it is trained or saved.
    """

    def __init__(self, model: Decoder, z: float = 0.0, kl: float = 0.0):
        super().__init__()
        self.model, self.z, self.kl = model, z, kl
        self.chunk = chunk_of(model)

    def forward(self, batch: Tensors, teacher: Answers | None = None) -> tuple[torch.Tensor, torch.Tensor]:
        """The loss summed over the tokens that count (a scalar to be differentiated), and -log p(target) of each,
        (B, L), 0 where a token does not count."""
        hidden = self.model.hidden(batch.tokens, segments=batch.segments)
        head = self.model.head_weight
        total, nll = next_token_loss(hidden, head, batch.targets, self.z, self.chunk)
        if teacher is not None:
            valid = batch.targets >= 0
            theirs, their_head = teacher(batch.tokens, batch.segments)
            apart = kl_divergence(theirs[valid], hidden[valid], their_head, head, chunk=self.chunk)
            total = (1 - self.kl) * total + self.kl * apart * valid.sum()
        return total, nll

    def counted(self, batch: Tensors) -> torch.Tensor:
        """Tokens of each row that count (B,): what a step's loss is the mean over."""
        return (batch.targets >= 0).sum(1)


def chunk_of(model: Decoder) -> int:
    """Tokens whose logits are there at once: few sums into the head's gradient, and on a GPU what keeps it busy."""
    return LEARNING if model.device.type == "cpu" else 2048


def recompute_blocks(model: Decoder) -> None:
    """Activation checkpointing: of every block only its input is kept, and the backward pass runs it again."""
    for block in model.blocks:
        plain = block.forward
        block.forward = lambda *args, plain=plain: checkpoint(plain, *args, use_reentrant=False)
