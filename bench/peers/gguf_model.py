"""A nemotron_h model as GGUF, as llama.cpp reads it: matrices in bfloat16, all else in float32, no tokenizer."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import gguf
import torch

from intarsia.arch import Attention, FeedForward, Mamba2
from intarsia.model import Decoder

_PARTS = {
    "norm.weight": "attn_norm.weight",
    "mixer.q.weight": "attn_q.weight", "mixer.k.weight": "attn_k.weight", "mixer.v.weight": "attn_v.weight",
    "mixer.o.weight": "attn_output.weight", "mixer.up.weight": "ffn_up.weight", "mixer.down.weight": "ffn_down.weight",
    "mixer.in_proj.weight": "ssm_in.weight", "mixer.out_proj.weight": "ssm_out.weight",
    "mixer.conv.weight": "ssm_conv1d.weight", "mixer.conv.bias": "ssm_conv1d.bias", "mixer.dt_bias": "ssm_dt.bias",
    "mixer.A_log": "ssm_a", "mixer.D": "ssm_d", "mixer.norm.weight": "ssm_norm.weight",
}  # fmt: skip
_OUTER = {"embed.weight": "token_embd.weight", "norm.weight": "output_norm.weight", "head.weight": "output.weight"}


def write_gguf(model: Decoder, path: Path) -> None:
    """Write a model of Mamba-2, attention and ungated FFN blocks, each kind of one shape."""
    arch = model.arch
    mamba = next(b for b in arch.blocks if isinstance(b, Mamba2))
    attention = next(b for b in arch.blocks if isinstance(b, Attention))
    writer = gguf.GGUFWriter(path, "nemotron_h")
    writer.add_context_length(1 << 20)
    writer.add_embedding_length(arch.hidden_size)
    writer.add_block_count(len(arch.blocks))
    writer.add_feed_forward_length([b.intermediate_size if isinstance(b, FeedForward) else 0 for b in arch.blocks])
    writer.add_head_count(attention.num_heads)
    writer.add_head_count_kv([b.num_kv_heads if isinstance(b, Attention) else 0 for b in arch.blocks])
    writer.add_key_length(attention.head_dim)
    writer.add_value_length(attention.head_dim)
    writer.add_layer_norm_eps(arch.norm_eps)
    writer.add_layer_norm_rms_eps(arch.norm_eps)
    writer.add_rope_dimension_count(attention.head_dim)
    writer.add_rope_scaling_finetuned(False)
    writer.add_ssm_conv_kernel(mamba.conv_kernel)
    writer.add_ssm_state_size(mamba.state_size)
    writer.add_ssm_group_count(mamba.num_groups)
    writer.add_ssm_inner_size(mamba.inner_size)
    writer.add_ssm_time_step_rank(mamba.num_heads)  # that is what it reads heads from
    writer.add_vocab_size(arch.vocab_size)
    writer.add_tokenizer_model("none")
    for name, tensor in _tensors(model, mamba.num_groups):
        if tensor.dtype == torch.bfloat16:
            writer.add_tensor(name, tensor.view(torch.uint8).numpy(), raw_dtype=gguf.GGMLQuantizationType.BF16)
        else:
            writer.add_tensor(name, tensor.numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _tensors(model: Decoder, groups: int) -> Iterator[tuple[str, torch.Tensor]]:
    for name, parameter in model.named_parameters():
        tensor, tail = parameter.detach().cpu().contiguous(), name.split(".", 2)[-1]
        if tail == "mixer.A_log":
            tensor = -tensor.exp()
        if tail in ("mixer.A_log", "mixer.D"):
            tensor = tensor[:, None]
        if tail == "mixer.norm.weight":
            tensor = tensor.view(groups, -1)
        plain = tensor.dim() == 1 or "mixer.norm" in name or "mixer.conv" in name
        new = _OUTER.get(name) or f"blk.{name.split('.')[1]}.{_PARTS[tail]}"
        yield new, tensor.float() if plain else tensor
