"""Tensor names of the Llama-shaped formats, where a layer is an attention slot and an FFN slot, <-> ours."""

from __future__ import annotations

from intarsia.arch import Architecture, pair_layers
from intarsia.model import Decoder

_OUTER = {
    "embed.weight": "model.embed_tokens.weight", "norm.weight": "model.norm.weight", "head.weight": "lm_head.weight",
}
_ATTENTION = {
    "norm": "input_layernorm",
    "mixer.q": "self_attn.q_proj", "mixer.k": "self_attn.k_proj", "mixer.v": "self_attn.v_proj",
    "mixer.o": "self_attn.o_proj", "mixer.q_norm": "self_attn.q_norm", "mixer.k_norm": "self_attn.k_norm",
    "mixer.proj": "self_attn.linear_attn",
}
_FFN = {
    "norm": "post_attention_layernorm", "mixer.gate": "mlp.gate_proj", "mixer.up": "mlp.up_proj",
    "mixer.down": "mlp.down_proj", "mixer.proj": "mlp.linear_mlp",
}


def our_shapes(arch: Architecture) -> dict[str, tuple[int, ...]]:
    """Every parameter of a model of this architecture with its shape."""
    return {name: tuple(p.shape) for name, p in Decoder(arch, device="meta").named_parameters()}


def llama_names(arch: Architecture) -> dict[str, str]:
    """Our name -> the Llama-shaped one (`model.layers.3.self_attn.q_proj.weight`). `Linear` blocks get the names of
    nemotron-nas, and layers are those of `pair_layers`."""
    slots = {}
    for layer, pair in enumerate(pair_layers(arch.blocks)):
        for block, table in zip(pair, (_ATTENTION, _FFN)):
            if block is not None:
                slots[block] = (layer, table)
    names = {}
    for name in our_shapes(arch):
        if name in _OUTER:
            names[name] = _OUTER[name]
            continue
        _, block, rest = name.split(".", 2)
        layer, table = slots[int(block)]
        part, leaf = rest.rsplit(".", 1)
        names[name] = f"model.layers.{layer}.{table[part]}.{leaf}"
    return names
