"""Which options a site has: the parent's own block, cheaper ones, and nothing (Puzzle 2.1)."""

from __future__ import annotations

import dataclasses
import itertools
import math
import re
from dataclasses import dataclass

from intarsia.arch import Architecture, Attention, Block, Experts, FeedForward, Linear, Mamba2, pair_layers
from intarsia.base.errors import IntarsiaError
from intarsia.compress.recipe import Options

KV_METHODS = ("drop", "mean", "aligned", "keep")
ROWS = 16  # kernels for narrow floats want the rows of a Mamba-2 input projection in multiples of this


@dataclass(frozen=True)
class Quantised:
    """A block whose matrices are packed in a precision of their own."""

    block: Block
    precision: str


@dataclass(frozen=True)
class OptionSpec:
    """What may stand at a site. `block` is None for nothing; `method` says how its weights come from the parent's:
    parent, prefix (of sorted FFN channels), window (the same weights see less), mamba (in place of attention), narrow
    (of a Mamba-2 block), experts (fewer of them), cmoe or moefication (experts out of a dense FFN), linear, none, span
    (stands for several layers), covered (nothing, under a span), or one of `KV_METHODS`."""

    name: str
    block: Block | None
    method: str
    precision: str = ""  # how its matrices are packed for inference, a kind of `ops.packed`; "": as all others are

    @property
    def base(self) -> OptionSpec:
        """The option whose weights are packed."""
        return dataclasses.replace(self, name=self.name.removesuffix(f" {self.precision}"), precision="")

    @property
    def priced(self) -> Block | Quantised | None:
        """What its cost depends on."""
        return Quantised(self.block, self.precision) if self.precision else self.block


PARENT, NONE, SPAN, COVERED = "parent", "none", "span", "covered"
Pair = tuple[OptionSpec | None, OptionSpec | None]  # what stands in the slots of a site; None: it has no such slot


def slot_names(pair: Pair) -> tuple[str, str]:
    """The names of a pair's options; a slot that is not there is called as the parent's own block would be."""
    attention, ffn = (PARENT if spec is None else spec.name for spec in pair)
    return attention, ffn


def options_for(block: Block, recipe: Options) -> list[OptionSpec]:
    """Every option of a site whose parent block is `block`, the parent's own first, dearest to cheapest."""
    found = [OptionSpec(PARENT, block, PARENT)]
    if isinstance(block, FeedForward):
        found += [_narrow(block, width) for width in ffn_widths(block.intermediate_size, recipe)]
        found += [_cut_up(block, shape, method) for method in recipe.moe_methods for shape in recipe.moe]
    elif isinstance(block, Attention):
        for method in recipe.kv_methods:
            found += _fewer_kv(block, method)
        found += [_window(block, length) for length in _shorter(block, recipe)]
        if recipe.mamba:
            found.append(_mamba(block))
    elif isinstance(block, Mamba2):
        found += _narrower(block, recipe)
    elif isinstance(block, Experts):
        fewer = dict.fromkeys(fewer_experts(block, share) for share in sorted(recipe.experts, reverse=True))
        found += [OptionSpec(new.label, new, "experts") for new in fewer if new != block]
    if recipe.linear and isinstance(block, (Attention, FeedForward)):
        found.append(OptionSpec("linear", Linear(bias=_has_last_bias(block)), "linear"))
    if recipe.absent:
        found.append(OptionSpec(NONE, None, NONE))
    packable = [spec for spec in found if spec.block is not None]
    return found + [in_precision(spec, kind) for kind in recipe.precisions for spec in packable]


def in_precision(spec: OptionSpec, kind: str) -> OptionSpec:
    """The same option with its matrices packed."""
    return dataclasses.replace(spec, name=f"{spec.name} {kind}", precision=kind)


def plain(block: Block | Quantised) -> Block:
    return block.block if isinstance(block, Quantised) else block


def precision_of(block: Block | Quantised) -> str:
    return block.precision if isinstance(block, Quantised) else ""


def ffn_widths(size: int, recipe: Options) -> list[int]:
    """Channel counts of the ladder, widest first: fractions of `size` to the nearest multiple, without repeats."""
    step = recipe.multiple
    wanted = {max(step, round(share * size / step) * step) for share in recipe.ffn_widths}
    return sorted((w for w in wanted if w < size), reverse=True)


def _narrow(block: FeedForward, width: int) -> OptionSpec:
    return OptionSpec(f"ffn {width}", dataclasses.replace(block, intermediate_size=width), "prefix")


