"""Rotary position embedding with the scalings of long-context models (RoFormer 3.4.2; llama3, yarn, linear).

Shape letters: B batch, L length, H heads, P head dim.
"""

from __future__ import annotations

import math

import torch

from intarsia.arch import Rope
from intarsia.base.errors import IntarsiaError
from intarsia.ops import backends


def frequencies(rope: Rope, head_dim: int, max_positions: int) -> tuple[torch.Tensor, float]:
    """Inverse frequencies (P/2,) in float32 and the factor that multiplies cos and sin (1 except for yarn).

    Raises `IntarsiaError` for a scaling that is not known.
    """
    inverse = 1.0 / rope.theta ** (torch.arange(0, head_dim, 2, dtype=torch.float32) / head_dim)
    scaling = rope.scaling or {}
    name = scaling.get("rope_type", scaling.get("type", "default"))
    if name == "default":
        return inverse, 1.0
    if name == "linear":
        return inverse / scaling["factor"], 1.0
    if name == "llama3":
        return _llama3(inverse, scaling), 1.0
    if name == "yarn":
        return _yarn(inverse, rope.theta, head_dim, scaling, max_positions)
    if name == "longrope":
        return _longrope(inverse, scaling)
    raise IntarsiaError(f"RoPE scaling {name!r} is not known; known: linear, llama3, yarn, longrope.")


def _llama3(inverse: torch.Tensor, scaling: dict) -> torch.Tensor:
    """Long wavelengths are stretched by `factor`, short ones kept, those between blended (Llama 3.1)."""
    factor, low, high = scaling["factor"], scaling["low_freq_factor"], scaling["high_freq_factor"]
    turns = scaling["original_max_position_embeddings"] * inverse / (2 * math.pi)
    smooth = ((turns - low) / (high - low)).clamp(0, 1)
    return (1 - smooth) * inverse / factor + smooth * inverse


def _yarn(
    inverse: torch.Tensor, theta: float, dim: int, scaling: dict, max_positions: int
) -> tuple[torch.Tensor, float]:
    """NTK-by-parts (YaRN, arXiv 2309.00071, section 3.2) with its attention temperature (section 3.4)."""
    factor = scaling["factor"]
    original = scaling.get("original_max_position_embeddings") or max_positions

    def dimension(turns: float) -> float:
        return dim * math.log(original / (turns * 2 * math.pi)) / (2 * math.log(theta))

    low, high = dimension(scaling.get("beta_fast") or 32), dimension(scaling.get("beta_slow") or 1)
    if scaling.get("truncate", True):
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, dim - 1)
    ramp = (torch.arange(dim // 2, dtype=torch.float32) - low) / (high - low if high > low else 0.001)
    keep = 1 - ramp.clamp(0, 1)
    return inverse / factor * (1 - keep) + inverse * keep, _yarn_temperature(factor, scaling)


def _yarn_temperature(factor: float, scaling: dict) -> float:
    def temperature(scale: float, weight: float = 1.0) -> float:
        return 1.0 if scale <= 1 else 0.1 * weight * math.log(scale) + 1.0

    if scaling.get("attention_factor") is not None:
        return scaling["attention_factor"]
    if scaling.get("mscale") and scaling.get("mscale_all_dim"):
        return temperature(factor, scaling["mscale"]) / temperature(factor, scaling["mscale_all_dim"])
    return temperature(factor)


def _longrope(inverse: torch.Tensor, scaling: dict) -> tuple[torch.Tensor, float]:
    """A divisor for each frequency (LongRoPE, arXiv 2402.13753), where short and long texts share them."""
    factors = scaling["short_factor"]
    if factors != scaling["long_factor"] or scaling.get("attention_factor") is None:
        raise IntarsiaError(
            "RoPE scaling 'longrope' with different factors for short and long texts is not supported: the model would "
            "change its mind about tokens that it has already read."
        )
    return inverse / torch.tensor(factors, dtype=torch.float32), float(scaling["attention_factor"])


def tables(
    rope: Rope, head_dim: int, max_positions: int, start: int, length: int, device: torch.device | str = "cpu"
) -> tuple[torch.Tensor, torch.Tensor]:
    """cos and signed sin, each (L, P) float32, for positions start .. start+length-1.

    Both halves of P hold the same angles; the first half of sin is negated, as `rotate` wants it.
    """
    inverse, factor = frequencies(rope, head_dim, max_positions)
    positions = torch.arange(start, start + length, dtype=torch.float32)
    angles = torch.outer(positions, inverse)
    cos, sin = angles.cos() * factor, angles.sin() * factor
    return torch.cat([cos, cos], dim=-1).to(device), torch.cat([-sin, sin], dim=-1).to(device)


def rotate(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Rotate pairs (d, d + P/2) of x (B, H, L, P) by the `tables` (L, P); same dtype out.

    The tables may also be (B, 1, L, P). bfloat16 is computed in float32 and rounded once by a native backend.
    """
    return backends.pick("rotate", rotate_torch, x)(x, cos, sin)


def rotate_torch(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    turned = x.roll(x.shape[-1] // 2, -1)
    if x.dtype == torch.float32:
        # Rounded twice, as transformers does: a fused product shifts the logits of a real model by 1e-4.
        return x * cos.to(x.dtype) + turned * sin.to(x.dtype)
    return torch.addcmul(x * cos.to(x.dtype), turned, sin.to(x.dtype))
