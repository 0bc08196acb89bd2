"""How the kernels are launched: the block sizes chosen for each, and the one place that starts them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import triton

# For Hopper (sm_90), where a program may use 227 KiB of shared memory and a thread 255 registers. Block sizes are in
# elements; those that a shape dictates are worked out beside the launch. They are not a matter of correctness: every
# entry may be changed, as long as `tests/test_ops_triton_compile.py` finds that the kernel still fits.
CONFIG: dict[str, dict[str, int]] = {
    "conv_forward": {"BLOCK_L": 16, "BLOCK_C": 128, "num_warps": 4, "num_stages": 1},
    "conv_backward": {"BLOCK_L": 32, "BLOCK_C": 64, "num_warps": 4, "num_stages": 1},
    "conv_step": {"BLOCK_C": 256, "num_warps": 2, "num_stages": 1},
    "norm_forward": {"BLOCK": 2048, "num_warps": 4, "num_stages": 1},
    "norm_backward": {"BLOCK": 2048, "num_warps": 4, "num_stages": 1},
    "paged_attention": {"BLOCK_T": 64, "num_warps": 4, "num_stages": 3},
    "relu_squared": {"BLOCK": 2048, "num_warps": 4, "num_stages": 1},
    "scan_states": {"BLOCK_P": 64, "BLOCK_N": 64, "num_warps": 4, "num_stages": 3},
    "scan_outputs": {"BLOCK_Q": 64, "BLOCK_N": 128, "num_warps": 8, "num_stages": 2},
    "scan_inputs": {"BLOCK_N": 64, "num_warps": 8, "num_stages": 1},
    "scan_groups": {"SHARE": 16, "BLOCK_N": 64, "num_warps": 8, "num_stages": 2},
    "scan_step": {"BLOCK_P": 16, "num_warps": 2, "num_stages": 1},
}
# Operands of four bytes take twice the room and three passes. They are for checks: here some kernels spill registers.
FLOAT32: dict[str, dict[str, int]] = {
    "paged_attention": {"BLOCK_T": 32, "num_stages": 1},
    "scan_states": {"BLOCK_N": 32, "num_warps": 8, "num_stages": 2},
    "scan_outputs": {"BLOCK_N": 32, "num_stages": 1},
    "scan_inputs": {"BLOCK_N": 32},
    "scan_groups": {"BLOCK_N": 32},
}
# Rows of a chunk of the scan, by the bytes of an operand. Longer chunks keep fewer states, which are most of the
# traffic; but their square must fit in registers, once going forward and three times coming back.
CHUNK = {"forward": {2: 128, 4: 64}, "backward": {2: 64, 4: 64}}
# Programs that share a reduction over rows (the gradient of a norm's weight): some for each of a GPU's multiprocessors.
REDUCERS = 512


def config(kernel: str, dtype: torch.dtype) -> dict[str, int]:
    """The launch of this kernel on operands of this dtype."""
    return CONFIG[kernel] | (FLOAT32.get(kernel, {}) if dtype.itemsize == 4 else {})


def launch(kernel: Any, grid: Sequence[int], *args: Any, **config: Any) -> None:
    """Start `kernel` on `grid` programs, on the device of its first argument, a tensor.

    The first number of programs may be anything, the others at most 65,535: those that grow with the rows come first.
    """
    with torch.cuda.device_of(args[0]):
        kernel[tuple(grid)](*args, **config)


def padded(size: int, least: int = 1) -> int:
    """The power of two that holds `size`: Triton's blocks have no other lengths, matrix products none under 16."""
    return max(least, triton.next_power_of_2(size))


def blocks(size: int, block: int) -> int:
    """How many blocks cover `size`."""
    return triton.cdiv(size, block)


def rows(tensor: torch.Tensor, inner: int) -> torch.Tensor:
    """`tensor` itself if its last `inner` dimensions lie side by side in memory, else a copy where they do.

    What a projection's output is cut into (x, B, C, z) passes as it is: its rows are only further apart.
    """
    step = 1
    for size, stride in zip(reversed(tensor.shape[-inner:]), reversed(tensor.stride()[-inner:])):
        if size > 1 and stride != step:
            return tensor.contiguous()
        step *= size
    return tensor
