"""What a block costs by arithmetic alone: parameters, floating-point operations, bytes of cache.

Shape letters: d width of the stream, H heads, P head dim, N state, G groups, K conv kernel, E Mamba-1's channels,
R rank of its time steps, I channels of an FFN.
"""

from __future__ import annotations

from intarsia.arch.architecture import Architecture
from intarsia.arch.blocks import Attention, Block, Experts, FeedForward, Mamba1, Mamba2

STATE_BYTES = 4  # the state of a scan is float32, whatever the model's dtype: it is a sum over the whole text


def block_parameters(block: Block, hidden_size: int) -> int:
    """Parameters of a block, its norm included (D weights)."""
    return hidden_size + _mixer_matrix(block, hidden_size) + _mixer_vectors(block, hidden_size)


def active_parameters(block: Block, hidden_size: int) -> int:
    """Parameters that one token meets: of experts those that it goes through, of any other block all."""
    total = block_parameters(block, hidden_size)
    if not isinstance(block, Experts):
        return total
    idle = block.num_experts - block.experts_per_token
    return total - _expert_matrix(block, hidden_size, idle) + _expert_matrix(block, hidden_size, 0)


def _mixer_matrix(block: Block, d: int) -> int:
    """Weights that are multiplied with a token, those of all experts included."""
    if isinstance(block, Attention):
        return 2 * d * block.head_dim * (block.num_heads + block.num_kv_heads)
    if isinstance(block, Mamba2):
        return d * (block.in_size + block.inner_size) + block.conv_size * block.conv_kernel
    if isinstance(block, Mamba1):
        return block.inner_size * (3 * d + block.conv_kernel + 2 * block.time_step_rank + 2 * block.state_size)
    if isinstance(block, FeedForward):
        return d * block.intermediate_size * (3 if block.gated else 2)
    if isinstance(block, Experts):
        return _router_matrix(block, d) + _expert_matrix(block, d, block.num_experts)
    return d * d


def _router_matrix(block: Experts, d: int) -> int:
    return d * block.num_experts * (2 if block.router == "neurons" and block.gated else 1)


def _expert_matrix(block: Experts, d: int, experts: int) -> int:
    """Weights of so many experts and the shared one."""
    return d * (experts * block.intermediate_size + block.shared_size) * (3 if block.gated else 2)


def _mixer_vectors(block: Block, d: int) -> int:
    if isinstance(block, Attention):
        biases = block.head_dim * (block.num_heads + 2 * block.num_kv_heads) if block.qkv_bias else 0
        return biases + (d if block.out_bias else 0) + (2 * block.head_dim if block.qk_norm else 0)
    if isinstance(block, Mamba2):  # A_log, D and dt_bias of each head; the gated norm
        biases = (block.conv_size if block.conv_bias else 0) + (block.in_size + d if block.proj_bias else 0)
        return 3 * block.num_heads + block.inner_size + biases
    if isinstance(block, Mamba1):  # A_log (E, N), D and the bias of the time steps
        biases = (block.inner_size if block.conv_bias else 0) + (2 * block.inner_size + d if block.proj_bias else 0)
        return block.inner_size * (block.state_size + 2) + biases
    if isinstance(block, FeedForward):
        return (block.intermediate_size * (2 if block.gated else 1) + d) if block.bias else 0
    if isinstance(block, Experts):
        return block.num_experts * (2 if block.router == "neurons" else 1)  # the correction bias; a scale
    return d if block.bias else 0


def block_flops(block: Block, hidden_size: int, context: float) -> float:
    """Floating-point operations for one token that attends to `context` tokens (2 per multiply-add).

    A scan counts as its recurrence: 3 operations to move each element of the state on, 2 to read it.
    """
    if isinstance(block, Experts):
        return 2.0 * (_router_matrix(block, hidden_size) + _expert_matrix(block, hidden_size, block.experts_per_token))
    flops = 2.0 * _mixer_matrix(block, hidden_size)
    if isinstance(block, Attention):
        seen = min(context, block.sliding_window or context)
        flops += 4.0 * block.num_heads * block.head_dim * seen
    return flops + 5.0 * state_elements(block)


def state_elements(block: Block) -> int:
    """Elements of a scan's state for one sequence, H*P*N or E*N; 0 for every other block."""
    return block.inner_size * block.state_size if isinstance(block, (Mamba1, Mamba2)) else 0


def conv_elements(block: Block) -> int:
    """Inputs that a convolution remembers for one sequence: the last K-1 of each channel."""
    if isinstance(block, Mamba2):
        return (block.conv_kernel - 1) * block.conv_size
    return (block.conv_kernel - 1) * block.inner_size if isinstance(block, Mamba1) else 0


def block_cache_bytes(block: Block, context: int, batch: int = 1, bytes_per_element: float = 2) -> float:
    """Bytes that `batch` sequences of `context` tokens keep for this block while generating.

    Keys, values and the inputs of convolutions take `bytes_per_element`; the states of scans are float32.
    """
    if isinstance(block, Attention):
        seen = min(context, block.sliding_window or context)
        return 2 * batch * seen * block.num_kv_heads * block.head_dim * bytes_per_element
    return batch * (conv_elements(block) * bytes_per_element + state_elements(block) * STATE_BYTES)


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
