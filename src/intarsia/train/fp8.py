"""Which linear layers of a model train in FP8, which do not, and why (Nemotron-H, arXiv 2504.03624, section 2.3).

All of the blocks do, but for the first and last four, counted as products: queries, keys and values are one, and so
are gate and up. Embedding, head, norms, convolutions, scans and the core of attention are no linear layers here and
stay as they are.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch.distributed.tensor import DTensor

from intarsia.model import Decoder
from intarsia.ops.fp8 import FORWARD, MULTIPLE, Fp8Weight, Scaled, linear_fp8, scale_of, scaled_by
from intarsia.ops.linear import Projection

INPUTS = ("q", "k", "v", "gate", "up", "in_proj", "x_proj")  # read the stream; the others come back to it
CUT_INPUTS = ("o", "down", "out_proj")  # tensor parallelism cuts these along their inputs


class Fp8Projection(Projection):
    """A linear layer with float32 or bfloat16 weights whose products are in FP8. With `gathered` its shards are
    gathered in FP8 (`Fp8Shard`)."""

    gathered = True

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = linear_fp8(x, self.weight)
        return y if self.bias is None else y + self.bias


class Fp8Shard(torch.Tensor):
    """A rank's float32 shard of a weight that FSDP2 gathers in FP8: half of the bytes of bfloat16, the same bits as
    from the gathered weight, because the ranks agree on its largest magnitude first."""

    def fsdp_pre_all_gather(self, mesh, outer_size, outer_stride, module, mp_policy):
        own = self.as_subclass(torch.Tensor).to(mp_policy.param_dtype or self.dtype)
        amax = own.abs().amax().float() if own.numel() else torch.zeros((), device=own.device)
        amax = torch.where(amax.isfinite(), amax, torch.inf)  # the maximum of NaN and a number may be either
        dist.all_reduce(amax, dist.ReduceOp.MAX, group=mesh.get_group())
        data, scale = scaled_by(own, scale_of(amax, FORWARD), FORWARD)
        rows = -(-outer_size[0] // mesh.size())  # every rank gives as many, the last ones zeros
        whole = data.new_zeros(rows, *data.shape[1:])
        whole[: len(data)] = data
        return (whole.view(torch.uint8),), (scale, outer_size[0], whole.dtype)  # gloo has no word for FP8

    def fsdp_post_all_gather(self, outputs, metadata, param_dtype, *, out=None):
        scale, rows, dtype = metadata
        scaled = Scaled(outputs[0][:rows].view(dtype), scale)
        if out is None:
            return Fp8Weight(scaled, param_dtype), ()  # FSDP itself lets go of what was gathered
        (out._local_tensor if isinstance(out, DTensor) else out).scaled = scaled
        return None


def gather_in_fp8(module: torch.nn.Module) -> None:
    """After `fully_shard`, before the first forward pass: let the weights of a module's FP8 layers be gathered in FP8.

    FSDP2 asks the local tensor of a shard, when it is first used, whether it has ways of its own; it would lose a class
    that it was given before it made the shards.
    """
    for part in module.modules():
        if isinstance(part, Fp8Projection) and part.gathered:
            part.weight._local_tensor = part.weight._local_tensor.as_subclass(Fp8Shard)


@dataclass(frozen=True)
class Layer:
    """What became of one linear layer; `why` is empty for one that computes in FP8."""

    name: str
    shape: tuple[int, int]
    why: str

    @property
    def parameters(self) -> int:
        return self.shape[0] * self.shape[1]


def convert(model: Decoder, keep: int = 4, share: int = 1, gathered: bool = True) -> list[Layer]:
    """Let the linear layers of the blocks compute in FP8, but for the first and last `keep` products; what became of
    each, in order. Names and parameters stay. `share` ranks will share each block; see Fp8Projection for `gathered`."""
    products = _products(model)
    edges = {*range(keep), *range(len(products) - keep, len(products))}
    layers = []
    for number, names in enumerate(products):
        for name in names:
            module = model.get_submodule(name)
            why = "one of the first or last products" if number in edges else _misfit(name, module, share)
            layers.append(Layer(name, (module.out_features, module.in_features), why))
            if not why:
                owner, _, leaf = name.rpartition(".")
                setattr(model.get_submodule(owner), leaf, new := _converted(module))
                new.gathered = gathered
    return layers


def _products(model: Decoder) -> list[list[str]]:
    """The linear layers of the blocks in the order in which they run; those that are one product stand together."""
    found: list[list[str]] = []
    for index, block in enumerate(model.blocks):
        names = [name for name, module in block.mixer.named_modules() if isinstance(module, Projection)]
        first = [name for name in names if name in INPUTS]
        for group in (first, [name for name in names if name not in INPUTS]):
            if group:
                found.append([f"blocks.{index}.mixer.{name}" for name in group])
    return found


def _misfit(name: str, module: Projection, share: int) -> str:
    sizes = {"inputs": module.in_features, "outputs": module.out_features}
    cut = "inputs" if name.rpartition(".")[2] in CUT_INPUTS else "outputs"
    sizes[cut] //= share
    wrong = [f"{size:,} {what}" for what, size in sizes.items() if size % MULTIPLE]
    return f"{' and '.join(wrong)} are no multiple of {MULTIPLE}" if wrong else ""


def _converted(module: Projection) -> Fp8Projection:
    new = Fp8Projection(module.in_features, module.out_features, bias=False, device="meta")
    new.weight, new.bias = module.weight, module.bias
    return new


def told(layers: list[Layer]) -> str:
    """The conversion in a few lines."""
    inside = [layer for layer in layers if not layer.why]
    total = sum(layer.parameters for layer in layers)
    share = sum(layer.parameters for layer in inside) / max(1, total)
    lines = [f"FP8: {len(inside)} of {len(layers)} linear layers, {share:.0%} of their weights"]
    for why in dict.fromkeys(layer.why for layer in layers if layer.why):
        names = [layer.name for layer in layers if layer.why == why]
        lines.append(f"  left as they are ({why}): {', '.join(names)}")
    return "\n".join(lines)
