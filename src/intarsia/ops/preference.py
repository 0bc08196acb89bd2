"""Losses of preferences: from how much likelier a model makes an answer than its reference does, for pairs of answers.

Shape letters: P pairs (any shape). `margin` (P) is log (pi / pi_ref) of the chosen answer minus the rejected one's.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F


def dpo_loss(margin: torch.Tensor, beta: float) -> torch.Tensor:
    """-log sigmoid(beta x margin), (P): direct preference optimisation (Rafailov et al., arXiv 2305.18290, eq. 7)."""
    return -F.logsigmoid(beta * margin)


def rpo_loss(margin: torch.Tensor, gap: torch.Tensor, beta: float, eta: float) -> torch.Tensor:
    """D[beta x margin || eta x gap], (P): reward-aware preference optimisation, with `gap` (P) the reward of the chosen
    answer above the rejected one (Nemotron-4 340B, arXiv 2406.11704, section 3.3.2; used by Nemotron-H, section 5).

    D[a || b] = s(b) log (s(b) / s(a)) + s(-b) log (s(-b) / s(-a)), s the sigmoid: 0 where a model is as much for the
    chosen answer as the rewards are, however much that is; DPO pushes on without end.
    """
    ours, wanted = beta * margin, eta * gap
    found = wanted.sigmoid() * (F.logsigmoid(wanted) - F.logsigmoid(ours))
    return found + (-wanted).sigmoid() * (F.logsigmoid(-wanted) - F.logsigmoid(-ours))
