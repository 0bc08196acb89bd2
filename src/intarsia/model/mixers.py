"""The mixers: what stands inside a residual block, between its norm and the addition."""

from __future__ import annotations

import torch

from intarsia.arch import Attention, Block, Experts, FeedForward, Mamba1, Mamba2
from intarsia.model.attention import GroupedAttention
from intarsia.model.experts import ExpertsMixer
from intarsia.model.mamba import Mamba1Mixer, Mamba2Mixer
from intarsia.model.mlp import LinearMixer, Mlp
from intarsia.model.parts import Tables, activate

__all__ = ["Mixer", "Tables", "activate", "make_mixer"]

Mixer = GroupedAttention | Mamba2Mixer | Mamba1Mixer | Mlp | ExpertsMixer | LinearMixer


def make_mixer(spec: Block, hidden_size: int, norm_eps: float, dtype: torch.dtype, device=None) -> Mixer:
    """An uninitialised mixer for a block."""
    if isinstance(spec, Attention):
        return GroupedAttention(spec, hidden_size, norm_eps, dtype, device)
    if isinstance(spec, Mamba2):
        return Mamba2Mixer(spec, hidden_size, norm_eps, dtype, device)
    if isinstance(spec, Mamba1):
        return Mamba1Mixer(spec, hidden_size, dtype, device)
    if isinstance(spec, Experts):
        return ExpertsMixer(spec, hidden_size, dtype, device)
    if isinstance(spec, FeedForward):
        return Mlp(spec, hidden_size, dtype, device)
    return LinearMixer(spec, hidden_size, dtype, device)
