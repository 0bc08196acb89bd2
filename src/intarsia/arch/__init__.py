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
from intarsia.arch.cost import (
    active_parameters,
    block_cache_bytes,
    block_flops,
    block_parameters,
    memory_bytes,
    parameters,
)
from intarsia.arch.pattern import parse_pattern, pattern_of
from intarsia.arch.rules import check_nemotron_h, nemotron_h

__all__ = [
    "Architecture", "Attention", "Block", "Experts", "FeedForward", "Linear", "Mamba1", "Mamba2", "Rope",
    "active_parameters", "block_cache_bytes", "block_flops", "block_from_dict", "block_parameters", "block_to_dict",
    "check_nemotron_h", "kind", "memory_bytes", "nemotron_h", "pair_layers", "parameters", "parse_pattern",
    "pattern_of",
]
