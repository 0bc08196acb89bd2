"""Matrix products in FP8 with a scale for each tensor, found anew each time (current scaling).

E4M3 (largest number 448) for activations and weights, E5M2 (57,344) for gradients; all three products of a linear layer
are in FP8 (Nemotron-H, arXiv 2504.03624, section 2.3). GPUs from compute capability 8.9 multiply FP8 natively
(`torch._scaled_mm`); elsewhere the numbers are cast, cast back and multiplied with float32 sums, which is the same bit
for bit up to the order of sums: FP8 numbers are exact in bfloat16, and a product of two is exact in float32.

Shape letters: T tokens, I inputs, O outputs.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F

from intarsia.ops.precise import exact_products

FORWARD, GRADIENT = torch.float8_e4m3fn, torch.float8_e5m2
MULTIPLE = 16  # what scaled matrix products need of a dimension


class Scaled(NamedTuple):
    """A tensor in FP8: `data` is round(original x `scale`), `scale` a float32 scalar or one of every row, (R, 1)."""

    data: torch.Tensor
    scale: torch.Tensor

    def restored(self) -> torch.Tensor:
        """What it stands for, float32."""
        return widened(self.data) / self.scale


def quantise(x: torch.Tensor, dtype: torch.dtype) -> Scaled:
    """x of any shape in FP8, so scaled that its largest magnitude becomes the largest number of `dtype`.

    scale = max / amax, and 1 where amax is 0 (TransformerEngine's current scaling, without rounding to powers of two);
    what is too small becomes 0, what would be too large after rounding the largest number. Where x holds NaN or
    infinity the scale is NaN, and with it every product: saturating would hide that the training has gone wrong.
    """
    return scaled_by(x, scale_of(x.detach().abs().amax(), dtype), dtype)


def quantise_rows(x: torch.Tensor, dtype: torch.dtype = FORWARD) -> Scaled:
    """x (R, N) in FP8 as `quantise` does it, with a scale of its own for every row."""
    return scaled_by(x, scale_of(x.detach().abs().amax(-1, keepdim=True), dtype), dtype)


def scale_of(amax: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """The float32 scale for a largest magnitude, or for each of several."""
    amax = amax.float()
    scale = (torch.finfo(dtype).max / amax.double()).clamp(max=torch.finfo(torch.float32).max).float()
    return torch.where(amax == 0, 1.0, torch.where(amax.isfinite(), scale, torch.nan))


def scaled_by(x: torch.Tensor, scale: torch.Tensor, dtype: torch.dtype) -> Scaled:
    """x in FP8 by a scale that is known."""
    most = torch.finfo(dtype).max
    return Scaled((x.float() * scale).clamp(-most, most).to(dtype), scale)


def widened(data: torch.Tensor) -> torch.Tensor:
    """FP8 numbers (not NaN) as float32. On a processor by moving their bits into a float16, which has as many bits for
    E5M2's exponent and one more for E4M3's (whose bias is 8 less): torch converts them one by one."""
    if data.device.type != "cpu":
        return data.float()
    bits = data.view(torch.int8).to(torch.int16)  # the sign goes along
    if data.dtype == GRADIENT:
        return bits.bitwise_left_shift_(8).view(torch.float16).float()
    return bits.bitwise_left_shift_(7).bitwise_and_(~0x4000).view(torch.float16).float().mul_(256)


def native(device: torch.device) -> bool:
    """Whether this device multiplies FP8 itself."""
    return device.type == "cuda" and torch.cuda.get_device_capability(device) >= (8, 9)


def describe(device: torch.device | str = "cpu") -> str:
    """How FP8 is computed on a device, and whether that is fast."""
    device = torch.device(device)
    if native(device):
        return "scaled matrix products of the GPU: fast"
    why = "this processor has none" if device.type == "cpu" else "this GPU has none (from compute capability 8.9 on)"
    return f"emulated by casting, for its numbers and not for speed: {why}"


def product(a: Scaled, b: Scaled, dtype: torch.dtype, fast: bool = False, emulate: bool | None = None) -> torch.Tensor:
    """a (M, K) times b (N, K) transposed -> (M, N) in `dtype`. Native, K and N are multiples of 16.

    `fast` lets sums be kept in fewer bits (the forward pass does, as in TransformerEngine's recipe, the backward
    passes do not). `emulate` None is False where the device multiplies FP8.
    """
    if emulate is None:
        emulate = not native(a.data.device)
    if emulate:
        with exact_products(torch.bfloat16):
            sums = widened(a.data) @ widened(b.data).mT
        return (sums * (1 / a.scale * (1 / b.scale))).to(dtype)
    return torch._scaled_mm(
        a.data.contiguous(), b.data.contiguous().mT, scale_a=1 / a.scale, scale_b=1 / b.scale, out_dtype=dtype,
        use_fast_accum=fast,
    )  # fmt: skip


def product_of_rows(a: Scaled, b: Scaled, dtype: torch.dtype) -> torch.Tensor:
    """`product` of what `quantise_rows` gave: a row of the result depends on its row of `a` alone."""
    if not native(a.data.device):
        with exact_products(torch.bfloat16):
            sums = widened(a.data) @ widened(b.data).mT
        return (sums * (1 / a.scale) * (1 / b.scale).mT).to(dtype)
    found = torch._scaled_mm(
        a.data.contiguous(), b.data.mT, scale_a=1 / a.scale, scale_b=(1 / b.scale).mT.contiguous(),
        out_dtype=torch.bfloat16, use_fast_accum=True,
    )  # fmt: skip
    return found.to(dtype)


def linear_fp8(x: torch.Tensor, weight: torch.Tensor, emulate: bool | None = None) -> torch.Tensor:
    """x (..., I), weight (O, I) -> (..., O) in x's dtype; forward and both backward products in FP8.

    I and O are multiples of 16. Differentiable in both; keeps x and weight in FP8 for the backward pass. A weight that
    is an `Fp8Weight` is in FP8 already.
    """
    rows = x.reshape(-1, x.shape[-1])
    return _Linear.apply(rows, weight, emulate).view(*x.shape[:-1], -1)


class Fp8Weight(torch.Tensor):
    """A weight of which only FP8 is known: it has the shape and dtype of what it stands for, and gradients of that
    dtype; what it can do is to be moved about as it is, and to be the weight of `linear_fp8`."""

    @staticmethod
    def __new__(cls, scaled: Scaled, dtype: torch.dtype):
        data = scaled.data
        return torch.Tensor._make_wrapper_subclass(cls, data.shape, data.stride(), dtype=dtype, device=data.device)

    def __init__(self, scaled: Scaled, dtype: torch.dtype):
        self.scaled = scaled

    def __tensor_flatten__(self):
        return ["_data", "_scale"], self.dtype

    @staticmethod
    def __tensor_unflatten__(inner, dtype, size, stride):
        return Fp8Weight(Scaled(inner["_data"], inner["_scale"]), dtype)

    @property
    def _data(self) -> torch.Tensor:
        return self.scaled.data

    @property
    def _scale(self) -> torch.Tensor:
        return self.scaled.scale

    def __repr__(self, *, tensor_contents=None) -> str:
        return f"Fp8Weight({tuple(self.shape)}, {self.dtype}, scale={self.scaled.scale})"

    @classmethod
    def __torch_dispatch__(cls, function, types, args=(), kwargs=None):
        same = (torch.ops.aten.detach.default, torch.ops.aten.alias.default, torch.ops.aten.as_strided.default,
                torch.ops.aten.view.default)  # fmt: skip
        weight = args[0]
        if function not in same or (len(args) > 1 and list(args[1]) != list(weight.shape)):
            raise NotImplementedError(f"{function} of a weight in FP8: it can only be multiplied by, in linear_fp8")
        return Fp8Weight(weight.scaled, weight.dtype)


class _Linear(torch.autograd.Function):
    """x (T, I), weight (O, I) -> (T, O)."""

    @staticmethod
    def forward(ctx, x, weight, emulate):
        x8 = quantise(x, FORWARD)
        w8 = weight.scaled if isinstance(weight, Fp8Weight) else quantise(weight, FORWARD)
        ctx.save_for_backward(*x8, *w8)
        ctx.emulate, ctx.dtypes = emulate, (x.dtype, weight.dtype)
        return product(x8, w8, x.dtype, True, emulate)

    @staticmethod
    def backward(ctx, dy):
        x, x_scale, w, w_scale = ctx.saved_tensors
        g, of_x, of_weight = quantise(dy, GRADIENT), None, None
        if ctx.needs_input_grad[0]:
            of_x = product(g, Scaled(w.mT, w_scale), ctx.dtypes[0], False, ctx.emulate)
        if ctx.needs_input_grad[1]:  # the sum is over tokens, whose number may be any
            g, x = (Scaled(_padded(t).mT, s) for t, s in (g, (x, x_scale)))
            of_weight = product(g, x, ctx.dtypes[1], False, ctx.emulate)
        return of_x, of_weight, None


def _padded(rows: torch.Tensor) -> torch.Tensor:
    """(T, N) with rows of zeros up to a multiple of 16."""
    missing = -len(rows) % MULTIPLE
    return rows if not missing else F.pad(rows.view(torch.uint8), (0, 0, 0, missing)).view(rows.dtype)
