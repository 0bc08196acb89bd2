"""A mixture of experts (DeepSeek-V3, arXiv 2412.19437, section 2.1.2; Nemotron 3 Nano, arXiv 2512.20848).

Shape letters: B batch, L length, n tokens, D model, E experts, k experts a token, I intermediate channels.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import nn

from intarsia.arch import Experts, FeedForward
from intarsia.base.errors import IntarsiaError
from intarsia.model.mlp import Mlp
from intarsia.model.parts import ACTIVATIONS, Float32Parameters, activate
from intarsia.ops.linear import linear


class Router(Float32Parameters):
    """Sigmoid scores, weight (E, D); `bias` (E,), float32, takes part in the choice and not in the weights."""

    FLOAT32 = ("bias",)

    def __init__(self, spec: Experts, hidden_size: int, dtype: torch.dtype, device=None):
        super().__init__()
        self.spec = spec
        self.weight = nn.Parameter(torch.empty(spec.num_experts, hidden_size, dtype=dtype, device=device))
        self.bias = nn.Parameter(torch.empty(spec.num_experts, dtype=torch.float32, device=device))

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """x (n, D) -> weights (n, k), float32, and experts (n, k), int64."""
        weights, chosen = self.all_weights(x)
        return weights.gather(-1, chosen), chosen

    def all_weights(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """x (n, D) -> weights (n, E), float32, of every expert as if it were in use, and the chosen (n, k), int64."""
        scores = self.scores(x)
        chosen = self.choose(scores)
        return self.weigh(scores, chosen) * self.spec.routed_scale, chosen

    def scores(self, x: torch.Tensor) -> torch.Tensor:
        """x (n, D) -> (n, E), float32."""
        wide = torch.promote_types(x.dtype, torch.float32)
        return F.linear(x.to(wide), self.weight.to(wide)).sigmoid()

    def weigh(self, scores: torch.Tensor, chosen: torch.Tensor) -> torch.Tensor:
        """Scores (n, E) and experts (n, k) -> weights (n, E)."""
        return scores / (scores.gather(-1, chosen).sum(-1, keepdim=True) + 1e-20) if self.spec.normalise else scores

    def choose(self, scores: torch.Tensor) -> torch.Tensor:
        """Scores (n, E) -> experts (n, k)."""
        return self._allowed(scores.detach() + self.bias.detach()).topk(self.spec.experts_per_token, -1).indices

    def _allowed(self, scores: torch.Tensor) -> torch.Tensor:
        """Scores (n, E) with -inf outside the best groups; a group is worth its two best experts."""
        groups = self.spec.num_expert_groups
        if groups == self.spec.groups_per_token:
            return scores
        grouped = scores.unflatten(-1, (groups, -1))
        worth = grouped.topk(min(2, grouped.shape[-1]), -1).values.sum(-1)
        best = worth.topk(self.spec.groups_per_token, -1).indices
        hidden = torch.ones_like(worth, dtype=torch.bool).scatter(-1, best, False)
        return grouped.masked_fill(hidden[..., None], -torch.inf).flatten(-2)


class NeuronRouter(Router):
    """One channel stands for each expert (CMoE, arXiv 2502.04416): `weight`, and `gate` where FFNs are gated, (E, D).

    A score is how much of it there is in the token, as a share over all experts. An expert that is chosen counts
    1 + score x `scale` (E,), float32: 0 after a dense FFN was cut up, and the way by which the router then learns.
    """

    FLOAT32 = ("bias", "scale")

    def __init__(self, spec: Experts, hidden_size: int, dtype: torch.dtype, device=None):
        super().__init__(spec, hidden_size, dtype, device)
        if spec.gated:
            self.gate = nn.Parameter(torch.empty_like(self.weight))
        self.scale = nn.Parameter(torch.empty_like(self.bias))

    def scores(self, x: torch.Tensor) -> torch.Tensor:
        """x (n, D) -> (n, E), float32."""
        wide = torch.promote_types(x.dtype, torch.float32)
        gate = F.linear(x.to(wide), self.gate.to(wide)) if self.spec.gated else None
        sizes = activate(self.spec.activation, F.linear(x.to(wide), self.weight.to(wide)), gate).abs()
        return sizes / (sizes.sum(-1, keepdim=True) + 1e-20)

    def weigh(self, scores: torch.Tensor, chosen: torch.Tensor) -> torch.Tensor:
        """Scores (n, E) -> weights (n, E)."""
        return 1 + scores * self.scale


ROUTERS = {"sigmoid": Router, "neurons": NeuronRouter}


class _Stack(nn.Module):
    """The routed experts: up and gate (E, I, D), down (E, D, I)."""

    def __init__(self, spec: Experts, hidden_size: int, dtype: torch.dtype, device=None):
        super().__init__()
        rising = (spec.num_experts, spec.intermediate_size, hidden_size)
        falling = (spec.num_experts, hidden_size, spec.intermediate_size)
        if spec.gated:
            self.gate = nn.Parameter(torch.empty(rising, dtype=dtype, device=device))
        self.up = nn.Parameter(torch.empty(rising, dtype=dtype, device=device))
        self.down = nn.Parameter(torch.empty(falling, dtype=dtype, device=device))

    def matrices(self) -> list[tuple[torch.Tensor | None, torch.Tensor, torch.Tensor]]:
        """gate (None without one), up and down of each. All views at once: the gradient of an index is as large as the
        stack, and would be made for every expert."""
        up, down = self.up.unbind(), self.down.unbind()
        gate = self.gate.unbind() if hasattr(self, "gate") else [None] * len(up)
        return list(zip(gate, up, down))


class Routed(NamedTuple):
    """The tokens (m of n) that go to an expert: their `rows` (m,) int64, its `weights` (m, 1) and `answers` (m, D)."""

    expert: int
    rows: torch.Tensor
    weights: torch.Tensor
    answers: torch.Tensor


class ExpertsMixer(nn.Module):
    """`experts_per_token` FFNs of the router's choice, weighted, and one shared FFN.

    `unchosen`: what all other experts count beside the chosen, from 0 (they are not computed) to 1 (all are in use).
    Above 0 while a dense FFN learns to be sparse: every expert then learns from every token (DS-MoE, arXiv 2404.05567).
    """

    unchosen = 0.0

    def __init__(self, spec: Experts, hidden_size: int, dtype: torch.dtype, device=None):
        super().__init__()
        if spec.activation not in ACTIVATIONS:
            raise IntarsiaError(f"activation {spec.activation!r} is not known; known: {', '.join(ACTIVATIONS)}.")
        self.spec = spec
        self.router = ROUTERS[spec.router](spec, hidden_size, dtype, device)
        self.experts = _Stack(spec, hidden_size, dtype, device)
        if spec.shared_size:
            shared = FeedForward(spec.shared_size, spec.activation, spec.gated)
            self.shared = Mlp(shared, hidden_size, dtype, device)

    def forward(self, x: torch.Tensor, *_: object) -> torch.Tensor:
        """x (B, L, D), already normalised -> (B, L, D)."""
        if not self.unchosen:
            return self.combined(x, self.routed(x.flatten(0, 1)))
        return self._with_shared(x, self.together(x.flatten(0, 1)).view_as(x))

    def routed(self, tokens: torch.Tensor) -> Iterator[Routed]:
        """Every expert that one of the tokens (n, D) goes to, with what it answers them."""
        weights, chosen = self.router(tokens)
        matrices = self.experts.matrices()
        for expert in chosen.unique().tolist():
            rows, slots = (chosen == expert).nonzero(as_tuple=True)
            answers = _answer(self.spec.activation, tokens[rows], *matrices[expert])
            yield Routed(expert, rows, weights[rows, slots, None], answers)

    def together(self, tokens: torch.Tensor) -> torch.Tensor:
        """(n, D): what all experts answer all tokens (n, D), those that are not chosen counting `unchosen`: one wide
        FFN, whose channels have their expert's weight."""
        weights, chosen = self.router.all_weights(tokens)
        weights = weights * torch.full_like(weights, self.unchosen).scatter(-1, chosen, 1.0)
        gate = linear(tokens, self.experts.gate.flatten(0, 1)) if self.spec.gated else None
        channels = activate(self.spec.activation, linear(tokens, self.experts.up.flatten(0, 1)), gate)
        weighted = channels * weights.to(channels.dtype).repeat_interleave(self.spec.intermediate_size, -1)
        return linear(weighted, self.experts.down.transpose(0, 1).flatten(1))

    def combined(self, x: torch.Tensor, answers: Iterable[Routed]) -> torch.Tensor:
        """The output (B, L, D) for an input x (B, L, D) from what `routed` gives for it."""
        out = torch.zeros_like(x.flatten(0, 1), dtype=torch.promote_types(x.dtype, torch.float32))
        for _, rows, weights, found in answers:
            out = out.index_add(0, rows, found * weights)
        return self._with_shared(x, out.to(x.dtype).view_as(x))

    def _with_shared(self, x: torch.Tensor, out: torch.Tensor) -> torch.Tensor:
        return out + self.shared(x) if self.spec.shared_size else out


def _answer(
    activation: str, x: torch.Tensor, gate: torch.Tensor | None, up: torch.Tensor, down: torch.Tensor
) -> torch.Tensor:
    """One expert's answer to its tokens, (n, D)."""
    gated = None if gate is None else linear(x, gate)
    return linear(activate(activation, linear(x, up), gated), down)
