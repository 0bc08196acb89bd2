"""Drawing fresh weights, the same ones however the model is later sharded."""

from __future__ import annotations

import hashlib
import math

import torch

from intarsia.arch import Mamba1, Mamba2
from intarsia.model.decoder import Decoder

# The matrices that end a block: what they give is added to the stream.
OUTPUTS = ("mixer.o.weight", "down.weight", "out_proj.weight", "experts.down", "mixer.proj.weight")


@torch.no_grad()
def initialise(model: Decoder, seed: int = 0, std: float | None = None, part: str = "") -> Decoder:
    """Fill every parameter: matrices from N(0, std^2), norms with 1, biases with 0. Returns the model.

    Without `std`, a model with Mamba blocks gets that of Nemotron-H: std = sqrt(0.8 / D), and the matrices that end a
    block std / sqrt(number of blocks); any other model 0.02 throughout. Mamba's own parameters are drawn as its
    authors do (`_mamba`), and so are the matrices of Mamba-1, with std = (3 x inputs)^-1/2: x, dt, B and C are
    multiplied with each other, and the wider draw of Nemotron-H makes their training unstable. Every tensor draws from
    a generator seeded by its own name, so that neither order nor sharding matters: a model may be filled part by part,
    `part` being the beginning of its names.
    """
    arch = model.arch
    hybrid = any(isinstance(b, (Mamba1, Mamba2)) for b in arch.blocks)
    published = std is None and hybrid
    std = std if std is not None else math.sqrt(0.8 / arch.hidden_size) if hybrid else 0.02
    for name, parameter in model.named_parameters():
        if not name.startswith(part):
            continue
        word = int.from_bytes(hashlib.sha256(f"{seed}:{name}".encode()).digest()[:7], "big")
        generator = torch.Generator().manual_seed(word)
        parts = name.split(".")
        spec = arch.blocks[int(parts[1])] if parts[0] == "blocks" else None
        drawn = _mamba(".".join(parts[3:]), parameter, spec, generator) if isinstance(spec, (Mamba1, Mamba2)) else None
        if drawn is not None:
            parameter.copy_(drawn)
        elif name.endswith("bias"):
            parameter.zero_()
        elif parameter.dim() == 1:
            parameter.fill_(1)
        else:
            shrink = math.sqrt(len(arch.blocks)) if published and name.endswith(OUTPUTS) else 1.0
            wide = (3 * parameter.shape[1]) ** -0.5 if published and isinstance(spec, Mamba1) else std
            draw = torch.empty(parameter.shape, dtype=torch.float32)
            parameter.copy_(draw.normal_(0, wide / shrink, generator=generator))
    return model


def _mamba(
    name: str, parameter: torch.Tensor, spec: Mamba1 | Mamba2, generator: torch.Generator
) -> torch.Tensor | None:
    """Parameters that only Mamba mixers have, float32; None for the others.

    Mamba-2: A uniform in (1, 16). Mamba-1: A = 1 .. N in every channel (S4D-real), the matrix of the time steps uniform
    within R^-1/2. Both: time steps log-uniform in (0.001, 0.1), D = 1, convolutions uniform within K^-1/2.
    """

    def uniform(low: float, high: float) -> torch.Tensor:
        return torch.empty(parameter.shape, dtype=torch.float32).uniform_(low, high, generator=generator)

    if name == "A_log" and isinstance(spec, Mamba2):
        return uniform(1, 16).log()
    if name == "A_log":
        return torch.arange(1, spec.state_size + 1, dtype=torch.float32).log().expand(parameter.shape)
    if name == "D":
        return torch.ones(parameter.shape)
    if name in ("dt_bias", "dt_proj.bias"):
        steps = uniform(math.log(1e-3), math.log(0.1)).exp().clamp(min=1e-4)
        return steps + (-torch.expm1(-steps)).log()  # the inverse of softplus
    if name == "dt_proj.weight":
        return uniform(-1, 1) * spec.time_step_rank**-0.5
    if name in ("conv.weight", "conv.bias"):
        return uniform(-1, 1) * spec.conv_kernel**-0.5
    return None
