"""Small random models for the tests of `compress`: large weights, so that every block matters; unequal channels, so
that rankings have something to find; biases and norms that are not their defaults."""

from __future__ import annotations

import torch

from intarsia.arch import Architecture, Attention, FeedForward
from intarsia.compress.options import OptionSpec, options_for, sites_of
from intarsia.compress.recipe import Options
from intarsia.compress.statistics import Statistics, collect
from intarsia.model import Decoder, initialise

SMALL = {"hidden_size": 32, "vocab_size": 61, "max_positions": 128}
PLAIN = Architecture.transformer(2, Attention(4, 2, 8), FeedForward(48), tied_embeddings=True, **SMALL)
BIASED = Architecture.transformer(
    2, Attention(4, 4, 8, qkv_bias=True, out_bias=True), FeedForward(40, bias=True), **SMALL
)
NORMED = Architecture.transformer(
    2, Attention(4, 2, 8, qk_norm=True), FeedForward(40, "relu2", gated=False, bias=True), **SMALL
)
ALL = {"plain": PLAIN, "biased": BIASED, "normed": NORMED}
LADDER = Options(ffn_widths=(0.75, 0.5, 0.25), multiple=4, kv_methods=("drop", "mean", "aligned", "keep"))


@torch.no_grad()
def toy(arch: Architecture, seed: int = 0, dtype: torch.dtype = torch.float32) -> Decoder:
    model = initialise(Decoder(arch, dtype), seed, std=0.25)
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        if parameter.dim() == 1:
            noise = torch.randn(parameter.shape, generator=generator)
            parameter.add_((0.3 * noise).to(dtype))
        elif name.endswith("up.weight"):
            scale = torch.randn(len(parameter), 1, generator=generator).exp()
            parameter.mul_(scale.to(dtype))
    return model.eval().requires_grad_(False)


def tokens(batch: int = 4, length: int = 24, seed: int = 0, vocab: int = 61) -> torch.Tensor:
    return torch.randint(0, vocab, (batch, length), generator=torch.Generator().manual_seed(1000 + seed))


def statistics(model: Decoder, batches: int = 8) -> dict[int, Statistics]:
    return collect(model, [tokens(seed=n) for n in range(batches)])


def all_options(model: Decoder, recipe: Options = LADDER) -> dict[int, list[OptionSpec]]:
    return {i: options_for(block, recipe) for i, block in enumerate(model.arch.blocks)}


def sites(model: Decoder):
    return sites_of(model.arch)


def relative(a: torch.Tensor, b: torch.Tensor) -> float:
    """|a - b| over |b|."""
    return float((a.double() - b.double()).norm() / b.double().norm())
