"""What a block costs by arithmetic alone: parameters, floating-point operations, bytes of cache."""

from __future__ import annotations

from intarsia.arch.architecture import Architecture
from intarsia.arch.blocks import Attention, Block, FeedForward


def block_parameters(block: Block, hidden_size: int) -> int:
    """Parameters of a block, its norm included (D weights)."""
    return hidden_size + _mixer_matrix(block, hidden_size) + _mixer_vectors(block, hidden_size)


def _mixer_matrix(block: Block, d: int) -> int:
    if isinstance(block, Attention):
        return 2 * d * block.head_dim * (block.num_heads + block.num_kv_heads)
    if isinstance(block, FeedForward):
        return d * block.intermediate_size * (3 if block.gated else 2)
    return d * d


def _mixer_vectors(block: Block, d: int) -> int:
    if isinstance(block, Attention):
        biases = block.head_dim * (block.num_heads + 2 * block.num_kv_heads) if block.qkv_bias else 0
        return biases + (d if block.out_bias else 0) + (2 * block.head_dim if block.qk_norm else 0)
    if isinstance(block, FeedForward):
        return (block.intermediate_size * (2 if block.gated else 1) + d) if block.bias else 0
    return d if block.bias else 0


def block_flops(block: Block, hidden_size: int, context: float) -> float:
    """Floating-point operations for one token that attends to `context` tokens (2 per multiply-add)."""
    flops = 2.0 * _mixer_matrix(block, hidden_size)
    if isinstance(block, Attention):
        seen = min(context, block.sliding_window or context)
        flops += 4.0 * block.num_heads * block.head_dim * seen
    return flops


def block_cache_bytes(block: Block, context: int, batch: int = 1, bytes_per_element: int = 2) -> int:
    """Bytes that `batch` sequences of `context` tokens keep for this block while generating."""
    if not isinstance(block, Attention):
        return 0
    seen = min(context, block.sliding_window or context)
    return 2 * batch * seen * block.num_kv_heads * block.head_dim * bytes_per_element


def parameters(arch: Architecture, embeddings: bool = True) -> int:
    """Parameters of the whole model; tied embeddings count once."""
    total = sum(block_parameters(b, arch.hidden_size) for b in arch.blocks) + arch.hidden_size
    if embeddings:
        total += arch.vocab_size * arch.hidden_size * (1 if arch.tied_embeddings else 2)
    return total


def memory_bytes(arch: Architecture, context: int, batch: int = 1, bytes_per_element: int = 2) -> int:
    """Weights and cache of the whole model at a context length, in bytes."""
    cache = sum(block_cache_bytes(b, context, batch, bytes_per_element) for b in arch.blocks)
    return parameters(arch) * bytes_per_element + cache
