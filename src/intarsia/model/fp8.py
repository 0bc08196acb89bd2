"""A decoder whose blocks multiply in FP8 for inference: half of bfloat16's bytes, for GPUs that multiply FP8.

Weights in E4M3 with a scale for every output, and what they read with one for every token, so that a token's numbers do
not depend on its neighbours. Embedding, head, norms, convolutions, scans and the core of attention stay as they are, as
in training (Nemotron-H, arXiv 2504.03624, section 2.3). Other devices emulate it, for its numbers and not for speed.
"""

from __future__ import annotations

import torch
from torch import nn

from intarsia.base.errors import IntarsiaError
from intarsia.model.decoder import Decoder
from intarsia.ops.fp8 import MULTIPLE, Scaled, product_of_rows, quantise_rows
from intarsia.ops.linear import Projection


class Fp8Linear(nn.Module):
    """What `Projection` computes, with weight (O, I) and inputs in FP8."""

    def __init__(self, layer: Projection):
        super().__init__()
        scaled = quantise_rows(layer.weight.detach())
        self.register_buffer("data", scaled.data)
        self.register_buffer("scale", scaled.scale)
        self.register_buffer("bias", None if layer.bias is None else layer.bias.detach())

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        rows = quantise_rows(x.reshape(-1, x.shape[-1]))
        y = product_of_rows(rows, Scaled(self.data, self.scale), x.dtype)
        return (y if self.bias is None else y + self.bias).view(*x.shape[:-1], -1)

    @property
    def weight(self) -> torch.Tensor:
        """The matrix it stands for, (O, I) float32, made anew."""
        return Scaled(self.data, self.scale).restored()


@torch.no_grad()
def weights_in_fp8(model: Decoder) -> Decoder:
    """Turn the matrices of a model's blocks to FP8 in place, one after the other, and return it.

    Matrices whose sizes are no multiples of 16, and those of experts, stay as they are. Raises `IntarsiaError` where
    none is left to turn: a model that is packed already, or of other sizes.
    """
    found = [
        (module, name, child)
        for block in model.blocks for module in block.modules() for name, child in module.named_children()
        if isinstance(child, Projection) and not (child.in_features % MULTIPLE or child.out_features % MULTIPLE)
    ]  # fmt: skip
    if not found:
        raise IntarsiaError(
            f"no matrix of this model can be turned to FP8: it takes unpacked ones in multiples of {MULTIPLE}."
        )
    for module, name, child in found:
        setattr(module, name, Fp8Linear(child))
    return model
