"""Weights for inference alone: bfloat16, int8, int4, int4+ or sparse, in the order in which a CPU reads them.

32 inputs of a row share a scale in bfloat16, and in int4 their least number too: 8.5 and 5 bits a weight. Both are the
best of several by the squared error of their group, in int4 weighed by how much each input matters, where that is
known. int4+ (dense and sparse, arXiv 2306.07629) also keeps a few inputs of every output apart (`ops.int4`): 5.2 bits.
Sparse keeps, in bfloat16, the two largest of every four inputs (2:4, arXiv 2104.08378): 9 bits.

Shape letters: O outputs, I inputs, G groups of 32 inputs, Q of four.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F

from intarsia.base.errors import IntarsiaError
from intarsia.ops.backends import pick
from intarsia.ops.int4 import GROUP, apart, decoded, dense_and_sparse, entries, nearest, quantise

DENSE_SPARSE = "int4+"
KINDS = ("bf16", "int8", "int4", "sparse", DENSE_SPARSE)
CODED = ("int8", "int4", DENSE_SPARSE)  # whose codes are integers
WEIGHED = ("int4", DENSE_SPARSE)  # whose scales are fitted to what matters, where that is known
PANEL, ALIGNED = 16, 32  # outputs read together; O and I are filled up to multiples
MOST_INPUTS = 1 << 16  # of int4+, whose places have 16 bits


@dataclass(frozen=True)
class Packed:
    """A weight (O, I), and a bias (O,) float32.

    codes: panels of 16 outputs, (O/16, I/2, 16, 2) bfloat16 or int8; of int4 two pairs of columns share their bytes,
    the first one low, (O/16, I/4, 16, 2) uint8; of sparse what is kept, (O/16, Q, 16, 2) bfloat16. scales, bfloat16:
    int8 (O/16, G, 16); int4 (O/16, G, 2, 16), scale and least number; of sparse the outputs that keep each of the four
    inputs, a bit each, (O/16, Q, 4) int16. outliers: of int4+, which is int4 otherwise, E entries of every output,
    (O/16, E, 16) int32, the input above and what is added there, in bfloat16, below.
    """

    kind: str
    outputs: int
    inputs: int
    codes: torch.Tensor
    scales: torch.Tensor | None = None
    bias: torch.Tensor | None = None
    outliers: torch.Tensor | None = None

    @property
    def tensors(self) -> list[torch.Tensor]:
        """Those that there are."""
        return [t for t in (self.codes, self.scales, self.bias, self.outliers) if t is not None]

    @property
    def bytes(self) -> int:
        return sum(t.numel() * t.element_size() for t in self.tensors)


def pack(
    weight: torch.Tensor, kind: str, bias: torch.Tensor | None = None, importance: torch.Tensor | None = None
) -> Packed:
    """weight (O, I) and bias (O,) of any float dtype. `importance` (I,): what a squared error at an input matters, for
    int4 and int4+; None: everywhere alike. Raises `IntarsiaError` for a kind that is not known, and for int4+ with more
    than 65,536 inputs."""
    if kind not in KINDS:
        raise IntarsiaError(f"weights of kind {kind!r} are not known; known: {', '.join(KINDS)}.")
    outputs, inputs = weight.shape
    if kind == DENSE_SPARSE and inputs > MOST_INPUTS:
        raise IntarsiaError(f"weights of kind {kind} have up to {MOST_INPUTS:,} inputs, not {inputs:,}: take int4.")
    full = F.pad(weight.detach(), (0, -inputs % ALIGNED, 0, -outputs % ALIGNED))
    bias = None if bias is None else F.pad(bias.detach().float(), (0, -outputs % ALIGNED))
    if kind == "bf16":
        return Packed(kind, outputs, inputs, _panels(full.bfloat16()), None, bias)
    if kind == "sparse":
        return Packed(kind, outputs, inputs, *_kept(full.bfloat16()), bias)
    parts = [_quantise(part.float(), kind, importance, inputs) for part in full.split(4096)]  # float32 copies are large
    codes, *rest = (torch.cat(t) for t in zip(*parts))
    scales, *outliers = (t.unflatten(0, (-1, PANEL)).movedim(1, -1).contiguous() for t in rest)
    codes = _panels(codes)
    if kind != "int8":
        low, high = codes.view(len(codes), -1, 2, PANEL, 2).to(torch.uint8).unbind(2)
        codes = (low | high << 4).contiguous()
    return Packed(kind, outputs, inputs, codes, scales, bias, *outliers)


def packed_bytes(outputs: int, inputs: int, kind: str, bias: bool = False) -> int:
    """Bytes of what `pack` makes of a weight (outputs, inputs), by arithmetic."""
    outputs, inputs = (-(-size // ALIGNED) * ALIGNED for size in (outputs, inputs))
    each = {"bf16": 2.0, "int8": 1 + 2 / GROUP, "int4": 0.5 + 4 / GROUP, "sparse": 1 + 2 / PANEL}
    words = apart(inputs) if kind == DENSE_SPARSE else 0
    return round(outputs * inputs * each["int4" if words else kind]) + 4 * outputs * (words + bias)


def join(parts: list[Packed]) -> tuple[Packed, list[Packed]]:
    """Weights of one kind that read the same inputs, as one; and the parts again, as views of it.

    A part keeps its filling: it begins where those before it end, at a multiple of 32 outputs.
    """
    sizes, bias = [len(part.codes) for part in parts], None
    held = [name for name in ("codes", "scales", "outliers") if getattr(parts[0], name) is not None]
    joined = {name: torch.cat([getattr(part, name) for part in parts]) for name in held}
    if any(part.bias is not None for part in parts):
        bias = torch.cat([torch.zeros(n * PANEL) if p.bias is None else p.bias for n, p in zip(sizes, parts)])
    whole = Packed(parts[0].kind, sum(sizes) * PANEL, parts[0].inputs, bias=bias, **joined)
    split = zip(*(joined[name].split(sizes) for name in held))
    return whole, [replace(part, **dict(zip(held, views))) for part, views in zip(parts, split, strict=True)]


def unpack(packed: Packed) -> torch.Tensor:
    """The weight that `packed` stands for, (O, I) float32."""
    weight = _numbers(packed.codes, packed.scales, packed.kind).transpose(1, 2).flatten(2)  # (O/16, 16, I)
    if packed.kind in CODED:
        weight = _scaled(weight, packed.scales.movedim(-1, 1))
    if packed.outliers is not None:
        weight = weight.scatter_add(-1, *entries(packed.outliers.transpose(1, 2)))
    return weight.flatten(0, 1)[: packed.outputs, : packed.inputs]


def packed_linear(x: torch.Tensor, packed: Packed) -> torch.Tensor:
    """x (..., I) -> (..., O) in x's dtype. Up to 16 rows a row's numbers do not depend on the other rows."""
    return pick("packed_linear", packed_linear_torch, x)(x, packed)


def packed_linear_torch(x: torch.Tensor, packed: Packed) -> torch.Tensor:
    """`packed_linear` in torch: the weight is unpacked for every call."""
    bias = None if packed.bias is None else packed.bias[: packed.outputs].to(x.dtype)
    return F.linear(x, unpack(packed).to(x.dtype), bias)


def packed_rows(packed: Packed, rows: torch.Tensor) -> torch.Tensor:
    """Rows (...,) of the weight, (..., I) float32: what an embedding looks up."""
    panels, lanes = rows // PANEL, rows % PANEL
    scales = None if packed.scales is None else packed.scales[panels]
    codes = _numbers(packed.codes[panels], scales, packed.kind)
    weight = codes.gather(-2, _lanes(lanes, (*codes.shape[:-2], 1, 2))).flatten(-3)
    if packed.kind in CODED:
        weight = _scaled(weight, scales.gather(-1, _lanes(lanes, (*scales.shape[:-1], 1))).squeeze(-1))
    if packed.outliers is not None:
        words = packed.outliers[panels]
        weight = weight.scatter_add(-1, *entries(words.gather(-1, _lanes(lanes, (*words.shape[:-1], 1))).squeeze(-1)))
    return weight[..., : packed.inputs]


def sparsified(weight: torch.Tensor) -> torch.Tensor:
    """weight (O, I) with the two largest of every four neighbouring inputs, of equals the first, and zeros."""
    inputs = weight.shape[-1]
    quads = F.pad(weight, (0, -inputs % 4)).unflatten(-1, (-1, 4))
    return (quads * _largest(quads)).flatten(-2)[..., :inputs]


def _largest(quads: torch.Tensor) -> torch.Tensor:
    """(..., 4) -> which two of the four are kept, bool. By comparisons: sorting takes twenty times as long."""
    sizes = quads.abs().unbind(-1)
    above = [[a >= b if i < j else a > b for i, a in enumerate(sizes) if i != j] for j, b in enumerate(sizes)]
    return torch.stack([sum(each.to(torch.int8) for each in larger) < 2 for larger in above], -1)


def _kept(weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """(O, I) -> codes and scales of a sparse weight."""
    quads = weight.unflatten(1, (-1, 4))
    mask = _largest(quads)
    first, last = mask.int().argmax(-1), 3 - mask.flip(-1).int().argmax(-1)
    kept = quads.gather(-1, torch.stack([first, last], -1)).flatten(1)  # (O, I/2)
    bits = mask.unflatten(0, (-1, PANEL)).int() << torch.arange(PANEL, dtype=torch.int32)[:, None, None]
    return _panels(kept), bits.sum(1).to(torch.int16)


def _numbers(codes: torch.Tensor, scales: torch.Tensor | None, kind: str) -> torch.Tensor:
    """Codes of panels as float32, (..., I/2, 16, 2)."""
    if kind == "sparse":
        mask = scales[..., None, :].int() >> torch.arange(PANEL, dtype=torch.int32)[:, None] & 1  # (..., Q, 16, 4)
        dense = codes.gather(-1, (mask.cumsum(-1) - 1).clamp(0, 1)) * mask
        return dense.unflatten(-1, (2, 2)).movedim(-2, -3).flatten(-4, -3).float()
    if codes.dtype == torch.uint8:
        codes = torch.stack([codes & 15, codes >> 4], -3).flatten(-4, -3)
    return codes.float()


def _scaled(weight: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
    """Codes (..., I) with their scales (..., G), or scales and least numbers (..., G, 2)."""
    weight, scales = weight.unflatten(-1, (-1, GROUP)), scales.float()
    return (decoded(weight, scales) if scales.dim() == weight.dim() else weight * scales[..., None]).flatten(-2)


def _lanes(lanes: torch.Tensor, shape: tuple[int, ...]) -> torch.Tensor:
    """Indices (...,) as a gather from a tensor with more dimensions wants them."""
    return lanes.view(*lanes.shape, *[1] * (len(shape) - lanes.dim())).expand(shape)


def eight_bits(groups: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """groups (O, G, 32) float32 -> codes, float32, and scales (O, G, 1) bfloat16."""
    scales = (groups.abs().amax(-1, keepdim=True) / 127).bfloat16()
    return nearest(groups, scales, 0, -127, 127), scales


def four_bits(
    groups: torch.Tensor, kind: str, importance: torch.Tensor | None, inputs: int
) -> tuple[torch.Tensor, ...]:
    """groups (O, G, 32) float32 -> codes and lines as `ops.int4` gives them, of int4+ also what it keeps apart."""
    return (dense_and_sparse if kind == DENSE_SPARSE else quantise)(groups, importance, inputs)


def _panels(codes: torch.Tensor) -> torch.Tensor:
    """(O, I) -> (O/16, I/2, 16, 2)."""
    return codes.view(len(codes) // PANEL, PANEL, -1, 2).transpose(1, 2).contiguous()


def _quantise(
    weight: torch.Tensor, kind: str, importance: torch.Tensor | None, inputs: int
) -> tuple[torch.Tensor, ...]:
    """(O, I) float32, of which `inputs` are no filling -> codes (O, I) int8; scales, (O, G) or (O, G, 2) bfloat16,
    rounded before the codes are found; of int4+ what stands apart, (O, E) int32."""
    groups = weight.unflatten(1, (-1, GROUP))
    if kind == "int8":
        codes, scales = eight_bits(groups)
        return codes.flatten(1).to(torch.int8), scales.squeeze(-1)
    codes, lines, *outliers = four_bits(groups, kind, importance, inputs)
    return codes.flatten(1).to(torch.int8), lines.bfloat16(), *outliers
