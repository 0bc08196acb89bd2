"""Tensor names of the families whose layers are one norm and one mixer each, as ours are: nemotron_h, mamba, mamba2.

Published files say `backbone.embeddings`; some say `model.` for `backbone.` or `embedding` for `embeddings`, and all
four spellings are read.
"""

from __future__ import annotations

import re

from intarsia.arch import Architecture
from intarsia.formats.layout import Foreign, Layout, Piece, block_of, our_shapes, whole

_OUTER = {"embed.weight": "embeddings.weight", "norm.weight": "norm_f.weight"}
_RENAMED = {
    "mixer.q": "mixer.q_proj", "mixer.k": "mixer.k_proj", "mixer.v": "mixer.v_proj", "mixer.o": "mixer.o_proj",
    "mixer.up": "mixer.up_proj", "mixer.down": "mixer.down_proj", "mixer.conv": "mixer.conv1d",
    "mixer.router": "mixer.gate",
    "mixer.shared.up": "mixer.shared_experts.up_proj", "mixer.shared.down": "mixer.shared_experts.down_proj",
}  # fmt: skip
_EXPERTS = {"mixer.experts.up": "up_proj", "mixer.experts.down": "down_proj"}
_SPELLING = re.compile(r"^(?:backbone|model)\.(?:embedding\.|embeddings\.)?")


def layout(arch: Architecture, prefix: str = "backbone") -> Layout:
    """Where every parameter lies; `conv1d.weight` is (C, 1, K), and every expert has tensors of its own."""
    found: Layout = {}
    for name, shape in our_shapes(arch).items():
        if name == "head.weight":
            found["lm_head.weight"] = whole(name, shape)
        elif name in _OUTER:
            found[f"{prefix}.{_OUTER[name]}"] = whole(name, shape)
        else:
            index, rest = block_of(name)
            found.update(_block_tensors(f"{prefix}.layers.{index}", name, rest, shape))
    return found


def _block_tensors(layer: str, name: str, rest: str, shape: tuple[int, ...]) -> Layout:
    if rest in _EXPERTS:
        return {
            f"{layer}.mixer.experts.{e}.{_EXPERTS[rest]}.weight": Foreign(shape[1:], (Piece(name, e),))
            for e in range(shape[0])
        }
    if rest == "mixer.conv.weight":
        return {f"{layer}.mixer.conv1d.weight": whole(name, (shape[0], 1, shape[1]))}
    if rest == "mixer.router.bias":
        return {f"{layer}.mixer.gate.e_score_correction_bias": whole(name, shape)}
    part, _, leaf = rest.rpartition(".")
    return {f"{layer}.{_RENAMED.get(part, part)}.{leaf}": whole(name, shape)}


def canonical(source: str, prefix: str = "backbone") -> str:
    """A name in any of the four spellings as `layout` has it."""
    match = _SPELLING.match(source)
    if match is None:
        return source
    embedding = "embeddings." if match.group().count(".") == 2 else ""
    return f"{prefix}.{embedding}{source[match.end() :]}"
