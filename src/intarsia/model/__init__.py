"""Modules for the blocks, the decoder that strings them together, and its cache."""

from intarsia.model.cache import Cache
from intarsia.model.decoder import Decoder, ResidualBlock
from intarsia.model.init import initialise
from intarsia.model.mixers import GroupedAttention, LinearMixer, Mlp, make_mixer

__all__ = ["Cache", "Decoder", "GroupedAttention", "LinearMixer", "Mlp", "ResidualBlock", "initialise", "make_mixer"]
