"""What learns at one site during blockwise local distillation: the options, and how they share weights.

`Nested`: all widths of an FFN are prefixes of one sorted block, so that one training serves them all; each width only
gets a last matrix of its own at the end, fitted in closed form. `Own`: every option has its own weights. Either way one
option a step is drawn, by a rule that depends on the step alone, so the two are compared at equal cost.

Shape letters: N tokens, D model, C inner channels.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import nn

from intarsia.arch import Attention, Linear, Mamba2
from intarsia.compress.importance import ridge_solve
from intarsia.compress.options import OptionSpec
from intarsia.model import ResidualBlock
from intarsia.model.mixers import Tables, activate
from intarsia.ops.losses import normalised_mse

Moments = tuple[torch.Tensor, torch.Tensor]


def draw(step: int, index: int, count: int) -> int:
    """The option that block `index` trains at `step`: a pure function, so that a resumed run draws the same."""
    return int.from_bytes(hashlib.sha256(f"{step}:{index}".encode()).digest()[:4], "big") % count


class Own(nn.Module):
    """Options of one site, each with its own weights (all attention options; FFN widths in mode `own`)."""

    def __init__(self, specs: list[OptionSpec], blocks: list[ResidualBlock], dtype: torch.dtype):
        super().__init__()
        self.specs = specs
        self.mixers = nn.ModuleList(block.mixer.to(dtype) for block in blocks)

    def loss(self, x: torch.Tensor, target: torch.Tensor, tables: Tables | None, turn: int) -> torch.Tensor:
        return normalised_mse(self.mixers[turn](x, tables), target)

    def outputs(self, x: torch.Tensor, tables: Tables | None) -> Iterator[tuple[OptionSpec, torch.Tensor]]:
        for spec, mixer in zip(self.specs, self.mixers):
            yield spec, mixer(x, tables)

    def inner(self, x: torch.Tensor, tables: Tables | None) -> list[torch.Tensor]:
        """What the last matrix of each option reads, (B, L, C)."""
        return [channels_of(mixer, x, tables) for mixer in self.mixers]

    def _last(self, turn: int) -> nn.Linear:
        return last_matrix(self.mixers[turn])

    def last_bias(self, turn: int) -> torch.Tensor | None:
        return self._last(turn).bias

    def refit(self, moments: list[Moments]) -> list[torch.Tensor]:
        """Fit the last matrix of every option; returns the old ones, for `restore`."""
        old = [self._last(turn).weight.detach().clone() for turn in range(len(moments))]
        for turn, pair in enumerate(moments):
            self._last(turn).weight.data.copy_(fit_towards(*pair, old[turn].T).T)
        return old

    def settle(self) -> None:
        """Nothing: every option has learned its own last matrix."""

    def restore(self, turn: int, old: torch.Tensor) -> None:
        self._last(turn).weight.data.copy_(old)

    def export(self) -> dict[str, torch.Tensor]:
        """Tensors of every option, `<option>/<parameter>`."""
        return {
            f"{spec.name}/{name}": tensor.detach().contiguous()
            for spec, mixer in zip(self.specs, self.mixers)
            for name, tensor in mixer.state_dict().items()
        }


class Nested(nn.Module):
    """The widths of one FFN as prefixes of one sorted block."""

    def __init__(self, specs: list[OptionSpec], blocks: list[ResidualBlock], dtype: torch.dtype):
        super().__init__()
        self.specs = specs
        self.widths = [spec.block.intermediate_size for spec in specs]
        widest = blocks[self.widths.index(max(self.widths))]
        self.wide = widest.mixer.to(dtype)
        # A last matrix for each width: fitted before training by the surgery, learned, then fitted again by `refit`.
        self.downs = [block.mixer.down.weight.detach().to(dtype) for block in blocks]

    def channels(self, x: torch.Tensor, width: int) -> torch.Tensor:
        gate = _prefix(self.wide.gate, x, width) if self.wide.spec.gated else None
        return activate(self.wide.spec.activation, _prefix(self.wide.up, x, width), gate)

    def loss(self, x: torch.Tensor, target: torch.Tensor, tables: Tables | None, turn: int) -> torch.Tensor:
        width = self.widths[turn]
        y = F.linear(self.channels(x, width), self.wide.down.weight[:, :width], self.wide.down.bias)
        return normalised_mse(y, target)

    def outputs(self, x: torch.Tensor, tables: Tables | None) -> Iterator[tuple[OptionSpec, torch.Tensor]]:
        channels = self.channels(x, max(self.widths))
        for spec, width, down in zip(self.specs, self.widths, self.downs):
            yield spec, F.linear(channels[..., :width], down, self.wide.down.bias)

    def inner(self, x: torch.Tensor, tables: Tables | None) -> list[torch.Tensor]:
        """Of the widest option alone: the others are its prefixes."""
        return [self.channels(x, max(self.widths))]

    def last_bias(self, turn: int) -> torch.Tensor | None:
        return self.wide.down.bias

    def settle(self) -> None:
        """After training, the last matrices are prefixes of the one that learned beside the channels."""
        self.downs = [self.wide.down.weight.detach()[:, :width].clone().contiguous() for width in self.widths]

    def refit(self, moments: list[Moments]) -> list[torch.Tensor]:
        """Fit a last matrix for every width; returns the old ones, for `restore`."""
        gram, cross = moments[0]
        start, old = self.wide.down.weight.data.T, self.downs
        dtype = self.wide.down.weight.dtype
        self.downs = [fit_towards(gram[:w, :w], cross[:w], start[:w]).T.to(dtype).contiguous() for w in self.widths]
        return old

    def restore(self, turn: int, old: torch.Tensor) -> None:
        self.downs[turn] = old

    def export(self) -> dict[str, torch.Tensor]:
        """The shared tensors once, and `down` of each width."""
        state = {n: t for n, t in self.wide.state_dict().items() if n != "down.weight"}
        shared = {f"nested/{n}": t.detach().contiguous() for n, t in state.items()}
        return shared | {f"{spec.name}/down.weight": d.contiguous() for spec, d in zip(self.specs, self.downs)}


Trainee = Own | Nested


def last_matrix(mixer: nn.Module) -> nn.Linear:
    """What ends an attention, Mamba-2, FFN or linear mixer."""
    if isinstance(mixer.spec, Attention):
        return mixer.o
    if isinstance(mixer.spec, Linear):
        return mixer.proj
    return mixer.out_proj if isinstance(mixer.spec, Mamba2) else mixer.down


def channels_of(mixer: nn.Module, x: torch.Tensor, tables: Tables | None) -> torch.Tensor:
    """What that matrix reads, (B, L, C), of a normalised input (B, L, D)."""
    if isinstance(mixer.spec, Attention):
        return mixer.heads(x, tables, None, 0).transpose(1, 2).flatten(2)
    return x if isinstance(mixer.spec, Linear) else mixer.channels(x)


def _prefix(layer: nn.Linear, x: torch.Tensor, width: int) -> torch.Tensor:
    return F.linear(x, layer.weight[:width], None if layer.bias is None else layer.bias[:width])


def fit_towards(gram: torch.Tensor, cross: torch.Tensor, start: torch.Tensor) -> torch.Tensor:
    """Rows W (C, D) that minimise |c W - y|^2 + ridge |W - start|^2 from gram = sum c c^T and cross = sum c y^T."""
    start = start.float()
    return start + ridge_solve(gram, cross - gram @ start)


def wide_enough(tensors: dict[str, torch.Tensor], width: int) -> dict[str, torch.Tensor]:
    """The stored channels of which `width` are a prefix, as `export` of a nested block names them: the nested block
    itself, or of FFNs that each have their own weights the narrowest that is wide enough."""
    if any(name.startswith("nested/") for name in tensors):
        return tensors
    own = {int(name.split("/")[0].removeprefix("ffn ")) for name in tensors if name.startswith("ffn ")}
    source = f"ffn {min(w for w in own if w >= width)}/"
    names = [n for n in tensors if n.startswith(source) and not n.endswith("down.weight")]
    return {f"nested/{n.removeprefix(source)}": tensors[n] for n in names}


def import_option(tensors: dict[str, torch.Tensor], spec: OptionSpec, block: ResidualBlock) -> None:
    """Fill the mixer of `block` with what `export` of either kind of trainee stored for `spec`."""
    own = {n.removeprefix(f"{spec.name}/"): t for n, t in tensors.items() if n.startswith(f"{spec.name}/")}
    shared = {n.removeprefix("nested/"): t for n, t in tensors.items() if n.startswith("nested/")}
    if spec.method == "prefix" and shared:
        width = spec.block.intermediate_size
        own |= {n: t if n.startswith("down") else t[:width] for n, t in shared.items()}
    block.mixer.load_state_dict(own)
