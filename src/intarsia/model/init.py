"""Drawing fresh weights, the same ones however the model is later sharded."""

from __future__ import annotations

import hashlib

import torch

from intarsia.model.decoder import Decoder


@torch.no_grad()
def initialise(model: Decoder, seed: int = 0, std: float = 0.02) -> Decoder:
    """Fill every parameter: matrices from N(0, std^2), norms with 1, biases with 0. Returns the model.

    Every tensor draws from a generator seeded by its own name, so that neither order nor sharding matters.
    """
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            parameter.zero_()
        elif parameter.dim() == 1:
            parameter.fill_(1)
        else:
            word = int.from_bytes(hashlib.sha256(f"{seed}:{name}".encode()).digest()[:7], "big")
            generator = torch.Generator().manual_seed(word)
            draw = torch.empty(parameter.shape, dtype=torch.float32).normal_(0, std, generator=generator)
            parameter.copy_(draw)
    return model
