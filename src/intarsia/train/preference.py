"""The model as preference tuning sees it: pairs of answers in, and how much more it is for the chosen one than a frozen
reference is.

Shape letters: B rows of a pass, L length, S segments of a row (answers, padding), P pairs of a row.
"""

from __future__ import annotations

import torch
from torch import nn

from intarsia.model import Decoder
from intarsia.ops.losses import token_nll
from intarsia.ops.preference import dpo_loss, rpo_loss
from intarsia.train.recipe import Preference
from intarsia.train.trainee import Answers, Tensors, chunk_of


class PreferenceTrainee(nn.Module):
    """`model` with the loss of `settings`. Called like `Trainee`, with the reference as teacher."""

    def __init__(self, model: Decoder, settings: Preference):
        super().__init__()
        self.model, self.settings, self.chunk = model, settings, chunk_of(model)

    def forward(self, batch: Tensors, reference: Answers) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """The loss summed over the pairs (a scalar to be differentiated), that of each (B, P), 0 where there is none,
        and the margin of each (B, P) as in ops.preference."""
        nll = token_nll(self.model.hidden(batch.tokens, segments=batch.segments), self.model.head_weight,
                        batch.targets, self.chunk)  # fmt: skip
        with torch.no_grad():
            theirs = token_nll(*reference(batch.tokens, batch.segments), batch.targets, self.chunk)
        owners = _owners(batch)
        ours, theirs = ((owners * values[..., None]).sum(1) for values in (nll, theirs))  # (B, S)
        closer = theirs - ours  # log pi - log pi_ref of every answer
        margin = closer[:, ::2] - closer[:, 1::2]
        there, kind = _pairs(batch, owners), self.settings.kind
        if kind == "dpo":
            loss = dpo_loss(margin, self.settings.beta)
        else:
            gap = torch.where(owners > 0, batch.gaps[..., None], -torch.inf).amax(1)[:, ::2]
            loss = rpo_loss(margin, torch.where(there, gap, 0.0), self.settings.beta, self.settings.eta)
        if self.settings.sft:
            loss = loss + self.settings.sft * (ours / _answered(batch, owners).clamp(min=1))[:, ::2]
        loss = torch.where(there, loss, 0.0)
        return loss.sum(), loss.detach(), margin.detach()

    def counted(self, batch: Tensors) -> torch.Tensor:
        """Pairs of each row (B,): what a step's loss is the mean over."""
        return _pairs(batch, _owners(batch)).sum(1)


def _owners(batch: Tensors) -> torch.Tensor:
    """(B, L, S) boolean: which segment a token belongs to; S is even. Sums over it are the same every time."""
    count = int(batch.segments.max()) + 1
    return batch.segments[..., None] == torch.arange(count + count % 2, device=batch.segments.device)


def _answered(batch: Tensors, owners: torch.Tensor) -> torch.Tensor:
    """Tokens of each answer that count, (B, S)."""
    return (owners & (batch.targets >= 0)[..., None]).sum(1)


def _pairs(batch: Tensors, owners: torch.Tensor) -> torch.Tensor:
    """(B, P) boolean: where there is a pair, and neither padding nor nothing."""
    return _answered(batch, owners)[:, ::2] > 0