def fewer_experts(block: Experts, share: float) -> Experts:
    """The block with about this share of its routed experts, as many from every group, enough for every token."""
    groups = block.num_expert_groups
    least = -(-block.experts_per_token // block.groups_per_token)
    kept = max(least, round(share * block.num_experts / groups))
    return dataclasses.replace(block, num_experts=min(block.num_experts, kept * groups))


def _cut_up(block: FeedForward, shape: str, method: str) -> OptionSpec:
    """`shape` S2A2E16: of 16 equal pieces of a dense FFN 2 are always in use, and 2 of the others by choice."""
    parts = re.fullmatch(r"S(\d+)A(\d+)E(\d+)", shape)
    shared, active, pieces = map(int, parts.groups()) if parts else (0, 0, 0)
    if not 1 <= active <= pieces - shared:
        raise IntarsiaError(
            f"options.moe {shape!r} is no way to cut an FFN up: write S2A2E16 for 16 pieces, of which a token uses 2 "
            "that all share and 2 of the others."
        )
    if block.bias or block.intermediate_size % pieces:
        why = "its biases" if block.bias else f"its {block.intermediate_size} channels, no multiple of {pieces}"
        raise IntarsiaError(f"options.moe {shape}: an FFN of this model cannot be cut up because of {why}.")
    size = block.intermediate_size // pieces
    new = Experts(pieces - shared, active, size, shared * size, block.activation, block.gated, router="neurons")
    return OptionSpec(f"experts {shape} {method}", new, method)


def _fewer_kv(block: Attention, method: str) -> list[OptionSpec]:
    """`drop` removes KV heads with their queries; the others keep every query and share fewer KV heads."""
    if method not in KV_METHODS:
        raise IntarsiaError(f"{method!r} is no way to fewer KV heads; known: {', '.join(KV_METHODS)}.")
    found = []
    for kv in range(block.num_kv_heads - 1, 0, -1):
        if method == "drop":
            new = dataclasses.replace(block, num_heads=kv * block.group, num_kv_heads=kv)
            found.append(OptionSpec(f"attention {new.num_heads}q/{kv}kv", new, method))
        elif block.num_kv_heads % kv == 0:
            new = dataclasses.replace(block, num_kv_heads=kv)
            found.append(OptionSpec(f"attention {new.num_heads}q/{kv}kv {method}", new, method))
    return found


def _shorter(block: Attention, recipe: Options) -> list[int]:
    """The windows that see less than the block does, longest first."""
    return sorted({w for w in recipe.windows if w < (block.sliding_window or math.inf)}, reverse=True)


def _window(block: Attention, length: int) -> OptionSpec:
    new = dataclasses.replace(block, sliding_window=length)
    return OptionSpec(new.label, new, "window")


def _mamba(block: Attention) -> OptionSpec:
    """Every query head a Mamba-2 head with B and C of its own, as wide as attention's (Mamba in the Llama, 2408.15237);
    biases where attention has them. The norm works on each head alone, which the stock families of hybrids can say."""
    size, biased = block.head_dim, block.qkv_bias or block.out_bias
    new = Mamba2(block.num_heads, size, state_size=size, num_groups=block.num_heads, proj_bias=biased)
    return OptionSpec(new.label, new, "mamba")


def _narrower(block: Mamba2, recipe: Options) -> list[OptionSpec]:
    """Every combination of fewer heads, narrower heads and fewer states, without repeats."""
    shares = [(1.0, *given) for given in (recipe.mamba_heads, recipe.mamba_channels, recipe.mamba_states)]
    found = (narrower(block, *cut, multiple=recipe.mamba_multiple) for cut in itertools.product(*shares))
    return [OptionSpec(new.label, new, "narrow") for new in dict.fromkeys(found) if new != block]


def narrower(
    block: Mamba2, heads: float = 1.0, channels: float = 1.0, states: float = 1.0, multiple: int = 8
) -> Mamba2:
    """The block with about these shares of its heads, of the channels of each head, and of its states.

    Heads come in multiples of the groups, channels and states of `multiple`. Of the sizes nearest to what is asked, the
    first whose input projection has a multiple of 16 rows, if the parent's has. A size that cannot be cut (one head a
    group; a norm that would lose more in one of its groups than in another) stays.
    """
    groups, norms = block.num_groups, block.groups_of_norm
    size = _nearest(block.head_dim, channels, multiple) if block.num_heads % norms == 0 else block.head_dim
    state = _nearest(block.state_size, states, multiple)
    sizes = dataclasses.replace(block, head_dim=size, state_size=state)
    if heads == 1 or groups % norms:
        return sizes
    wanted = heads * block.num_heads
    steps = sorted(range(groups, block.num_heads + 1, groups), key=lambda n: (abs(n - wanted), n))
    found = [dataclasses.replace(sizes, num_heads=n) for n in steps]
    return next((f for f in found if block.in_size % ROWS or f.in_size % ROWS == 0), sizes)


def _nearest(size: int, share: float, multiple: int) -> int:
    return size if share == 1 else min(size, max(multiple, round(share * size / multiple) * multiple))


def _has_last_bias(block: Block) -> bool:
    return block.out_bias if isinstance(block, Attention) else getattr(block, "bias", False)


@dataclass(frozen=True)
class Span:
    """What may stand in place of `length` sites in a row: an option for each slot of the first, None where it has no
    such slot. One of the two has the method span; the other sites are `covered`."""

    name: str
    length: int
    attention: OptionSpec | None
    ffn: OptionSpec | None


def covered(left: int) -> OptionSpec:
    """Nothing, because a span stands for the site; `left`: of how many sites from here on."""
    return OptionSpec(f"{COVERED} {left}", None, COVERED)


def is_covered(pair: Pair) -> bool:
    """Whether a span that began before stands for the site."""
    return any(spec is not None and spec.method == COVERED for spec in pair)


@dataclass(frozen=True)
class Site:
    """A Transformer layer of the parent: the indices of its attention and FFN blocks (None where it has none). A choice
    at the site is an option of each, or one of the `spans` that begin here, or nothing under one that began before."""

    layer: int
    attention: int | None
    ffn: int | None
    spans: tuple[Span, ...] = ()

    @property
    def blocks(self) -> list[int]:
        """The indices of its blocks, in order."""
        return [index for index in (self.attention, self.ffn) if index is not None]

    @property
    def reach(self) -> tuple[int, int]:
        """The index of its first block, and that of the first behind it."""
        return self.blocks[0], self.blocks[-1] + 1


def sites_of(arch: Architecture) -> list[Site]:
    """The layers of a Transformer parent, in order."""
    return [Site(layer, a, f) for layer, (a, f) in enumerate(pair_layers(arch.blocks))]
