"""Modules for the blocks, the decoder that strings them together, and its cache."""

from intarsia.model.attention import GroupedAttention
from intarsia.model.cache import Cache, Memory
from intarsia.model.decoder import Decoder, ResidualBlock
from intarsia.model.experts import ExpertsMixer
from intarsia.model.fp8 import Fp8Linear, weights_in_fp8
from intarsia.model.init import initialise
from intarsia.model.mamba import Mamba1Mixer, Mamba2Mixer
from intarsia.model.mixers import make_mixer
from intarsia.model.mlp import LinearMixer, Mlp
from intarsia.model.packed import pack_block, pack_weights, quantised, ready, weight_bytes
from intarsia.model.rounding import rounding
from intarsia.model.rows import Rows

__all__ = [
    "Cache", "Decoder", "ExpertsMixer", "Fp8Linear", "GroupedAttention", "LinearMixer", "Mamba1Mixer", "Mamba2Mixer",
    "Memory", "Mlp", "ResidualBlock", "Rows", "initialise", "make_mixer", "pack_block", "pack_weights", "quantised",
    "ready", "rounding", "weight_bytes", "weights_in_fp8",
]
