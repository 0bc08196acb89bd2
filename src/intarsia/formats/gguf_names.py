"""Tensor names of GGUF <-> ours, with what llama.cpp does to some tensors on the way."""

from __future__ import annotations

from dataclasses import dataclass

from intarsia.arch import Architecture, Attention, Block, FeedForward, Mamba2, pair_layers
from intarsia.formats.layout import block_of, our_shapes

# llama.cpp rotates neighbouring pairs in these kinds, so that their q and k rows are stored in another order.
PERMUTED = ("llama", "mistral", "granitehybrid")
NEMOTRON_H, GRANITE_HYBRID = "nemotron_h", "granitehybrid"

_OUTER = {"embed.weight": "token_embd.weight", "norm.weight": "output_norm.weight", "head.weight": "output.weight"}
_ATTENTION = {
    "norm": "attn_norm", "mixer.q": "attn_q", "mixer.k": "attn_k", "mixer.v": "attn_v", "mixer.o": "attn_output",
    "mixer.q_norm": "attn_q_norm", "mixer.k_norm": "attn_k_norm",
}  # fmt: skip
_FFN = {"norm": "ffn_norm", "mixer.gate": "ffn_gate", "mixer.up": "ffn_up", "mixer.down": "ffn_down"}
_MAMBA = {
    "norm": "attn_norm", "mixer.in_proj": "ssm_in", "mixer.conv": "ssm_conv1d", "mixer.norm": "ssm_norm",
    "mixer.out_proj": "ssm_out",
}  # fmt: skip
_BARE = {"mixer.A_log": "ssm_a", "mixer.D": "ssm_d", "mixer.dt_bias": "ssm_dt.bias"}


@dataclass(frozen=True)
class Place:
    """Where one of our tensors lies: `name` and `shape` there. `head_dim` > 0: rows of heads are permuted. `negated`:
    A = -exp(A_log) stands there instead of A_log."""

    name: str
    shape: tuple[int, ...]
    head_dim: int = 0
    negated: bool = False


def places(arch: Architecture, kind: str) -> dict[str, Place]:
    """Our name -> its place in a file of the kind `general.architecture`."""
    layers = {index: layer for layer, pair in enumerate(pair_layers(arch.blocks)) for index in pair}
    found = {}
    for name, shape in our_shapes(arch).items():
        if name in _OUTER:
            found[name] = Place(_OUTER[name], shape)
            continue
        index, rest = block_of(name)
        layer = index if kind == NEMOTRON_H else layers[index]
        found[name] = _place(f"blk.{layer}", arch.blocks[index], rest, shape, kind)
    return found


def _place(layer: str, block: Block, rest: str, shape: tuple[int, ...], kind: str) -> Place:
    if rest in _BARE:
        column = shape if rest == "mixer.dt_bias" else (*shape, 1)
        return Place(f"{layer}.{_BARE[rest]}", column, negated=rest == "mixer.A_log")
    part, _, leaf = rest.rpartition(".")
    table = _ATTENTION if isinstance(block, Attention) else _MAMBA if isinstance(block, Mamba2) else _FFN
    name = table[part]
    if part == "norm" and kind == NEMOTRON_H and isinstance(block, FeedForward):
        name = "attn_norm"
    if part == "mixer.norm" and isinstance(block, Mamba2):
        shape = (block.groups_of_norm, block.inner_size // block.groups_of_norm)
    permuted = isinstance(block, Attention) and kind in PERMUTED and part in ("mixer.q", "mixer.k")
    return Place(f"{layer}.{name}.{leaf}", shape, head_dim=block.head_dim if permuted else 0)
