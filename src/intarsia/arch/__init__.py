"""What a model is, without torch: a list of residual blocks on one stream, with the cost of each."""

from intarsia.arch.architecture import Architecture, Rope, pair_layers
from intarsia.arch.blocks import (
    Attention,
    Block,
    Experts,
    FeedForward,
    Linear,
    Mamba1,
    Mamba2,
    block_from_dict,
    block_to_dict,
    kind,
)
from intarsia.arch.cost import block_cache_bytes, block_flops, block_parameters, memory_bytes, parameters

__all__ = [
    "Architecture", "Attention", "Block", "Experts", "FeedForward", "Linear", "Mamba1", "Mamba2", "Rope",
    "block_cache_bytes", "block_flops", "block_from_dict", "block_parameters", "block_to_dict", "kind",
    "memory_bytes", "pair_layers", "parameters",
]
